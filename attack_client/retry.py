"""How often and how long to try again."""

from __future__ import annotations

import email.utils
import random
import time
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """After 429, 503 or no connection: ``attempts`` in all, waiting as long as the service asks.

    Where it does not say, ``base_seconds`` doubled each time, with full jitter, at most ``cap_seconds``.
    """

    attempts: int = 5
    base_seconds: float = 0.1
    cap_seconds: float = 10.0
    rng: random.Random = field(default_factory=random.Random)

    def wait(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to wait before attempt number ``attempt`` (the first retry is 2)."""
        asked = _seconds(retry_after)
        if asked is not None:
            return min(asked, self.cap_seconds)
        return self.rng.uniform(0, min(self.cap_seconds, self.base_seconds * 2 ** (attempt - 1)))


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` in either form: seconds or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
