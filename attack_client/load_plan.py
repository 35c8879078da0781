"""What a load test is asked to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attack_client.transfer import Crafted
from attack_client.wire import Target
from mithridate.datasets import LabelledImages
from mithridate.errors import OptionError
from mithridate.images import encode_png

MAX_RATE = 100_000.0
MAX_REQUESTS = 2_000_000
"""In one step: what memory should hold."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Encoded images, each clean or made by an attack, and in words where they are from."""

    clean: tuple[bytes, ...]
    adversarial: tuple[bytes, ...] = ()
    attack: str = ""
    described: dict[str, object]
    image_shape: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What to ask of whom. Either ``rates`` (open model) or ``clients`` (closed); several rates, or ``ramp``, look for
    the knee. ``adversarial_share`` in [0, 1] counts where there are adversarial images. ``defense`` None: the one the
    service answers with by default."""

    url: str
    rates: tuple[float, ...] = ()
    clients: int | None = None
    ramp: bool = False
    poisson: bool = False
    seconds: float = 10.0
    warmup_seconds: float = 1.0
    objective_ms: float = 250.0
    connections: int = 64
    timeout_seconds: float = 10.0
    adversarial_share: float = 0.5
    defense: str | None = None
    seed: int = 0
    command: str = ""
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        Target.parse(self.url, api_key=self.api_key)
        if bool(self.rates) == (self.clients is not None):
            raise OptionError("give either rates (open model) or a number of clients (closed model)")
        if self.clients is not None and (self.ramp or self.poisson):
            raise OptionError("a ramp and Poisson arrivals need rates; clients that wait for their answers set none")
        for rate in self.rates:
            _within("rate", rate, MAX_RATE, "requests a second")
        for name, count in (("clients", self.clients), ("connections", self.connections)):
            if count is not None and not 1 <= count <= 1000:
                raise OptionError(f"{name} {count} is out of range; allowed: 1 to 1000")
        _within("duration", self.seconds, 86_400, "seconds")
        _within("timeout", self.timeout_seconds, 86_400, "seconds")
        _within("objective", self.objective_ms, 86_400_000, "milliseconds")
        if not 0 <= self.warmup_seconds <= 86_400:
            raise OptionError(f"warm-up {self.warmup_seconds:g} is out of range; allowed: 0 to 86400 seconds")
        if not 0 <= self.adversarial_share <= 1:
            raise OptionError(f"adversarial share {self.adversarial_share:g} is out of range; allowed: 0 to 1")
        if self.objective_ms > 1000 * self.timeout_seconds:
            raise OptionError(
                f"an objective of {self.objective_ms:g} ms cannot be judged with a timeout of {self.timeout_seconds:g} "
                "s; choose a longer timeout"
            )
        for rate in self.rates:
            check_requests(self, rate)

    @property
    def model(self) -> str:
        return "closed" if self.clients else "open"


def check_requests(plan: LoadPlan, rate: float) -> None:
    """Raises OptionError for a step of no requests, or of more than memory should hold."""
    count, whole = round(rate * plan.seconds), round(rate * (plan.warmup_seconds + plan.seconds))
    if count < 1 or whole > MAX_REQUESTS:
        raise OptionError(
            f"{rate:g} requests/s for {plan.seconds:g} s, after {plan.warmup_seconds:g} s of warm-up, are "
            f"{whole if count else 0}; allowed: 1 to {MAX_REQUESTS} a step"
        )


def from_dataset(data: LabelledImages, crafted: Crafted | None = None, *, surrogate: str = "") -> Files:
    """The images of a data set as PNG, and their adversarial copies, made on ``surrogate``, where there are any."""
    described: dict[str, object] = {"source": data.spec, "images": len(data)}
    if crafted is None:
        return Files(clean=_encode(data.images), described=described, image_shape=data.image_shape)
    described |= {
        "attack": crafted.attack,
        "epsilon": str(crafted.epsilon),
        "surrogate": surrogate,
        "fooled_surrogate": int(crafted.fooled.sum()),
    }
    return Files(
        clean=_encode(data.images),
        adversarial=_encode(crafted.pixels),
        attack=crafted.attack,
        described=described,
        image_shape=data.image_shape,
    )


def from_files(paths: Sequence[Path]) -> Files:
    """Image files, sent as they are. Raises OptionError where one cannot be read."""
    contents = []
    for path in paths:
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise OptionError(f"cannot read {path}: {error.strerror}") from error
    described: dict[str, object] = {"source": ", ".join(path.name for path in paths), "images": len(paths)}
    return Files(clean=tuple(contents), described=described)


def _within(name: str, value: float, most: float, unit: str) -> None:
    if not (math.isfinite(value) and 0 < value <= most):
        raise OptionError(f"{name} {value:g} is out of range; allowed: above 0, up to {most:g} {unit}")


def _encode(images: NDArray[np.uint8]) -> tuple[bytes, ...]:
    return tuple(map(encode_png, images))
