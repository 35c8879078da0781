"""Keeping freed memory: what is allocated again and again is mapped only once."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import platform, resource, sys
import torch
from mithridate.memory import keep_freed_memory

torch.set_num_threads(1)
told = keep_freed_memory() if sys.argv[1] == "keep" else False

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [torch.ones(2**24) for _ in range(4)]
    del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(5):
    faults()
print(platform.libc_ver()[0], told, min(faults() for _ in range(5)))
"""


def run(mode: str, **environment: str) -> tuple[str, str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], env=environment, capture_output=True, text=True, check=True
    )
    libc, told, faults = done.stdout.split()
    return libc, told, int(faults)


def test_large_blocks_are_not_mapped_again() -> None:
    libc, told, kept = run("keep")
    if libc != "glibc":
        pytest.skip("malloc is not glibc's")
    _, _, given_back = run("as it is")
    assert told == "True"
    assert kept < 10
    assert given_back > 100  # four times 64 MB, more than malloc ever keeps of itself: 128 pages if they are huge


def test_what_the_environment_says_stays() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[1] == "False"
