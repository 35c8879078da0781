"""What each key may use: requests a minute, and seconds of the engine a minute, as token buckets.

Time is ``time.monotonic()``: a clock that somebody sets back or forward changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.keys import Key

Clock = Callable[[], float]


class Bucket:
    """``per_minute`` tokens flow in each minute, and no more than that can be in it: whoever was silent for a minute
    may spend a minute's worth at once. Below zero it is in debt, which has to flow in before anything can be taken."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._most = max(1.0, per_minute)
        self._clock = clock
        self._level = self._most
        self._at = clock()

    @property
    def level(self) -> float:
        """How much is in it now."""
        now = self._clock()
        self._level = min(self._most, self._level + self._rate * max(0.0, now - self._at))
        self._at = max(self._at, now)
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` is in it, 0 where it is. More than it can hold counts as all that it can hold."""
        return max(0.0, min(amount, self._most) - self.level) / self._rate

    def take(self, amount: float) -> None:
        """Takes ``amount`` out, or with a negative one gives it back, never beyond what the bucket holds."""
        self._level = min(self._most, self.level - amount)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Which allowance has run out, and in how many seconds there is some again."""

    what: str
    seconds: float


@dataclass(kw_only=True)
class Allowance:
    """The two buckets of one key; None where it has no such limit."""

    key: Key
    requests: Bucket | None
    compute: Bucket | None

    def spent(self, compute_seconds: float = 0.0) -> Spent | None:
        """What forbids a request that takes ``compute_seconds``, None where nothing does."""
        if self.requests is not None and (wait := self.requests.wait(1.0)):
            what = f"{self.key.requests_per_minute:g} requests a minute"
            return Spent(what=what, seconds=wait)
        return self.compute_spent(compute_seconds)

    def compute_spent(self, seconds: float) -> Spent | None:
        """The same for its second part alone."""
        # A debt has to be paid; what is left over must be more than nothing, or the next one begins in debt again.
        if self.compute is not None and (wait := self.compute.wait(max(seconds, 1e-3))):
            what = f"{self.key.compute_seconds_per_minute:g} seconds of computing a minute"
            return Spent(what=what, seconds=wait)
        return None


@dataclass(kw_only=True)
class Allowances:
    """Those of all keys that have asked, made when a key first asks."""

    clock: Clock = time.monotonic
    _known: dict[str, Allowance] = field(default_factory=dict)

    def of(self, key: Key | None) -> Allowance | None:
        """Of ``key``; None where nothing limits it. A key whose limits were changed begins anew."""
        if key is None or (key.requests_per_minute is None and key.compute_seconds_per_minute is None):
            return None
        known = self._known.get(key.id)
        if known is None or known.key != key:
            known = self._known[key.id] = Allowance(
                key=key,
                requests=self._bucket(key.requests_per_minute),
                compute=self._bucket(key.compute_seconds_per_minute),
            )
        return known

    def _bucket(self, per_minute: float | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self.clock)


def whole_seconds(seconds: float) -> str:
    """For ``Retry-After``: at least 1, rounded up."""
    return str(max(1, math.ceil(seconds)))
