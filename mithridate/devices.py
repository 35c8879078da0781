"""Where torch computes."""

from __future__ import annotations

import torch

from mithridate.errors import OptionError


def resolve_device(name: str) -> torch.device:
    """The device called ``name``. Raises OptionError where it cannot be used here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not a kind that is supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device {name!r} cannot be used here ({reason}); allowed: cpu, or cuda with a GPU"
        ) from error
    return device
