"""What the tests of engine processes share: how much a process has computed, and what a service says in its log."""

from __future__ import annotations

import os
import re
from pathlib import Path

from service_helpers import ServerProcess

_TICKS = os.sysconf("SC_CLK_TCK")


def engine_pids(server: ServerProcess) -> list[int]:
    """The engine processes that it has started, in that order."""
    return [int(found) for found in re.findall(r"engine process (\d+) for", server.log)]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """What it has computed so far, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def mapped_bytes(pid: int) -> int:
    """How large its address space is."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
