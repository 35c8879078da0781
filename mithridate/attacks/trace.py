"""What an attack by gradients saw on its way: for gates, which ask whether it was a good one."""

from __future__ import annotations

import torch


class Trace:
    """Give an empty one to ``run``, one for each call. Without one nothing is kept and nothing is slower.

    A *run* is one climb from one start: ``restarts`` of them, times the targets of APGD-T. NaN stands where an image
    was not attacked (any more), because it was already misread.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._zeros: list[torch.Tensor] = []
        self._nans: list[torch.Tensor] = []

    @property
    def losses(self) -> torch.Tensor:
        """float64 ``[runs, steps + 1, N]`` on the CPU: the loss at each point the network was shown."""
        return torch.stack(self._losses).cpu()

    @property
    def zeros(self) -> torch.Tensor:
        """float64 ``[runs, steps, N]``: the share of an image's gradient entries that were exactly 0."""
        return torch.stack(self._zeros).cpu()

    @property
    def nans(self) -> torch.Tensor:
        """float64 ``[runs, steps, N]``: the share that were NaN or infinite. The attack takes these for 0."""
        return torch.stack(self._nans).cpu()

    def begin(self, *, steps: int, like: torch.Tensor) -> None:
        """A new run over as many images as ``like`` has."""
        for kept, length in ((self._losses, steps + 1), (self._zeros, steps), (self._nans, steps)):
            kept.append(torch.full((length, len(like)), torch.nan, dtype=torch.float64, device=like.device))

    def record(self, step: int, rows: torch.Tensor, losses: torch.Tensor, slope: torch.Tensor | None) -> None:
        """``losses`` ``[R]`` and gradients ``[R, C, H, W]`` (None at the last point) of the images ``rows``."""
        self._losses[-1][step, rows] = losses.detach().double()
        if slope is not None:
            flat = slope.flatten(1)
            self._zeros[-1][step, rows] = (flat == 0).double().mean(1)
            self._nans[-1][step, rows] = (~flat.isfinite()).double().mean(1)
