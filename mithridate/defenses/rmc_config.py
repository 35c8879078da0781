"""All options of an RMC defence, whatever its scope."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mithridate.defenses.guard import GuardConfig
from mithridate.defenses.selection import SelectionConfig


@dataclass(frozen=True, kw_only=True)
class RMCConfig:
    """Whom to learn from, how (the scope's own options), and what is let through."""

    selection: SelectionConfig
    adapting: Any
    guarding: GuardConfig = field(default_factory=GuardConfig)
