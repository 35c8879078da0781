"""What the machine may do to a service that runs: a disk that is full, a clock that jumps."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from service_helpers import ROOT, SERVE, SLOW, ServerProcess, post, predictions, wait_ready, wait_until


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_cannot_be_written_costs_no_answer(digits_bundle: Path, clean: list[bytes], isolation: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = json.dumps({"bundle": str(digits_bundle), "port": port, "seed": 7, "isolation": isolation})
    with Path("/dev/full").open("wb", buffering=0) as full:
        process = subprocess.Popen([sys.executable, "-c", SERVE, settings], stdout=full, stderr=full, cwd=ROOT)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: _answers(process, port), seconds=60)
            wait_ready(client)
            for file in clean[:3]:
                assert predictions(post(client, file))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "the service has ended"
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


CLOCK = """
import time
from pathlib import Path
real, jump = time.time, Path({path!r})
time.time = lambda: real() + float(jump.read_text())
"""
"""The clock on the wall, as somebody else sets it."""


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_no_deadline_and_no_answer(
    digits_bundle: Path, clean: list[bytes], tmp_path: Path, jump: float
) -> None:
    """In the service and in its engine, a process of its own; deadlines pass between the two."""
    (tmp_path / "jump").write_text("0")
    clock = CLOCK.format(path=str(tmp_path / "jump"))
    engines = f"from service import engine_process\nengine_process._MAIN = {clock!r} + engine_process._MAIN\n"
    server = ServerProcess(
        tmp_path / "log", before=clock + engines, bundle=digits_bundle, isolation="process", threads=1, offer=[SLOW]
    )
    with contextlib.closing(server):
        wait_ready(server.client)
        before = predictions(post(server.client, clean[0], deadline_ms=20_000))
        (tmp_path / "jump").write_text(str(jump))
        assert predictions(post(server.client, clean[0], deadline_ms=20_000)) == before
        assert post(server.client, clean[0], defense=SLOW, deadline_ms=300).status_code == 504
        assert server.client.get("/readyz").status_code == 200
        server.terminate()
        assert server.process.wait(30) == 0
