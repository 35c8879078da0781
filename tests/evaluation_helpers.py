"""Made-up evaluations, fair and ugly ones: what the report, the card and the service must be able to show."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mithridate.evaluation.findings import (
    AttackKind,
    Cell,
    Curve,
    DefenceFindings,
    Evaluation,
    Exemplar,
    Gate,
    Paired,
    Point,
    Repeated,
    Ruling,
    Strip,
)
from mithridate.evaluation.statistics import wilson_interval
from mithridate.images import encode_png

Flags = tuple[bool, ...]

ATTACKS: dict[str, tuple[AttackKind, float]] = {
    "transfer": ("transfer", 0.80),
    "pgd": ("white-box", 0.62),
    "fpa": ("adaptive", 0.60),
    "gmsa-avg": ("adaptive", 0.55),
    "gmsa-min": ("adaptive", 0.52),
    "lockstep": ("adaptive", 0.50),
    "hijack": ("adaptive", 0.46),
    "square": ("black-box", 0.70),
}
"""And what share of the clean images each leaves to a defence of strength 1."""

DEFENCES: dict[str, tuple[float, Ruling]] = {
    "none": (0.95, "base"),
    "rmc": (0.90, "no evidence of gain"),
    "rmc:scope=tail": (0.35, "harmful"),
    "prm": (1.25, "gain"),
    "sap": (0.0, "harmful"),
    "prm+rmc": (0.93, "not trustworthy"),
}

GATES = ("accuracy falls with epsilon", "twice the steps", "iterative beats single step", "epsilon ball on uint8")


def paired(base: Sequence[bool], mine: Sequence[bool]) -> Paired:
    gained = sum(m and not b for b, m in zip(base, mine, strict=True))
    lost = sum(b and not m for b, m in zip(base, mine, strict=True))
    n = len(base)
    difference = (gained - lost) / n
    spread = 1.96 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 1)) / n
    interval = (max(-1.0, difference - spread), min(1.0, difference + spread))
    flips, fewer = gained + lost, min(gained, lost)
    p = min(1.0, 2 * sum(math.comb(flips, k) for k in range(fewer + 1)) / 2**flips)
    return Paired(n=n, gained=gained, lost=lost, difference=difference, interval=interval, p=p)


def repeated(right: Sequence[bool]) -> Repeated:
    share = sum(right) / len(right)
    return Repeated(
        repeats=20, expected=share * 0.97, majority=share, persistent={1: share, 10: share * 0.6, 100: share * 0.2}
    )


def gates(ruling: Ruling) -> tuple[Gate, ...]:
    found = [Gate(id=f"G{i}", name=name, passed=True, evidence="moved 0.4 points") for i, name in enumerate(GATES, 1)]
    found.append(Gate(id="G9", name="null control", passed=None, evidence="the defence is not random"))
    if ruling == "not trustworthy":
        found[1] = Gate(id="G2", name=GATES[1], passed=False, evidence="doubling the steps took another 7.5 points")
    return tuple(found)


def findings(
    name: str, strength: float, ruling: Ruling, clean: Flags, base: DefenceFindings | None, **changes: Any
) -> DefenceFindings:
    """A defence that each attack leaves ``strength`` times what ATTACKS says."""
    rng = np.random.default_rng(len(name))
    luck = rng.random(len(clean))
    random = any(stage in name for stage in ("prm", "sap"))
    attacks = changes.pop("attacks", ATTACKS)
    cells = []
    for attack, (kind, left) in attacks.items():
        right = tuple(bool(c and u < left * strength) for c, u in zip(clean, luck, strict=True))
        cells.append(
            Cell(
                attack=attack,
                kind=kind,
                config=f"{attack}(epsilon=8/255, steps=40, restarts=2)",
                right=right,
                seconds=12.5,
                steps=400 if kind in ("white-box", "adaptive") else None,
                queries=913.5 if kind == "black-box" else None,
                repeated=repeated(right) if random else None,
            )
        )
    worst = tuple(bool(all(column)) for column in zip(clean, *(cell.right for cell in cells), strict=True))
    return replace(
        DefenceFindings(
            name=name,
            description="what it does, in a sentence",
            random=random,
            clean=clean,
            cells=tuple(cells),
            worst=worst,
            latency_factor=1.0 if base is None else 2.34,
            gates=gates(ruling),
            clean_cost=None if base is None else paired(base.clean, clean),
            gain=None if base is None else paired(base.worst, worst),
            ruling=ruling,
            reasons=() if base is None else (f"that is why it is {ruling}",),
        ),
        **changes,
    )


def picture(seed: int, size: int = 32, channels: int = 3) -> str:
    """A PNG in base64: blocks of colour."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (channels, 4, 4), dtype=np.uint8)
    return base64.b64encode(encode_png(small.repeat(size // 4, axis=1).repeat(size // 4, axis=2))).decode()


def strip(index: int, classes: Sequence[str], **changes: Any) -> Strip:
    def exemplars(start: int) -> tuple[Exemplar, ...]:
        return tuple(
            Exemplar(
                image=picture(start + i),
                label=classes[(start + i) % len(classes)],
                adversarial=bool(i % 2),
                distance=1.25 + i,
            )
            for i in range(5)
        )

    truth = classes[index % len(classes)]
    found = Strip(
        index=index,
        truth=truth,
        defense="rmc",
        attack="gmsa-min",
        clean=picture(index),
        attacked=picture(index),
        difference=picture(index + 100),
        amplified=16,
        said_clean={"none": truth, "rmc": truth},
        said_attacked={"none": truth, "rmc": classes[(index + 1) % len(classes)]},
        neighbors_clean=exemplars(10 * index),
        neighbors_attacked=exemplars(10 * index + 5),
    )
    return replace(found, **changes)


def curve(kind: str, xs: Sequence[float], names: Sequence[str], *, log_x: bool = False, n: int = 200) -> Curve:
    def points(order: int) -> tuple[Point, ...]:
        shares = [max(0.0, (0.9 - 0.05 * order) * math.exp(-i / (2.5 + 0.4 * order))) for i in range(len(xs))]
        intervals = [wilson_interval(round(share * n), n) for share in shares]
        return tuple(
            Point(x=float(x), y=round(y * n) / n, low=i.low, high=i.high)
            for x, y, i in zip(xs, shares, intervals, strict=True)
        )

    return Curve(
        kind=kind,
        title=f"Accuracy against {kind}",
        x_label={"epsilon": "epsilon, in 1/255"}.get(kind, kind),
        y_label="accuracy",
        log_x=log_x,
        series={name: points(order) for order, name in enumerate(names)},
    )


def synthetic(n: int = 200, **changes: Any) -> Evaluation:
    """An evaluation with one defence of each ruling."""
    rng = np.random.default_rng(5)
    truth = tuple(int(c) for c in rng.integers(0, 10, n))
    clean = tuple(bool(x) for x in rng.random(n) < 0.9)
    classes = tuple(f"class {i}" for i in range(10))
    base = findings("none", *DEFENCES["none"], clean, None)
    others = [findings(name, *DEFENCES[name], clean, base) for name in DEFENCES if name != "none"]
    names = list(DEFENCES)[:4]
    made = Evaluation(
        command="mithridate evaluate bundle --dataset 'cifar10[test,:200]' --attacks full --out report",
        created="2026-01-02T03:04:05+00:00",
        seconds=1234.5,
        environment={"mithridate": "0.1.0", "python": "3.12.1", "torch": "2.13.0", "cores": "2", "threads": "1"},
        bundle={
            "name": "cifar10-resnet20",
            "digest": "sha256:" + "0123456789abcdef" * 4,
            "arch": "cifar-resnet20",
            "dataset": "cifar10[train]",
            "exemplars": "100000",
            "index": "flat",
        },
        dataset={"spec": f"cifar10[test,:{n}]", "fingerprint": "sha256:" + "fedcba9876543210" * 4},
        classes=classes,
        images=n,
        labels=truth,
        epsilon="8/255",
        seed=0,
        suite="full",
        defences=(base, *others),
        curves=(
            curve("epsilon", [0, 1, 2, 4, 6, 8, 12, 16, 24, 32], names),
            curve("steps", [10, 20, 40, 80, 160], names, log_x=True),
            curve("queries", [0, 100, 1000, 5000], names, log_x=True),
            curve("rounds", list(range(11)), ["rmc", "rmc:scope=tail"]),
            curve("eot", [1, 5, 20, 50], ["prm", "sap"], log_x=True),
        ),
        strips=tuple(strip(i, classes) for i in range(4)),
        notes=("GMSA took 5 rounds instead of 10", "Square stopped at 1,000 queries"),
        service=LOAD,
    )
    return replace(made, **changes)


def load_step(rate: float, slow: float) -> dict[str, Any]:
    """Of ``LoadSummary.to_json``: what one step of a ramp found."""
    latency = {"count": 600, "mean": slow, "p50": slow, "p95": 2 * slow, "p99": 4 * slow, "p999": None, "max": 9 * slow}
    return {
        "set_rate": rate,
        "clients": None,
        "seconds": 12.0,
        "requests": int(12 * rate),
        "answered": int(12 * rate) - 3,
        "errors": {"http 429": 3, "timeout": 0},
        "sent_rate": rate * 0.998,
        "rate_deviation": -0.002,
        "answered_rate": min(rate, 180.0),
        "goodput_rate": min(rate, 170.0),
        "goodput_share": min(1.0, 170.0 / rate),
        "latency": latency,
        "service_time": latency,
        "kinds": {"clean": latency, "pgd": latency},
        "adversarial_to_clean": {"p99": {"value": 1.12, "low": 0.95, "high": 1.31}},
        "waited_share": 0.0,
        "generator": {"p50": 0.1, "p99": 0.6, "max": 1.0, "cpu_share": 0.3, "limited": False, "why": ""},
        "sustained": rate < 160,
        "histogram": {"edges": [1.0, 2.0], "counts": {"clean": [600]}},
    }


LOAD: dict[str, Any] = {
    "schema": 1,
    "command": "mithridate load http://127.0.0.1:8000 --ramp",
    "created": "2026-01-02T03:04:05+00:00",
    "url": "http://127.0.0.1:8000",
    "service": {"name": "cifar10-resnet20", "digest": "sha256:0123", "arch": "cifar-resnet20", "defense": "rmc"},
    "traffic": {"source": "cifar10[test,:200]", "images": 200, "attack": "pgd", "adversarial_share": 0.5},
    "model": "open",
    "arrivals": "poisson",
    "objective_ms": 100.0,
    "connections": 64,
    "timeout_seconds": 10.0,
    "warmup_seconds": 2.0,
    "seed": 0,
    "environment": {"cores": "2"},
    "steps": [load_step(rate, slow) for rate, slow in ((50, 4.0), (100, 5.5), (150, 9.0), (200, 60.0))],
    "knee": {"sustained": 150.0, "saturated": 200.0, "words": "Holds 150 requests a second; 200 are too many."},
    "notes": ["Service and generator shared two cores."],
}

HOSTILE = "<script>alert(1)</script> & \"'\x08 \U0001f40d naïve 猫 </style>"
"""What a class, a file or a service may be called."""

LONG = "prm:fraction=0.25,passes=10+rmc:scope=tail,neighbors=512,learning_rate=0.02,epochs=2,gate=0+sap:passes=100"


def ugly(n: int = 50, defences: int = 20, attacks: int = 20) -> Evaluation:
    """As wide and as strange as it may get."""
    kinds: list[AttackKind] = ["transfer", "white-box", "adaptive", "black-box", "noise"]
    table = {f"attack-{i}-with-a-rather-long-name": (kinds[i % 5], 1.0 - i / (attacks - 1)) for i in range(attacks)}
    table[HOSTILE] = ("adaptive", 0.5)
    everything, nothing = (True,) * n, (False,) * n
    base = findings("none", 1.0, "base", everything, None, attacks=table)
    names = [LONG, HOSTILE, *(f"rmc:neighbors={i},anchor=0.00{i}" for i in range(defences - 5))]
    others = [
        findings(name, i / len(names), "no evidence of gain", everything, base, attacks=table)
        for i, name in enumerate(names)
    ]
    always = findings("always", 99.0, "gain", everything, base, attacks=table, latency_factor=math.nan)
    never = findings("never", 0.0, "harmful", nothing, base, attacks=table, latency_factor=1234.5, gates=())
    classes = (HOSTILE, "", *(f"class {i}" for i in range(8)))
    series = [LONG, *(f"rmc:neighbors={i}" for i in range(11)), HOSTILE]
    odd = replace(
        curve("queries", [0, 1, 1e6], ["none"], log_x=True),
        title=HOSTILE,
        series={
            "none": (),
            LONG: (Point(x=1.0, y=math.nan, low=math.nan, high=math.nan),),
            "one": (Point(x=0.0, y=1.0, low=0.0, high=1.0),),
        },
    )
    return synthetic(
        n,
        defences=(base, *others, always, never),
        classes=classes,
        curves=(curve("epsilon", [0, 0.5, 1, 2, 4, 8, 16, 32, 64, 255], series), odd),
        strips=(
            strip(0, classes, defense=LONG, attack=HOSTILE, neighbors_clean=(), neighbors_attacked=()),
            strip(1, classes, clean=picture(1, 8, 1), attacked=picture(2, 8, 1), difference=picture(3, 8, 1)),
            strip(2, classes, clean=picture(1, 224), attacked=picture(2, 224), difference=picture(3, 224)),
        ),
        command=f"mithridate evaluate --defense '{HOSTILE}' " + "--attack x " * 80,
        notes=(HOSTILE,),
        service={HOSTILE: {"deep": {"deeper": [1, 2, None, math.nan]}}, "empty": {}, "none": None},
    )
