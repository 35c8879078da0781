"""Attacks that are written for one image, run on many in lock step: one ``ask`` for all that are still going on."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.attacks.black_box.session import Seen, Session, join
from mithridate.attacks.oracle import BlackBoxResult

Points = NDArray[np.uint8]
"""uint8 ``[P, C, H, W]``."""

Search = Generator[Points, Seen, None]
"""An attack on one image: gives points to ask for, gets what is said of them. It may be dropped at any of them: when
the image is misread in the ball, or when its budget is spent. What it has found is kept elsewhere."""

_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Target:
    """One image to attack: uint8 ``image`` ``[C, H, W]``, the ball's lowest and highest levels ``low`` and ``high``,
    the radius ``levels``, the ``margin`` of the image itself (NaN where only labels are seen), its own randomness, and
    whether a misread point in the ball ends the search, so that none has to be looked for further inside.
    """

    image: Points
    low: Points
    high: Points
    levels: int
    margin: float
    random: np.random.Generator
    ends_in_ball: bool

    def inside(self, points: NDArray[np.floating] | Points) -> Points:
        """Levels ``[..., C, H, W]`` to the nearest points of the ball."""
        return np.clip(np.rint(points), self.low, self.high).astype(np.uint8)

    def toward(self, point: Points, levels: int) -> Points:
        """``point``, every value moved to at most ``levels`` from the image."""
        image = self.image.astype(np.int16)
        return np.clip(point, image - levels, image + levels).astype(np.uint8)

    def distance(self, point: Points) -> int:
        """Levels of L-infinity."""
        return int(np.abs(point.astype(np.int16) - self.image).max())


def run_searches(
    session: Session, search: Callable[[Target], Search], *, seed: int, levels: int, random: bool
) -> BlackBoxResult:
    """Asks for every image itself, then runs ``search`` on each that was not misread.

    An image's randomness is that of ``seed`` and its row. Many points that are wanted at once are asked for in parts.
    """
    clean = session.start()
    low, high = (part.numpy() for part in session.ball())
    running: dict[int, _Running] = {}
    for row in session.rows.tolist():
        target = Target(
            image=session.pixels[row].numpy(),
            low=low[row],
            high=high[row],
            levels=levels,
            margin=float("nan") if clean.margins is None else float(clean.margins[row]),
            random=np.random.default_rng([seed, row]),
            ends_in_ball=not random,
        )
        running[row] = _Running(search(target))
    while running:
        left = (session.budget - session.spent).tolist()
        wanted = {row: one.wanted(left[row]) for row, one in running.items()}
        for row in [row for row, points in wanted.items() if not len(points)]:
            session.close(row)
            del wanted[row]
        if wanted:
            counts = [len(points) for points in wanted.values()]
            rows = torch.tensor(list(wanted)).repeat_interleave(torch.tensor(counts))
            seen = session.ask(rows, torch.from_numpy(np.concatenate(list(wanted.values()))))
            end = np.cumsum(counts).tolist()
            for row, start, stop in zip(wanted, [0, *end], end, strict=False):
                running[row].told(seen[start:stop])
        going = session.open.tolist()
        running = {row: one for row, one in running.items() if going[row]}
    return session.result()


class _Running:
    """A search, and what of its last wish is still to be asked."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._points: Points | None = next(search, None)
        self._told: list[Seen] = []
        self._asked = 0

    def wanted(self, left: int) -> Points:
        """At most ``left`` of the points it wants; none where it has ended."""
        if self._points is not None and self._told and self._asked == len(self._points):
            self._go_on()
        if self._points is None:
            return np.zeros((0,), dtype=np.uint8)
        return self._points[self._asked : self._asked + min(left, _AT_ONCE)]

    def told(self, seen: Seen) -> None:
        """What is said of those."""
        self._told.append(seen)
        self._asked += len(seen.misread)

    def _go_on(self) -> None:
        try:
            self._points = self._search.send(join(self._told))
        except StopIteration:
            self._points = None
        self._told, self._asked = [], 0
