"""Whether a GPU gives the CPU's answers, what every scope and preset costs on it, and whether it waits for the host.

    python -m benchmarks.gpu_check BUNDLE [--device cuda] [--images 32] [--limit 60] [--defense DEFENCE ...] [--quick]

Queries are exemplars of the bundle, clean and attacked, moved by at most one level a pixel. Three tables:

*agreement*: the largest difference between CPU and device in embeddings, neighbours (of the same embeddings) and
scores, each beside what is allowed, and whether the classes are the same (where the CPU's first class leads by more
than twice what is allowed). Convolutions without TF32 here.

*waiting*: ``torch.cuda.set_sync_debug_mode`` around search and adaptation of the closed-form head: every line where
the host waits for the GPU between embedding and answer. Reported, not judged.

*cost*: milliseconds an image at batch 1 and 64, the ratio to the plain forward pass measured in turns with it, and peak
memory (of the device's allocator; on a CPU of the process). Settings as a service has them. What takes longer than
``--limit`` seconds is stopped and shown as more than that.

Exits with 1 where there is no such device, and where the two do not agree. ``--device cpu`` compares the CPU with
itself (neighbours by torch instead of numpy, convolutions channels last): a test of this script, which is not filed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from benchmarks import results
from cli.options import use_threads
from cli.output import note, print_table, size
from mithridate.bundle import Bundle
from mithridate.defenses import Budget, Defence, Prediction, Resources, build_defence
from mithridate.defenses.adapting import Query
from mithridate.defenses.none import base_pass
from mithridate.defenses.presets import PRESETS
from mithridate.defenses.rmc import RMC
from mithridate.defenses.selection import Selector
from mithridate.devices import resolve_device
from mithridate.errors import MithridateError, ModelError
from mithridate.types import Images, to_images

T = TypeVar("T")

_BATCHES = (1, 64)
_TIMES = 5

_VOTE = 2.5 / 64
"""Of 64 neighbours two may change places with others that are as far away, but for rounding."""

_ALLOWED = {
    "none": 1e-4,
    "webnn": _VOTE,
    "webnn:scores=softmax,weights=cbw-d": _VOTE,
    "deepnn": _VOTE,
    "rmc:neighbors=64": 1e-3,
    "rmc:solver=adam,neighbors=64,steps=20": 5e-3,
    "rmc:scope=tail,neighbors=64,epochs=2": 2e-2,
    "rmc:scope=all,neighbors=32,epochs=2,batch_size=16,precision=float32": 2e-2,
}
"""Of the scores. Adam's first steps are as long as the learning rate whatever the gradient: rounding can turn them."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: the largest ``difference``, what is ``allowed``, and how many classes differ that should not."""

    what: str
    difference: float
    allowed: float
    wrong_classes: int = 0

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed and not self.wrong_classes


def main(
    bundle: Path,
    device: str = "cuda",
    images: int = 32,
    limit: float = 60.0,
    defense: Annotated[list[str] | None, typer.Option()] = None,
    quick: bool = False,
    name: str | None = None,
    seed: int = 0,
) -> None:
    use_threads(None)
    try:
        target = resolve_device(device)
        opened = Bundle.open(bundle)
        here, there = Resources.load(opened), _load(opened, target)
    except MithridateError as error:
        note(f"error: {error}")
        raise typer.Exit(1) from None
    queries = _queries(here, max(images, *_BATCHES), seed)
    with torch.no_grad():
        checks = list(_agreement(here, there, queries[:images], seed))
        waits = _waits(there, queries[:images])
        texts = defense or _costed(there, quick)
        rows = [_cost(there, text, queries, limit, seed) for text in texts]
    _print(checks, waits, rows, target)
    name = name or ("gpu-check" if target.type == "cuda" else None)
    if name is not None:
        content = {"bundle": opened.digest, "device": _called(target), "images": images, "waits": waits}
        listed = [{**asdict(check), "passed": check.passed} for check in checks]
        print(results.write(name, {**content, "agreement": listed, "cost": rows}).name)
    if not all(check.passed for check in checks):
        note("the two do not agree")
        raise typer.Exit(1)


def _load(opened: Bundle, device: torch.device) -> Resources:
    loaded = Resources.load(opened, device=device)
    if device.type == "cuda":
        return loaded
    loaded.classifier.network.to(memory_format=torch.channels_last)  # so that something is rounded differently
    return replace(loaded, index=loaded.index.to(device, backend="torch"))


def _queries(resources: Resources, count: int, seed: int) -> Images:
    """Exemplars, with noise of one level, so that a query is not its own neighbour at distance 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(resources.exemplars), (count,), generator=generator)
    pixels = resources.exemplars.pixels(ids)
    noise = torch.randint(-1, 2, pixels.shape, generator=generator)
    return to_images((pixels + noise).clamp(0, 255).to(torch.uint8))


def _agreement(here: Resources, there: Resources, images: Images, seed: int) -> Iterator[Check]:
    with _without_tf32():
        embedded = here.classifier.embed(images)
        moved = there.classifier.embed(images.to(there.classifier.device)).cpu()
        yield Check(what="embeddings, of the largest", difference=_gap(embedded, moved) / _most(embedded), allowed=1e-4)
        yield _neighbors(here, there, embedded)
        for text, allowed in _ALLOWED.items():
            try:
                defences = [build_defence(text, resources) for resources in (here, there)]
            except ModelError as error:
                note(f"{text} left out: {error}")
                continue
            mine, theirs = (_ask(defence, images, seed, Budget()).scores for defence in defences)
            first, second = mine.topk(2).values.unbind(1)
            clear = first - second > 2 * allowed
            differ = int((clear & (mine.argmax(1) != theirs.argmax(1))).sum())
            yield Check(what=text, difference=_gap(mine, theirs), allowed=allowed, wrong_classes=differ)


def _neighbors(here: Resources, there: Resources, embedded: torch.Tensor) -> Check:
    """Exemplars at one distance, to rounding, may change places."""
    mine, theirs = here.index.search(embedded, 64), there.index.search(embedded.to(there.classifier.device), 64)
    assert theirs.ids.device.type == there.classifier.device.type, "the neighbours are not where they are needed"
    scale = _most(mine.distances)
    other = here.index.distances(embedded, theirs.ids.cpu())  # what those really are, and at what place
    return Check(
        what="neighbours' distances, of the largest",
        difference=max(_gap(mine.distances, theirs.distances.cpu()), _gap(mine.distances, other)) / scale,
        allowed=1e-9,
    )


def _ask(defence: Defence, images: Images, seed: int, budget: Budget) -> Prediction:
    return defence.predict(images, generator=torch.Generator().manual_seed(seed), budget=budget)


def _gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


def _most(values: torch.Tensor) -> float:
    return float(values.abs().max())


@contextmanager
def _without_tf32() -> Iterator[None]:
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [part.fp32_precision for part in settings]
    try:
        for part in settings:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, value in zip(settings, before, strict=True):
            part.fp32_precision = value


def _waits(resources: Resources, images: Images) -> dict[str, Any] | None:
    """Where the host waits for the GPU in search and adaptation of the closed-form head; None where there is no GPU."""
    device = resources.classifier.device
    defence = build_defence("rmc:scope=head,preset=balanced", resources)
    if device.type != "cuda" or not isinstance(defence, RMC):
        return None
    images = images.to(device)
    base = base_pass(resources.classifier, images)
    selector = Selector(resources=resources, config=defence.selection)

    def query() -> Query:
        count = len(images)
        selection = selector.select(base.embedding)
        return Query(images=images, base=base, selection=selection, budgets=(Budget(),) * count, seeds=(0,) * count)

    found = query()
    defence.adapter.adapt(found)  # warm: the first call may allocate, and allocating waits
    work: dict[str, Callable[[], object]] = {"search": query, "adapt": lambda: defence.adapter.adapt(found)}
    return {phase: {"refused": _refused(run), "places": _places(run)} for phase, run in work.items()}


def _refused(run: Callable[[], object]) -> str | None:
    """What CUDA says at the first wait, where none is allowed."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _places(run: Callable[[], object]) -> dict[str, int]:
    """Each line that waits, and how often."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)))


def _costed(resources: Resources, quick: bool) -> list[str]:
    if quick:
        return ["none", "webnn", "rmc:scope=head,preset=balanced"]
    scopes = ["head", "tail", "all"] if resources.classifier.has_tail else ["head", "all"]
    return [
        "none",
        "webnn",
        "deepnn",
        *(f"rmc:scope={scope},preset={preset}" for scope in scopes for preset in PRESETS),
    ]


def _cost(resources: Resources, text: str, queries: Images, limit: float, seed: int) -> dict[str, Any]:
    """``ms`` and ``ratio`` by batch; None where one image at a time already says that it would exceed the limit."""
    note(f"measuring {text}")
    row: dict[str, Any] = {"defense": text, "stopped": False}
    _forget_peak(resources.classifier.device)
    expected = 0.0
    for batch in _BATCHES:
        if row["stopped"] or expected * batch > limit:
            row[f"batch {batch}"] = None
            continue
        seconds, plain, stopped = _in_turns(resources, text, queries[:batch], limit, seed)
        row[f"batch {batch}"] = {"ms": 1000 * seconds / batch, "ratio": seconds / plain}
        row["stopped"], expected = stopped, seconds / batch
    return {**row, "peak_bytes": _peak(resources.classifier.device)}


def _in_turns(resources: Resources, text: str, images: Images, limit: float, seed: int) -> tuple[float, float, bool]:
    """Median seconds of the defence and of the plain forward pass, and whether the time limit stopped it."""
    device, spent, plain = resources.classifier.device, [], []
    defence = build_defence(text, resources)
    began, stopped = time.monotonic(), False
    while len(spent) <= _TIMES and not stopped and time.monotonic() - began < limit:
        plain.append(_timed(device, lambda: resources.classifier(images.to(device)).cpu())[0])
        seconds, answer = _timed(device, lambda: _ask(defence, images, seed, Budget(deadline=time.monotonic() + limit)))
        spent.append(seconds)
        stopped = any(a is not None and a.stop_reason == "deadline" for a in answer.adaptations)
    if len(spent) > 1:  # the first one loads and allocates, the last may have been stopped
        whole = slice(0 if stopped and len(spent) == 2 else 1, -1 if stopped else None)
        return statistics.median(spent[whole]), statistics.median(plain[whole]), False
    return spent[0], plain[0], stopped


def _timed(device: torch.device, run: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    answer = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, answer


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what it has now


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _called(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _print(
    checks: Sequence[Check], waits: dict[str, Any] | None, rows: Sequence[dict[str, Any]], device: torch.device
) -> None:
    cells = [
        [c.what, f"{c.difference:.1e}", f"{c.allowed:.1e}", str(c.wrong_classes), "yes" if c.passed else "NO"]
        for c in checks
    ]
    title = f"cpu and {_called(device)}"
    print_table(title, ["", "largest difference", "allowed", "wrong classes", "agrees"], cells)
    if waits is None:
        print("waiting: not looked at, there is no GPU")
    for phase, found in (waits or {}).items():
        places = ", ".join(f"{place} x{count}" for place, count in found["places"].items()) or "none"
        print(f"{phase}: {'waits' if found['refused'] else 'does not wait'} for the GPU; places: {places}")
    header = ["defence", *(part for b in _BATCHES for part in (f"ms, batch {b}", "to plain")), "peak memory"]
    print_table(
        "milliseconds an image, ratio to the plain forward pass",
        header,
        [[row["defense"], *_cells(row), size(row["peak_bytes"])] for row in rows],
    )


def _cells(row: dict[str, Any]) -> Iterator[str]:
    more = "> " if row["stopped"] else ""
    for batch in _BATCHES:
        cost = row[f"batch {batch}"]
        yield "-" if cost is None else f"{more}{cost['ms']:,.2f}"
        yield "-" if cost is None else f"{more}{cost['ratio']:,.2f}"


if __name__ == "__main__":
    typer.run(main)
