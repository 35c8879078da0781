"""What a campaign is to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attack_client.answers import BundleDescription
from attack_client.black_box import BlackBoxPlan
from attack_client.transfer import Surrogate, check_radius
from attack_client.wire import check_key
from mithridate.datasets import LabelledImages
from mithridate.errors import OptionError
from mithridate.types import Epsilon

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class CampaignPlan:
    """What to send where. ``defenses`` empty: the one the service answers with by default.

    ``attacks`` are made on the ``surrogate`` and sent once; ``black_box`` ones ask the service itself.
    """

    url: str
    data: LabelledImages
    epsilon: Epsilon
    rate: float
    surrogate: Surrogate | None = None
    attacks: Sequence[str] = ()
    black_box: BlackBoxPlan | None = None
    defenses: Sequence[str] = ()
    seed: int = 0
    timeout_seconds: float = 60.0
    command: str = ""
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_radius(self.epsilon)
        if self.api_key is not None:
            check_key(self.api_key)
        if not 0 < self.timeout_seconds <= 86_400:
            raise OptionError(
                f"timeout {self.timeout_seconds:g} is out of range; allowed: above 0, up to 86400 seconds"
            )
        if not 0 < self.rate <= 100_000:
            raise OptionError(f"rate {self.rate:g} is out of range; allowed: above 0, up to 100000 requests a second")
        if len(set(self.names)) != len(self.names):
            raise OptionError(f"an attack is named twice in {', '.join(self.names)}; name each once")
        if not self.names:
            raise OptionError("no attack was named; give at least one --attack, as in pgd20")
        if self.attacks and self.surrogate is None:
            raise OptionError(f"{self.attacks[0]} is made on a model that the attacker holds; give one")

    @property
    def names(self) -> tuple[str, ...]:
        """All attacks."""
        return (*self.attacks, *(self.black_box.attacks if self.black_box else ()))

    def identity(self, service: BundleDescription, defenses: Sequence[str]) -> dict[str, Any]:
        """All that decides what is asked, as JSON. Not the address, the rate or the patience: those may change."""
        asked = self.black_box
        return {
            "schema": _SCHEMA,
            "bundle": service.digest,
            "dataset": self.data.fingerprint(),
            "epsilon": str(self.epsilon),
            "seed": self.seed,
            "defenses": list(defenses),
            "surrogate": None if self.surrogate is None else self.surrogate.source,
            "transfer": list(self.attacks),
            "black_box": [] if asked is None else list(asked.attacks),
            "black_box_epsilon": None if asked is None else str(asked.epsilon),
            "queries": None if asked is None else asked.queries,
            "track": None if asked is None else asked.track,
            "images_a_request": None if asked is None else asked.images_a_request,
            "scorings": None if asked is None else asked.scorings,
        }
