"""All options of an RMC defence, whatever its scope."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mithridate.defenses.guard import GuardConfig
from mithridate.defenses.selection import SelectionConfig
from mithridate.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class RMCConfig:
    """Whom to learn from, how (the scope's own options), and what is let through."""

    selection: SelectionConfig
    adapting: Any
    guarding: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        guarded = [key for key in ("gate", "abstain") if getattr(self.guarding, key)]
        if self.selection.balanced and not self.selection.temperature and guarded:
            raise OptionError(
                f"rmc: {guarded[0]} asks what most neighbours are; with balanced=true and temperature=0 all classes "
                f"have as many: give {guarded[0]}=0 or a temperature"
            )
