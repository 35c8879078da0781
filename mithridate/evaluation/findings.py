"""What an evaluation found, as plain data: what ``evaluate`` writes and the report shows.

Everything here goes to JSON by ``Evaluation.to_json``; there are no tensors in it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mithridate.evaluation.statistics import Interval, wilson_interval

SCHEMA = 1

AttackKind = Literal["transfer", "white-box", "adaptive", "black-box", "noise"]

Ruling = Literal["base", "gain", "no evidence of gain", "harmful", "not trustworthy"]
"""``base``: the undefended model itself. ``harmful``: the paired interval lies below zero. ``not trustworthy``: a gate
failed, so the numbers are no ground for any other word but ``harmful``."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """``right`` of ``n`` images, with a 95 % interval (Wilson)."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n if self.n else float("nan")

    @property
    def interval(self) -> Interval:
        return wilson_interval(self.right, self.n)


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A random defence asked many times: shares of images in [0, 1].

    ``expected``: mean over images of the share of right answers; ``majority``: images right in more than half of the
    answers; ``persistent``: mean of (1 - p)^m, p an image's share of wrong answers, for each m tries.
    """

    repeats: int
    expected: float
    majority: float
    persistent: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One defence under one attack. ``config``: the attack with all its settings. ``queries``: median an image, where
    it asks. ``steps``: gradient steps an image, where it takes any. ``right`` lists for each image whether it stood.
    Of each image, too: ``linf``, how many levels of 255 what was sent is away, and ``l2`` in units of [0, 1]; where the
    attack asks, how often it ``asked`` and the query that it saw misread first, ``broken_at`` (0: none).
    """

    attack: str
    kind: AttackKind
    config: str
    right: tuple[bool, ...]
    seconds: float
    steps: int | None = None
    queries: float | None = None
    repeated: Repeated | None = None
    linf: tuple[int, ...] = ()
    l2: tuple[float, ...] = ()
    asked: tuple[int, ...] = ()
    broken_at: tuple[int, ...] = ()

    @property
    def accuracy(self) -> Share:
        return Share(right=sum(self.right), n=len(self.right))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check of the evaluation itself. ``passed`` None: it does not apply, and ``evidence`` says why."""

    id: str
    name: str
    passed: bool | None
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Defence minus base on the same images: ``difference`` in [-1, 1] with a 95 % bootstrap ``interval``, ``gained``
    and ``lost`` images, and McNemar's exact two-sided ``p``."""

    n: int
    gained: int
    lost: int
    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True, kw_only=True)
class DefenceFindings:
    """One row of the matrix. ``worst`` says for each image whether it stood under everything, clean included.
    ``latency_factor``: time of an answer over the base model's, in this run. ``clean_cost`` and ``gain`` are None for
    the base model."""

    name: str
    description: str
    random: bool
    clean: tuple[bool, ...]
    cells: tuple[Cell, ...]
    worst: tuple[bool, ...]
    latency_factor: float
    gates: tuple[Gate, ...]
    clean_cost: Paired | None
    gain: Paired | None
    ruling: Ruling
    reasons: tuple[str, ...]
    """In words, why ``ruling``: one line each."""
    worst_repeated: Repeated | None = None
    """A random defence asked many times for the worst point of each image."""

    def cell(self, attack: str) -> Cell | None:
        """That attack's, if it was run."""
        return next((cell for cell in self.cells if cell.attack == attack), None)


@dataclass(frozen=True, kw_only=True)
class Point:
    """``y`` at ``x`` with its interval."""

    x: float
    y: float
    low: float
    high: float

    @classmethod
    def of(cls, x: float, share: Share) -> Point:
        """``share`` at ``x``."""
        low, high = share.interval
        return cls(x=x, y=share.value, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One plot: a line for each of ``series``. ``kind``: ``epsilon``, ``steps``, ``queries``, ``rounds``, ``eot``."""

    kind: str
    title: str
    x_label: str
    y_label: str
    log_x: bool
    series: dict[str, tuple[Point, ...]]


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """A neighbour, drawn: ``image`` is a PNG in base64."""

    image: str
    label: str
    adversarial: bool
    distance: float


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One attacked image: PNGs in base64 of it clean, attacked, and their difference amplified; what base and defence
    say of both; and the nearest neighbours before and after."""

    index: int
    truth: str
    defense: str
    attack: str
    clean: str
    attacked: str
    difference: str
    amplified: int
    said_clean: dict[str, str]
    said_attacked: dict[str, str]
    neighbors_clean: tuple[Exemplar, ...] = ()
    neighbors_attacked: tuple[Exemplar, ...] = ()


ExtraKind = Literal["unseen", "cost", "contamination", "index"]
"""``unseen``: attacks that the index holds no copies of; ``cost``: images that keep a defence busy; ``contamination``:
one client's images against another's answers; ``index``: exact against approximate search."""

Entry = str | int | float | Share | None
"""Of a table: None where there is nothing to say."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A question beside the matrix, answered in a table: each of ``rows`` has an entry for each of ``columns``.

    ``failed``: of the first column, those that did not pass what every one of them has to; None where there is nothing
    to pass.
    """

    kind: ExtraKind
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str
    failed: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A whole run."""

    command: str
    created: str
    seconds: float
    environment: dict[str, str]
    bundle: dict[str, str]
    """``name``, ``digest``, ``arch``, ``dataset``, ``exemplars``, ``index``."""
    dataset: dict[str, str]
    """``spec``, ``fingerprint``."""
    classes: tuple[str, ...]
    images: int
    labels: tuple[int, ...]
    epsilon: str
    seed: int
    suite: str
    defences: tuple[DefenceFindings, ...]
    curves: tuple[Curve, ...] = ()
    strips: tuple[Strip, ...] = ()
    extras: tuple[Extra, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left out or made smaller, in words."""
    effort: dict[str, float] = field(default_factory=dict)
    """How hard was attacked: ``rounds``, ``steps``, ``queries``, ``repeats``, ``gate_images``, ``minutes``."""
    service: dict[str, Any] | None = field(default=None)
    """A load test's summary, where one was given."""

    @property
    def base(self) -> DefenceFindings:
        return next(found for found in self.defences if found.ruling == "base")

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return {"schema": SCHEMA, **asdict(self)}
