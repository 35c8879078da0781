"""How often and how long to try again."""

from __future__ import annotations

import email.utils
import random
import time
from dataclasses import dataclass, field

from mithridate.errors import OptionError

REFUSED = 429

LONGEST_WAIT_SECONDS = 300.0
"""At a time: a service that asks an attack for more is asked again by then."""

PATIENCE_SECONDS = 900.0
"""Of an attack that is refused and nothing else: then what it still wanted to ask is reported as not measured."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """After an answer of ``statuses``, or no connection: ``attempts`` in all, waiting as long as the service asks.

    Where it does not say, ``base_seconds`` doubled each time, with full jitter; at most ``cap_seconds`` either way.
    With ``patience_seconds`` a 429 is no failure but a turn to wait for: it does not count as an attempt, until so
    long after the first one.
    """

    attempts: int = 5
    base_seconds: float = 0.1
    cap_seconds: float = 10.0
    patience_seconds: float = 0.0
    statuses: frozenset[int] = frozenset({REFUSED, 503})
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise OptionError(f"attempts={self.attempts} is out of range; allowed: from 1")

    def wait(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to wait before attempt number ``attempt`` (the first retry is 2)."""
        asked = seconds_asked(retry_after)
        if asked is not None:
            return min(asked, self.cap_seconds)
        return self.rng.uniform(0, min(self.cap_seconds, self.base_seconds * 2.0 ** min(attempt - 1, 60)))


PATIENT = RetryPolicy(cap_seconds=LONGEST_WAIT_SECONDS, patience_seconds=PATIENCE_SECONDS)
"""Of an attack: what is refused must be asked again, or it would be missing from the result."""


class Tries:
    """Those of one request."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failed = self._refused = 0
        self._refused_since: float | None = None

    def next_wait(self, status: int | None, retry_after: str | None = None) -> float | None:
        """Seconds to wait after one that ended with ``status`` (None: no connection); None: that was the last."""
        policy = self._policy
        if status is not None and status not in policy.statuses:
            return None
        if status == REFUSED and policy.patience_seconds:
            return self._wait_for_a_turn(retry_after)
        self._failed += 1
        return policy.wait(self._failed + 1, retry_after) if self._failed < policy.attempts else None

    def _wait_for_a_turn(self, retry_after: str | None) -> float | None:
        now, policy = time.monotonic(), self._policy
        self._refused += 1
        self._refused_since = now if self._refused_since is None else self._refused_since
        # A service that asks for no wait at all is not to be asked in a circle.
        wait = max(policy.base_seconds, policy.wait(self._refused + 1, retry_after))
        return wait if now + wait - self._refused_since <= policy.patience_seconds else None


def seconds_asked(retry_after: str | None) -> float | None:
    """``Retry-After`` in either form, seconds or a date; None where it is neither."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
