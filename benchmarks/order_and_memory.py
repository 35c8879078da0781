"""Whether an answer depends on who asked before, and whether memory grows with the number of requests.

    python -m benchmarks.order_and_memory [--bundle BUNDLE --dataset SPEC --epsilon 32/255] [--requests 2000] [--quick]

*order*: clean and attacked images, each a request with a seed of its own, are answered one after the other; then again
in random permutations, first one after the other (the answers must be the same to the bit), then several together in
groups of random sizes (the same to 1e-4: another batch size rounds differently). Every defence and scope, always by
the same defence object, as in a service.

*memory*: resident memory of ``rmc`` over 2,000 requests of one image each, in this process and in a running service
that 8 clients ask; the growth from request 200 to the last must be below 1 %.

Without a bundle, a digits one with activations is built. Exits with 1 where anything depends or grows.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from attack_client.client import AsyncClient
from attack_client.transfer import craft, load_surrogate
from benchmarks import results
from cli.demo import run_command, running_service
from cli.options import load_data, use_threads
from cli.output import note, print_table, size
from mithridate.bundle import Bundle
from mithridate.defenses import Budget, Defence, Prediction, Request, Resources, build_defence
from mithridate.images import encode_png
from mithridate.types import Epsilon, Images, to_images

_BUNDLE = Path("build/order-and-memory/bundle")
_DEFENCES = (
    "none",
    "webnn",
    "deepnn",
    "rmc",
    "rmc:solver=adam",
    "rmc:scope=tail,neighbors=64,epochs=2",
    "rmc:scope=all,neighbors=32,epochs=2",
)
_SAME, _FLAT = 1e-4, 0.01
_FIRST, _EVERY = 200, 200
_LARGEST_GROUP = 8
_CLIENTS = 8


def main(
    bundle: Path | None = None,
    dataset: str = "digits",
    epsilon: str = "32/255",
    images: int = 24,
    permutations: int = 4,
    requests: int = 2000,
    defense: Annotated[list[str] | None, typer.Option()] = None,
    quick: bool = False,
    name: str = "order-and-memory",
    seed: int = 0,
) -> None:
    use_threads(None)
    if quick:
        images, permutations, requests = 8, 2, 400
    path = bundle or _built()
    data = load_data(f"{dataset}[test,:{images}]", data_root=None, download=False, image_size=None)
    attacked = craft(load_surrogate(path, data), data, attack="pgd20", epsilon=Epsilon.parse(epsilon), seed=seed)
    pixels = torch.cat([torch.from_numpy(data.images), torch.from_numpy(attacked.pixels)])
    resources = Resources.load(Bundle.open(path))
    note("memory in this process")
    memory = {"in process": _memory_here(build_defence("rmc", resources), to_images(pixels), requests, seed)}
    note("memory of a service")
    encoded = [encode_png(image) for image in pixels.numpy()]
    with running_service(path, 0) as url:
        memory["service"] = asyncio.run(_memory_of_service(url, encoded, requests, seed))
    rows = [_order(text, resources, to_images(pixels), permutations, seed) for text in defense or _DEFENCES]
    _print(rows, memory, len(pixels))
    good = all(row["alone"] == 0 and row["together"] <= _SAME for row in rows)
    good &= all(found["resident_growth"] < _FLAT for found in memory.values())
    if quick:
        note("--quick: nothing is filed")
    else:
        content = {"dataset": data.spec, "images": len(pixels), "permutations": permutations, "requests": requests}
        print(results.write(name, {**content, "order": rows, "memory": memory}).name)
    if not good:
        raise typer.Exit(1)


def _built() -> Path:
    _BUNDLE.parent.mkdir(parents=True, exist_ok=True)
    options = ("--dataset", "digits[train]", "--attack", "pgd10", "--epsilon", "32/255", "--tail-layer", "auto")
    run_command("build", *options, "--out", str(_BUNDLE), "--resume")
    return _BUNDLE


def _order(text: str, resources: Resources, images: Images, permutations: int, seed: int) -> dict[str, Any]:
    """The largest difference of any score, with the requests in another order, and in company."""
    note(f"order: {text}")
    defence = build_defence(text, resources)
    usual, adapted = _answers(defence, images, [[number] for number in range(len(images))])
    alone, together, turned = 0.0, 0.0, 0
    chance = np.random.default_rng(seed)
    for _ in range(permutations):
        order = chance.permutation(len(images)).tolist()
        again, _ = _answers(defence, images, [[number] for number in order])
        alone = max(alone, float((again - usual).abs().max()))
        again, _ = _answers(defence, images, _groups(order, chance))
        together = max(together, float((again - usual).abs().max()))
        turned += int((again.argmax(1) != usual.argmax(1)).sum())
    return {
        "defense": defence.name,
        "adapted": adapted,
        "alone": alone,
        "together": together,
        "other_classes": turned,
    }


def _groups(numbers: Sequence[int], chance: np.random.Generator) -> list[list[int]]:
    groups, rest = [], list(numbers)
    while rest:
        count = int(chance.integers(1, _LARGEST_GROUP, endpoint=True))
        groups.append(rest[:count])
        rest = rest[count:]
    return groups


def _answers(defence: Defence, images: Images, groups: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
    """Scores ``[N, C]`` in the order of ``images``, asked for in the order of ``groups``, and how many adapted weights
    gave."""
    scores: dict[int, torch.Tensor] = {}
    adapted = 0
    for group in groups:
        asked = [
            Request(images=images[n : n + 1], generator=torch.Generator().manual_seed(n), budget=Budget())
            for n in group
        ]
        for number, outcome in zip(group, defence.predict_together(asked), strict=True):
            assert isinstance(outcome, Prediction)
            scores[number] = outcome.scores[0]
            adapted += outcome.adaptations[0] is not None and outcome.adaptations[0].weights == "adapted"
    return torch.stack([scores[number] for number in range(len(images))]), adapted


def _memory_here(defence: Defence, images: Images, requests: int, seed: int) -> dict[str, Any]:
    chance, seen = np.random.default_rng(seed), {}
    for number in range(1, requests + 1):
        place = int(chance.integers(len(images)))
        defence.predict(images[place : place + 1], generator=torch.Generator().manual_seed(number), budget=Budget())
        if number % _EVERY == 0:
            seen[number] = _memory(os.getpid())
    return _growth(seen)


async def _memory_of_service(url: str, images: Sequence[bytes], requests: int, seed: int) -> dict[str, Any]:
    chance, seen, pid = np.random.default_rng(seed), {}, _child()
    async with AsyncClient(url) as client:

        async def some(count: int) -> None:
            for _ in range(count):
                await client.predict(images[int(chance.integers(len(images)))], defense="rmc")

        for number in range(_EVERY, requests + 1, _EVERY):
            await asyncio.gather(*(some(_EVERY // _CLIENTS) for _ in range(_CLIENTS)))
            seen[number] = _memory(pid)
    return _growth(seen)


def _growth(seen: dict[int, dict[str, int]]) -> dict[str, Any]:
    first, last = seen[_FIRST], seen[max(seen)]
    return {"bytes": seen, **{f"{key}_growth": last[key] / first[key] - 1 for key in first}}


def _memory(pid: int) -> dict[str, int]:
    """Bytes that a process has in memory now: all of them, and without what is mapped from files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: 1024 * int(lines[name].split()[0]) for key, name in (("resident", "VmRSS"), ("own", "RssAnon"))}


def _child() -> int:
    """The service: the one process that is ours."""
    pids = [
        int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and _parent(path) == os.getpid()
    ]
    (pid,) = pids
    return pid


def _parent(process: Path) -> int | None:
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:  # it has ended
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("PPid:"))


def _print(rows: Sequence[dict[str, Any]], memory: dict[str, dict[str, Any]], images: int) -> None:
    header = ["defence", "adapted", "in another order", "in company", "other classes"]
    cells = [
        [
            row["defense"],
            f"{row['adapted']} of {images}",
            *(f"{row[key]:.1e}" for key in ("alone", "together")),
            str(row["other_classes"]),
        ]
        for row in rows
    ]
    print_table("largest difference of a score, with the requests", header, cells)
    header = ["rmc", "memory", f"after {_FIRST}", "after the last", "requests", "growth"]
    cells = []
    for where, found in memory.items():
        seen = found["bytes"]
        for key, what in (("resident", "resident"), ("own", "without files")):
            ends = (size(seen[number][key]) for number in (_FIRST, max(seen)))
            cells.append([where, what, *ends, str(max(seen)), f"{100 * found[f'{key}_growth']:.2f} %"])
    print_table("memory", header, cells)


if __name__ == "__main__":
    typer.run(main)
