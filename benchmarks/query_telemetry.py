"""How much of an attack near-duplicate telemetry sees, what else it takes for one, and what it costs.

    python -m benchmarks.query_telemetry [BUNDLE DATASET] [--images 20 --queries 200 --epsilon 8/255 ...]

Without a bundle, the digits one of ``make demo`` is built. Detection runs in this process, with the service's own
``RecentQueries``: each attacked image is one client's. Costs are those of the whole application, one client, one image
a request, defence ``none``: two of them, with and without telemetry, take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from starlette.testclient import TestClient

from benchmarks import results
from benchmarks.digits import bundle_or_digits
from cli.options import load_data
from cli.output import print_table
from mithridate.attacks.black_box import Square
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import Answers
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence
from mithridate.evaluation import percentile
from mithridate.images import encode_png
from mithridate.types import Epsilon, Pixels, to_images
from service.app import create_app
from service.queries import RecentQueries, Yardstick
from service.settings import load_settings

_WINDOW, _MEMORY = 1000, 64 * 2**20
_FRACTIONS = (0.25, 0.5, 0.75)
_ROUNDS = 50
_ACCOUNTS = 5


def main(
    bundle: Annotated[Path | None, typer.Argument()] = None,
    dataset: Annotated[str, typer.Argument()] = "digits[test]",
    images: int = 20,
    queries: int = 200,
    epsilon: Annotated[list[str] | None, typer.Option()] = None,
    requests: int = 600,
    data_root: Path | None = None,
    name: str = "query-telemetry",
) -> None:
    bundle = bundle_or_digits(bundle)
    data = load_data(dataset, data_root=data_root, download=False, image_size=None, split="test")
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    radii = [Epsilon.parse(text) for text in epsilon or ["32/255", "16/255", "4/255", "8/255"]]
    traffic = dict(_traffic(resources, data, images, queries, radii))
    clean = opened.embeddings[: opened.manifest.dataset.images]
    rows = [
        {"traffic": kind, **_rate(resources, clean, clients, fraction), "fraction": fraction}
        for kind, clients in traffic.items()
        for fraction in _FRACTIONS
    ]
    cost = _cost(bundle, [encode_png(image) for image in data.images[:100]], requests)
    compare = [_compare(dimension) for dimension in (clean.shape[1], 512, 2048)]
    content = {
        "near_duplicates": rows,
        "dataset": data.spec,
        "attacked": images,
        "budget": queries,
        "window": _WINDOW,
        "cost": cost,
        "compare": compare,
    }
    path = results.write(name, content)
    header = ["traffic", "fraction", "queries", "near", "identical", "clients warned of"]
    cells = [
        [
            row["traffic"],
            f"{row['fraction']}",
            str(row["queries"]),
            f"{100 * row['near'] / row['queries']:.1f} %",
            f"{100 * row['identical'] / row['queries']:.1f} %",
            f"{row['warned']} of {row['clients']}",
        ]
        for row in rows
    ]
    print_table(f"{data.spec}; {path.name}", header, cells)
    print(cost, compare)


class _Listening(InProcessOracle):
    """Keeps what it is asked, in order."""

    def __init__(self, defence: Any, classes: int) -> None:
        super().__init__(defence, classes=classes, seed=0)
        self.asked: list[Pixels] = []

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        self.asked.append(pixels.clone())
        return super().ask(rows, pixels)


def _traffic(
    resources: Resources, data: LabelledImages, images: int, queries: int, radii: Sequence[Epsilon]
) -> Iterator[tuple[str, list[Pixels]]]:
    """By name: each client's images in the order in which it sends them."""
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    yield "distinct clean images, one client", [pixels]
    draw = torch.Generator().manual_seed(0)
    base, classes = build_defence("none", resources), resources.classifier.spec.num_classes
    for radius in radii:
        clients = []
        for row in range(images):
            oracle = _Listening(base, classes)
            place = slice(row, row + 1)
            Square(epsilon=radius).run(oracle, pixels[place], labels[place], seed=row, budget=queries)
            clients.append(torch.cat(oracle.asked))
        yield f"Square at {radius}, a client an image", clients
    yield f"the last over {_ACCOUNTS} accounts each", [c[n::_ACCOUNTS] for c in clients for n in range(_ACCOUNTS)]
    yield "the last, each query moved by up to a pixel", [_moved(client, draw) for client in clients]
    some = pixels[:100]
    yield "each image twice, the same bytes", [_after(some, some)]
    for level in (1, 4, 8):
        noise = level * torch.randn(some.shape, generator=draw)
        yield (
            f"each image again with noise of {level}/255",
            [_after(some, (some + noise).round().clamp(0, 255).to(torch.uint8))],
        )
    yield "each image again, a pixel to the right", [_after(some, torch.roll(some, 1, dims=3))]
    yield "each image again, 5 % brighter", [_after(some, (1.05 * some).round().clamp(0, 255).to(torch.uint8))]


def _moved(pixels: Pixels, draw: torch.Generator) -> Pixels:
    """What an attacker may do who knows that a small move leaves the class and not the embedding."""
    moves = torch.randint(-1, 2, (len(pixels), 2), generator=draw).tolist()
    return torch.stack([torch.roll(image, tuple(move), dims=(1, 2)) for image, move in zip(pixels, moves, strict=True)])


def _after(first: Pixels, second: Pixels) -> Pixels:
    """First all of the one, then all of the other."""
    return torch.cat([first, second])


@torch.no_grad()
def _rate(resources: Resources, clean: np.ndarray, clients: Sequence[Pixels], fraction: float) -> dict[str, Any]:
    yardstick = Yardstick.of(clean, window=_WINDOW, fraction=fraction)
    near = identical = count = warned = 0
    for pixels in clients:
        recent = RecentQueries(yardstick, window=_WINDOW, max_bytes=_MEMORY)
        found = recent.add("client", resources.classifier.embed(to_images(pixels)).numpy(), now=0.0)
        near, identical, count = near + found.near, identical + found.identical, count + found.compared
        warned += found.rate >= 0.5 and found.rated >= 50
    return {
        "queries": count,
        "near": near,
        "identical": identical,
        "clients": len(clients),
        "warned": warned,
        "squared_distance": yardstick.near,
    }


def _compare(dimension: int) -> dict[str, Any]:
    """One image against a full window."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((_WINDOW + 400, dimension)).astype(np.float32)
    recent = RecentQueries(Yardstick.of(rows, window=_WINDOW, fraction=0.5), window=_WINDOW, max_bytes=_MEMORY)
    recent.add("client", rows[:_WINDOW], now=0.0)
    taken = []
    for row in rows[_WINDOW:]:
        started = time.perf_counter()
        recent.add("client", row[None], now=0.0)
        taken.append(time.perf_counter() - started)
    return {"dimension": dimension, "us": 1e6 * statistics.median(taken), "client_bytes": recent.nbytes}


def _cost(bundle: Path, files: Sequence[bytes], requests: int) -> dict[str, Any]:
    """Milliseconds a request: from sending to the answer, and of all CPUs, telemetry's own thread included.

    Two whole applications in this process, without sockets: their CPU time does not depend on who else is on the
    machine, as the other does.
    """
    latencies: dict[str, list[float]] = {"without": [], "with": []}
    cpu = dict.fromkeys(latencies, 0.0)
    with ExitStack() as stack:
        clients = {kind: stack.enter_context(_service(bundle, kind == "with")) for kind in latencies}
        for client in clients.values():
            _ask(client, files, 50)
        for number in range(_ROUNDS):
            for kind in list(latencies)[:: 1 if number % 2 else -1]:
                started = time.process_time()
                latencies[kind] += _ask(clients[kind], files, requests // _ROUNDS)
                cpu[kind] += time.process_time() - started
    return {
        kind: {
            "p50_ms": percentile(values, 0.5),
            "p99_ms": percentile(values, 0.99),
            "requests": len(values),
            "cpu_ms": 1000 * cpu[kind] / len(values),
        }
        for kind, values in latencies.items()
    }


@contextmanager
def _service(bundle: Path, telemetry: bool) -> Iterator[TestClient]:
    settings = load_settings(bundle=bundle, offer=("none",), defense="none", query_telemetry=telemetry)
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        yield client


def _ask(client: TestClient, files: Sequence[bytes], count: int) -> list[float]:
    """What ``count`` requests take, one after the other; then telemetry compares what they have left it."""
    taken = []
    for number in range(count):
        started = time.perf_counter()
        answer = client.post("/v1/predict", content=files[number % len(files)], headers={"Content-Type": "image/png"})
        taken.append(1000 * (time.perf_counter() - started))
        answer.raise_for_status()
    app: Any = client.app
    if app.state.service.watching.telemetry is not None:
        app.state.service.watching.telemetry.flush()
    return taken


if __name__ == "__main__":
    typer.run(main)
