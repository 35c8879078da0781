"""Throws damaged image files at the decoder, which may refuse them, and may do nothing else.

    python -m benchmarks.fuzz_decode [--inputs 100000] [--seed 0]

A seed repeats a run.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import __version__ as pillow
from PIL import features

from benchmarks import results
from benchmarks.image_mutations import mutate, seeds
from mithridate import images
from mithridate.errors import ImageError
from mithridate.images import ImageLimits

LIMITS = ImageLimits(max_bytes=2_000_000, max_pixels=1_000_000, max_side=16_384)
MAX_SECONDS, MAX_GROWTH = 2.0, 256 * 1024 * 1024
"""What one input may take, and how far the peak of the process may rise above where it was after the first inputs."""


def peak() -> int:
    """The most bytes that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Run:
    """What became of the inputs so far."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.resident, self.started = 0, 0.0
        self.slowest: tuple[float, bytes] = (0.0, b"")

    def __call__(self, data: bytes) -> None:
        """Decodes ``data``; any exception that is no ``ImageError`` goes through, and one that took too long fails."""
        started = time.process_time()
        try:
            image = images.decode_image(data, channels=1 + 2 * (len(data) % 2), limits=LIMITS)
            assert 0 < image[0].size <= LIMITS.max_pixels
            outcome = "decoded"
            message = ""
        except ImageError as error:
            outcome, message = type(error).__name__, str(error)
        seconds = time.process_time() - started
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)
        self.slowest = max(self.slowest, (seconds, data))
        assert len(message) < 500, message
        assert message.isprintable(), message
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s for {len(data)} bytes: {data[:64]!r}"


def main(inputs: int = 100_000, seed: int = 0) -> None:
    corpus, run = seeds(), Run()
    for data in corpus * 20:
        run(data)
    run.resident, run.started = peak(), time.perf_counter()
    draw = random.Random(seed)  # noqa: S311 repeatable
    while len(run.seconds) < inputs:
        data = mutate(draw.choice(corpus), draw, corpus)
        try:
            run(data)
        except BaseException:
            Path("fuzz-decode-failure.bin").write_bytes(data)
            raise
    report(run, "fuzz-decode")


def report(run: Run, name: str) -> None:
    """Files what became of the inputs; fails where memory grew."""
    growth = peak() - run.resident
    assert growth < MAX_GROWTH, f"the peak rose by {growth:,} bytes"
    seconds = np.array(run.seconds)
    times = {"p50": np.median(seconds), "p99": np.quantile(seconds, 0.99), "max": seconds.max()}
    content: dict[str, Any] = {
        "fuzzed": len(seconds),
        "outcomes": dict(run.outcomes.most_common()),
        "other_exceptions": 0,  # or there would be no report
        "seconds": {key: float(value) for key, value in times.items()},
        "slowest_bytes": len(run.slowest[1]),
        "limits": {"pixels": LIMITS.max_pixels, "seconds": MAX_SECONDS, "growth": MAX_GROWTH},
        "resident": run.resident,
        "peak_growth": growth,
        "wall_seconds": time.perf_counter() - run.started,
        "libraries": {"Pillow": pillow, **{name: features.version(name) for name in ("jpg", "webp", "zlib")}},
    }
    print(json.dumps(content, indent=1))
    results.write(name, content)


if __name__ == "__main__":
    typer.run(main)
