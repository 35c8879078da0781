"""What is noted about one request while it is answered, for its access line, its headers and its trace."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that this code runs for: every line that is logged meanwhile names it."""

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,128}")

_IDS = random.Random()  # noqa: S311 - no secret; seeded by the system, whatever a program does to `random`

PHASES = ("decode", "queue", "embed", "search", "adapt", "predict")
"""In the order in which they come."""


@dataclass(kw_only=True)
class Record:
    """``outcome``: ``ok``, why the request was shed, or the status of its error; None where nothing was to be
    predicted. ``decoding``: the ``time.perf_counter()`` at which the image's decoding began; ``timings_ms`` by phase,
    and ``total``: None before there is an answer.
    """

    defense: str | None = None
    outcome: str | None = None
    watched: bool = False
    """Whether somebody counts how it ends already."""
    decoding: float | None = None
    timings_ms: Mapping[str, float] | None = None
    batch: Mapping[str, int] = field(default_factory=dict)


def record_of(scope: Scope) -> Record:
    """The record of the request with this ASGI ``scope``; a new one where it has none."""
    state: dict[str, Any] = scope.setdefault("state", {})
    found: Record = state.setdefault("record", Record())
    return found


def identify(offered: str) -> str:
    """The id of a request: what the client calls it where that is plain, else a new one. Unique, and no secret:
    ``uuid4`` asks the system each time, which took a thirtieth of a loaded event loop.
    """
    return offered if _ACCEPTABLE.fullmatch(offered) else f"{_IDS.getrandbits(128):032x}"


def key_id(scope: Scope) -> str | None:
    """The id of the key that the request came with, once somebody has looked at it; never the key."""
    return getattr(scope.get("state", {}).get("caller"), "key_id", None)
