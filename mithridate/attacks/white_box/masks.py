"""Attacks that may change only some pixels: what a mask allows, at the start and in every step."""

from __future__ import annotations

import torch

from mithridate.attacks.balls import Ball
from mithridate.types import Images, Pixels


def allowed_by(mask: torch.Tensor | None, pixels: Pixels) -> torch.Tensor | None:
    """The mask where ``pixels`` are, as large as they; None where there is none. Raises ValueError for no mask."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool; seen: {mask.dtype}")
    try:
        return mask.to(pixels.device).broadcast_to(pixels.shape)
    except RuntimeError as error:
        raise ValueError(f"a mask of {list(mask.shape)} does not fit images of {list(pixels.shape)}") from error


def only(allowed: torch.Tensor | None, change: torch.Tensor) -> torch.Tensor:
    """0 where nothing may change."""
    return change if allowed is None else torch.where(allowed, change, 0.0)


def at(rows: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor | None:
    """What is allowed in the images ``rows``."""
    return None if allowed is None else allowed[rows]


def started(ball: Ball, allowed: torch.Tensor | None, generator: torch.Generator | None) -> Images:
    """A point drawn from the ball; the clean images without a ``generator``, and where nothing may change."""
    if generator is None:
        return ball.clean.clone()
    start = ball.start(generator)
    return start if allowed is None else torch.where(allowed, start, ball.clean)
