"""SAP: what it keeps of the clean accuracy, what each attack leaves of it, and what it costs.

    python -m benchmarks.sap BUNDLE DATASET [--part attacked|clean|cost] [--epsilon 8/255] [--attack pgd40]

*attacked*: 100 passes under every attack of the erratum's story: PGD through the pruned passes with the mask as a
constant, as the first attackers did it; images made on the base model; and BPDA, with the gradient of the unpruned
network or with pruning passed straight through at every layer. All have the same steps; an image that is misread
without an attack counts as misread under each. Attacks draw binomially where they average, answers are multinomial with
draws that no attack has seen.

*clean*: 1 and 100 passes, as many draws as activations (r = m) or twice as many, and, with ``--blocks``, pruning of
those activations alone. 100 passes draw binomially here: a quarter of the time.

*cost*, as ratios within one run: 100 passes together against 100 calls of one pass; the two samplings; peak memory.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Resources, build_defence
from mithridate.defenses.pruning import Sampling, prune
from mithridate.evaluation import wilson_interval
from mithridate.types import Epsilon, Images, Pixels, to_images

_BATCH = 64
_ATTACKED_AT_A_TIME = 32  # each with several passes, all of which the gradient needs
_MEMORY_IMAGES, _MEMORY_PASSES = 64, 20
_MEMORY_LIMIT_MB = 256  # what a run of several passes may take, as documented
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)

ATTACKS = {
    "PGD, mask constant, one pass a step": "sap:attack_passes=1,backward=masked",
    "PGD, mask constant, mean of 4 passes": "sap:attack_passes=4,backward=masked,sampling=binomial",
    "PGD on the base model (transfer)": "none",
    "BPDA, gradient of the unpruned network": "sap:attack_passes=4,backward=vanilla,sampling=binomial",
    "BPDA, straight through every layer": "sap:attack_passes=4,sampling=binomial",
}
"""What each attack's gradient goes through."""


def main(
    bundle: Path,
    dataset: str,
    part: str = "attacked",
    epsilon: str = "8/255",
    attack: str = "pgd40",
    fraction: float = 1.0,
    blocks: Annotated[
        str, typer.Option(help="for clean: also layers=BLOCKS, the activations inside residual blocks")
    ] = "",
    name: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle, verify=False)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=None, download=False, image_size=None, split="test")
    if part.startswith("memory-"):
        print(json.dumps(_memory(resources, data, part.removeprefix("memory-"))))
        return
    content: dict[str, Any] = {"bundle": opened.digest, "arch": resources.classifier.spec.arch, "dataset": data.spec}
    name = name or f"sap-{part}"
    if part == "cost":
        content["sampling"] = _cost_of_sampling()
        content["memory"] = _memory_apart()
        content["passes"] = _cost_of_passes(resources, data)
        results.write(name, content)
        return
    content["images"] = len(data)
    if part == "clean":
        rows = _clean(resources, data, blocks, seed)
    else:
        rows = _attacked(resources, data, {"epsilon": epsilon, "attack": attack, "fraction": fraction, "seed": seed})
    for found in rows:
        results.write(name, content | found)


# Accuracy


def _clean(resources: Resources, data: LabelledImages, blocks: str, seed: int) -> Iterator[dict[str, Any]]:
    """What is known so far, after every row."""
    texts = ["none", "sap:passes=1", "sap:passes=1,fraction=2", "sap:sampling=binomial"]
    texts.append("sap:fraction=2,sampling=binomial")
    if blocks:
        texts += [f"sap:passes=1,layers={blocks}", f"sap:sampling=binomial,layers={blocks}"]
    clean: dict[str, Any] = {}
    for text in texts:
        started, defence = time.monotonic(), build_defence(text, resources)
        clean[defence.name] = _share(_right(defence, torch.from_numpy(data.images), data.labels, seed + 1))
        _say(defence.name, started, clean[defence.name])
        yield {"clean": clean}


def _attacked(resources: Resources, data: LabelledImages, setting: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is known so far, after every attack."""
    pixels, seed = torch.from_numpy(data.images), setting["seed"]
    base, served = build_defence("none", resources), build_defence(f"sap:fraction={setting['fraction']}", resources)
    right = _right(served, pixels, data.labels, seed + 1)
    clean = {"none": _share(_right(base, pixels, data.labels, seed + 1)), served.name: _share(right)}
    worst, kept = right.copy(), np.flatnonzero(right)
    rows: list[dict[str, Any]] = []
    for title, text in ATTACKS.items():
        started, through = time.monotonic(), build_defence(_with(text, setting["fraction"]), resources)
        made = _craft(through, pixels[kept], torch.from_numpy(data.labels[kept]), setting)
        attacked, on_base = np.zeros_like(right), np.zeros_like(right)
        attacked[kept] = _right(served, made, data.labels[kept], seed + 1)
        on_base[kept] = _right(base, made, data.labels[kept], seed + 1)
        worst &= attacked
        rows.append({"attack": title, "through": through.name, "sap": _share(attacked), "none": _share(on_base)})
        _say(title, started, rows[-1]["sap"])
        yield setting | {"clean": clean, "attacked": rows, "worst case": _share(worst)}


def _with(text: str, fraction: float) -> str:
    return text if text == "none" else f"{text},fraction={fraction}"


def _craft(through: Defence, pixels: Pixels, labels: torch.Tensor, setting: dict[str, Any]) -> Pixels:
    pgd = parse_attack(setting["attack"], epsilon=Epsilon.parse(setting["epsilon"]))
    generator = torch.Generator().manual_seed(setting["seed"])

    def forward(images: Images) -> torch.Tensor:
        return through.surrogate(images, generator=generator, budget=Budget())

    parts = zip(pixels.split(_ATTACKED_AT_A_TIME), labels.split(_ATTACKED_AT_A_TIME), strict=True)
    return torch.cat([pgd.run(forward, some, wanted, generator=generator) for some, wanted in parts])


def _right(defence: Defence, pixels: Pixels, labels: np.ndarray, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    answers = [defence.predict(to_images(part), generator=generator, budget=Budget()) for part in pixels.split(_BATCH)]
    found: np.ndarray = torch.cat([answer.scores.argmax(1) for answer in answers]).numpy() == labels
    return found


def _share(right: np.ndarray) -> dict[str, Any]:
    correct = int(right.sum())
    interval = list(wilson_interval(correct, len(right)))
    return {"correct": correct, "accuracy": correct / len(right), "interval": interval}


def _say(title: str, started: float, share: dict[str, Any]) -> None:
    took = time.monotonic() - started
    print(f"{title}: {100 * share['accuracy']:.1f} %, {took:.0f} s", file=sys.stderr, flush=True)


# Cost


def _cost_of_passes(resources: Resources, data: LabelledImages, passes: int = 100) -> list[dict[str, Any]]:
    """Processor seconds of ``passes`` together, and in as many calls of one."""
    rows = []
    for count in (1, 4, 16):
        images = to_images(torch.from_numpy(data.images[:count]))
        for sampling in SAMPLINGS:
            many, one = (build_defence(f"sap:passes={p},sampling={sampling}", resources) for p in (passes, 1))
            together, apart = _in_turns(
                lambda: _ask(many, images),  # noqa: B023  (called at once)
                lambda: [_ask(one, images) for _ in range(passes)],  # noqa: B023
                repeats=max(1, 4 // count),
            )
            rows.append({"batch": count, "sampling": sampling, "together_s": together, "apart_s": apart})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _cost_of_sampling() -> list[dict[str, Any]]:
    """Nanoseconds an activation, eight rows of rectified normal numbers at r = m."""
    rows = []
    for size in (16_384, 65_536, 262_144, 802_816):
        layer = torch.randn(8, size, generator=torch.Generator().manual_seed(0)).relu()
        generators = [torch.Generator().manual_seed(row) for row in range(len(layer))]

        def sample(sampling: Sampling, layer: torch.Tensor = layer, own: Any = generators) -> Callable[[], object]:
            return lambda: prune(layer, fraction=1, sampling=sampling, generators=own)

        slow, fast = _in_turns(sample("multinomial"), sample("binomial"), repeats=9)
        rows.append(
            {"size": size, "multinomial_ns": 1e9 * slow / layer.numel(), "binomial_ns": 1e9 * fast / layer.numel()}
        )
    return rows


def _in_turns(first: Callable[[], object], second: Callable[[], object], *, repeats: int) -> tuple[float, float]:
    """Median processor seconds of either, measured in turns: those of a shared machine's clock vary with its load."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, taken in zip((first, second), times, strict=True):
            started = time.process_time()
            work()
            taken.append(time.process_time() - started)
    one, other = (float(np.median(taken)) for taken in times)
    return one, other


def _ask(defence: Defence, images: Images) -> torch.Tensor:
    return defence.predict(images, generator=torch.Generator().manual_seed(0), budget=Budget()).scores


def _memory_apart() -> dict[str, Any]:
    """Each sampling in a process of its own."""
    found: dict[str, Any] = {"limit_mb": _MEMORY_LIMIT_MB, "rows": []}
    for sampling in SAMPLINGS:
        command = [sys.executable, "-m", "benchmarks.sap", *sys.argv[1:], "--part", f"memory-{sampling}"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found["rows"].append(json.loads(answer.splitlines()[-1]))
    return found


def _memory(resources: Resources, data: LabelledImages, sampling: str) -> dict[str, Any]:
    """Resident MB before, and at most while, 64 images are answered with 20 passes: five runs of as many passes as
    fit, so that more passes would take no more."""
    images = to_images(torch.from_numpy(data.images[:_MEMORY_IMAGES]))
    _ask(build_defence("none", resources), images[:1])
    ctypes.CDLL(None).malloc_trim(0)  # or what loading freed would be used again, and not seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what it has now
    before = _status_mb("VmRSS")
    _ask(build_defence(f"sap:passes={_MEMORY_PASSES},sampling={sampling}", resources), images)
    return {
        "sampling": sampling,
        "images": len(images),
        "passes": _MEMORY_PASSES,
        "before_mb": before,
        "peak_mb": _status_mb("VmHWM"),
    }


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    typer.run(main)
