"""Requests a second over HTTP, and how long each takes.

    python -m benchmarks.throughput [--bundle BUNDLE --dataset SPEC]

Without a bundle, the digits one of ``make demo`` is built. One image a request. First a closed loop of 1 and of 8
clients: how much the service can do. Then an open loop, at half of what 8 clients reached with the slowest defence:
what a user waits. Client and service share the machine. In the closed loops the defences take turns, so that a noisy
machine is equally unfair to all; read the numbers as ratios to ``none``.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attack_client.client import AsyncClient
from attack_client.load import Shot, fire
from benchmarks import results
from benchmarks.digits import bundle_or_digits
from cli.demo import running_service
from cli.options import load_data
from cli.output import print_table
from mithridate.evaluation import percentile
from mithridate.images import encode_png

_ROUNDS = 5


def main(
    bundle: Path | None = None,
    dataset: str = "digits[test]",
    defense: Annotated[list[str] | None, typer.Option()] = None,
    requests: int = 200,
    data_root: Path | None = None,
    name: str = "throughput",
) -> None:
    bundle = bundle_or_digits(bundle)
    data = load_data(dataset, data_root=data_root, download=False, image_size=None, split="test")
    images = [encode_png(image) for image in data.images]
    defenses = defense or ["none", "rmc", "webnn"]
    with running_service(bundle, 0) as url:
        rows = asyncio.run(_measure(url, images, defenses, requests))
    path = results.write(name, {"dataset": data.spec, "requests_per_cell": requests, "rounds": _ROUNDS, "rows": rows})
    header = ["defence", "1 client: req/s", "8 clients: req/s", "open loop: req/s", "p50 ms", "p99 ms", "p50 / none"]
    base = rows[0]["open_p50_ms"]
    cells = [
        [
            row["defense"],
            f"{row['serial_rps']:.0f}",
            f"{row['parallel_rps']:.0f}",
            f"{row['open_rate']:.0f}",
            f"{row['open_p50_ms']:.1f}",
            f"{row['open_p99_ms']:.1f}",
            f"{row['open_p50_ms'] / base:.2f}",
        ]
        for row in rows
    ]
    print_table(f"{data.spec}, one image a request; {path.name}", header, cells)


async def _measure(url: str, images: Sequence[bytes], defenses: Sequence[str], requests: int) -> list[dict[str, Any]]:
    async with AsyncClient(url) as client:
        for defense in defenses:
            await _closed(client, images, defense, clients=4, requests=20)
        serial, parallel = {d: [] for d in defenses}, {d: [] for d in defenses}
        for _ in range(_ROUNDS):
            for defense in defenses:
                serial[defense].append(await _closed(client, images, defense, 1, requests // _ROUNDS))
                parallel[defense].append(await _closed(client, images, defense, 8, requests // _ROUNDS))
        rows, rate = [], min(statistics.median(values) for values in parallel.values()) / 2
        for defense in defenses:
            latencies = await _open(client, images, defense, rate, requests)
            rows.append(
                {
                    "defense": defense,
                    "serial_rps": statistics.median(serial[defense]),
                    "parallel_rps": statistics.median(parallel[defense]),
                    "open_rate": rate,
                    "open_p50_ms": percentile(latencies, 0.5),
                    "open_p99_ms": percentile(latencies, 0.99),
                }
            )
        return rows


async def _closed(client: AsyncClient, images: Sequence[bytes], defense: str, clients: int, requests: int) -> float:
    """Requests a second, with so many clients that each wait for their answer."""

    async def one(first: int) -> None:
        for number in range(first, requests, clients):
            await client.predict(images[number % len(images)], defense=defense)

    started = time.perf_counter()
    await asyncio.gather(*(one(first) for first in range(clients)))
    return requests / (time.perf_counter() - started)


async def _open(client: AsyncClient, images: Sequence[bytes], defense: str, rate: float, requests: int) -> list[float]:
    shots = [
        Shot(image=number, kind="clean", defense=defense, content=images[number % len(images)])
        for number in range(requests)
    ]
    return [outcome.latency_ms for outcome in await fire(client, shots, rate=rate, seed=0)]


if __name__ == "__main__":
    typer.run(main)
