"""What a deployment's own card says of its defences: it was measured by attacks that know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attack_client.client import Client, ServiceError
from mithridate.errors import InputError
from mithridate.evaluation.card import Card
from mithridate.evaluation.wording import points, printable

_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class OwnCard:
    """The card, or in words why there is none to be read."""

    card: Card | None = None
    why: str = "the service was not asked for it"

    def said_of(self, defense: str) -> str:
        """In one line. The card is the service's, which may not be a friend."""
        if self.card is None:
            return _line(self.why)
        entry = self.card.defense(defense)
        measured = (
            f"{self.card.images} images at {self.card.epsilon}, {self.card.suite} attacks, {self.card.created[:10]}"
        )
        if entry is None:
            return _line(f"does not list {defense} ({measured})")
        gain = entry.gain
        over = "" if gain is None else f", {points(gain.difference)} points ({points(gain.low)} to {points(gain.high)})"
        return _line(f"{entry.ruling}{over} ({measured})")

    def to_json(self, defense: str) -> dict[str, Any]:
        """The ruling by itself too; None where there is none."""
        entry = None if self.card is None else self.card.defense(defense)
        return {"ruling": None if entry is None else entry.ruling, "says": self.said_of(defense)}


def read_own_card(client: Client, digest: str) -> OwnCard:
    """Of the bundle of that ``digest``. Never raises: an attack does not depend on what its target says of itself."""
    try:
        card = client.card()
    except ServiceError as error:
        known = {404: "none, its bundle was not evaluated", 403: "not for this key to read"}
        return OwnCard(why=known.get(error.status, str(error)))
    except InputError as error:
        return OwnCard(why=f"not to be read: {error}")
    if card.bundle != digest:
        return OwnCard(why=f"of another bundle, {card.bundle}")
    return OwnCard(card=card)


def _line(text: str) -> str:
    return " ".join(printable(text[:_LONGEST]).split())
