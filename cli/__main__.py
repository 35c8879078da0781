"""``python -m cli`` is ``mithridate``."""

from cli.main import run

run()
