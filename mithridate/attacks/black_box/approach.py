"""What attacks on labels begin with: a point that is misread, anywhere, and the way from there to the image."""

from __future__ import annotations

from collections.abc import Generator
from itertools import count

import numpy as np

from mithridate.attacks.black_box.lock_step import Points, Target
from mithridate.attacks.black_box.session import Seen

Finding = Generator[Points, Seen, Points]
"""Asks, and ends with a point ``[C, H, W]`` that is misread."""

_BLOCKS = 4


def starting_point(target: Target) -> Finding:
    """The first that is misread: a corner of the ball, the negative of the image, then noise of every pixel or of a few
    large blocks in turn, for as long as there are queries.
    """
    shape = target.image.shape
    for number in count():
        if number == 0:
            point = np.where(target.random.random(shape) < 0.5, target.low, target.high)
        elif number == 1:
            point = 255 - target.image
        elif number % 2:
            point = target.random.integers(0, 256, size=shape, dtype=np.uint8)
        else:
            blocks = target.random.integers(0, 256, size=(shape[0], _BLOCKS, _BLOCKS), dtype=np.uint8)
            down, across = (np.arange(size) * _BLOCKS // size for size in shape[1:])
            point = blocks[:, down][:, :, across]
        seen = yield point[None]
        if bool(seen.misread[0]):
            break
    return point


def nearest(target: Target, start: Points) -> Finding:
    """By bisection, the misread point with the fewest levels on the way from ``start``, which is misread, to the image.

    Where a misread point in the ball ends the search, nothing further inside is asked for.
    """
    best, high = start, target.distance(start)
    low = target.levels - 1 if target.ends_in_ball else 0
    while high - low > 1:
        middle = (low + high) // 2
        point = target.toward(start, middle)
        seen = yield point[None]
        if bool(seen.misread[0]):
            best, high = point, middle
        else:
            low = middle
    return best
