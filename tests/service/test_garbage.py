"""What was loaded for good is not looked at again by the collector."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import service_helpers

SEEN = """
import gc
from service import garbage

kept = [[number] for number in range(1000)]
garbage.set_aside()
assert gc.get_freeze_count() > len(kept)
assert not any(one is kept for one in gc.get_objects())
later = []
later.append(later)
assert any(one is later for one in gc.get_objects())
"""


def test_what_is_there_is_set_aside_and_what_comes_is_collected() -> None:
    """In a process of its own: what is set aside here would never be collected for the other tests."""
    subprocess.run([sys.executable, "-c", SEEN], cwd=service_helpers.ROOT, check=True)


def test_a_service_does_so_once_it_is_ready(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and after loading: on_ready is called again by no swap."""
    said = "import gc\nfreeze = gc.freeze\ngc.freeze = lambda: (freeze(), print('set aside', flush=True))\n"
    monkeypatch.setattr(service_helpers, "SERVE", said + service_helpers.SERVE)
    server = service_helpers.ServerProcess(tmp_path / "log", bundle=digits_bundle, threads=1)
    try:
        service_helpers.wait_ready(server.client)
        assert server.log.count("set aside") == 1
    finally:
        server.close()
