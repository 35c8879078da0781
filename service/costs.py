"""What a defence takes of the engine's time: estimated from what it took, of late, for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_UNKNOWN_SECONDS = 0.05
_KEEP = 0.9
"""How much of a moving average one more image leaves of it."""
_VALID_SECONDS = 60.0
"""So long what was measured counts as what it takes at the least: the machine may have been slow just then."""


@dataclass(kw_only=True)
class _Cost:
    image_seconds: float
    least: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By number of images: the quickest run of so many, and when that was."""


class Costs:
    """Estimates by defence; whoever serves tells them what was measured."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Cost] = {}

    def seed(self, image_seconds: Mapping[str, float]) -> None:
        """What was measured at the start, in seconds for an image alone; it replaces whatever was known."""
        self._known = {name: _Cost(image_seconds=seconds) for name, seconds in image_seconds.items()}

    def estimate(self, defence: str, images: int) -> float:
        """Seconds, on average of late."""
        known = self._known.get(defence)
        return images * (_UNKNOWN_SECONDS if known is None else known.image_seconds)

    def least(self, defence: str, images: int) -> float:
        """Seconds that it will hardly take less than: as long as no more images took not long ago, at their
        quickest."""
        known, now = self._known.get(defence), self._clock()
        if known is None:
            return 0.0
        fewer = [seconds for n, (seconds, at) in known.least.items() if n <= images and now - at < _VALID_SECONDS]
        return max(fewer, default=0.0)

    def ran(self, defence: str, *, images: int, seconds: float) -> None:
        """One run of the engine: ``seconds`` for ``images`` together."""
        known = self._known.setdefault(defence, _Cost(image_seconds=seconds / images))
        known.image_seconds += (1 - _KEEP**images) * (seconds / images - known.image_seconds)
        now = self._clock()
        quickest, at = known.least.get(images, (seconds, now))
        known.least[images] = (seconds if now - at >= _VALID_SECONDS else min(seconds, quickest), now)

    def ran_at_least(self, defence: str, *, images: int, seconds: float) -> None:
        """One run that was cut off after ``seconds``: the average is no longer below that."""
        known = self._known.setdefault(defence, _Cost(image_seconds=0.0))
        known.image_seconds = max(known.image_seconds, seconds / images)
