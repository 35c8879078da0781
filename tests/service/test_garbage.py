"""What was loaded for good is not looked at again by the collector."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import service_helpers

SEEN = """
import gc, weakref
from service import garbage

kept = [[number] for number in range(1000)]
garbage.set_aside()
assert gc.get_freeze_count() > len(kept)
assert not any(one is kept for one in gc.get_objects())
later = []
later.append(later)
assert any(one is later for one in gc.get_objects())
gone = weakref.ref(node := type("Node", (), {})())
node.itself = node
garbage.set_aside()
del node
garbage.set_aside()
assert gone() is None, "what was set aside is looked at again the next time"
garbage.take_back()
assert gc.get_freeze_count() == 0
"""


def test_what_is_there_is_set_aside_and_what_comes_is_collected() -> None:
    """In a process of its own: what is set aside here would never be collected for the other tests."""
    subprocess.run([sys.executable, "-c", SEEN], cwd=service_helpers.ROOT, check=True)


def test_a_service_does_so_once_it_is_ready(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "import gc\nfreeze = gc.freeze\ngc.freeze = lambda: (freeze(), print('set aside', flush=True))\n"
    monkeypatch.setattr(service_helpers, "SERVE", said + service_helpers.SERVE)
    server = service_helpers.ServerProcess(tmp_path / "log", bundle=digits_bundle, threads=1)
    try:
        service_helpers.wait_ready(server.client)
        service_helpers.wait_until(lambda: server.log.count("set aside") == 1)
        server.process.send_signal(signal.SIGHUP)  # the same bundle once more: what was set aside before is looked at
        service_helpers.wait_until(lambda: server.log.count("set aside") == 2)
    finally:
        server.close()
