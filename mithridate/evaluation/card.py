"""What a bundle's defences were found to be worth: written beside it by ``mithridate evaluate``, served with it."""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

import mithridate
from mithridate.errors import BundleError
from mithridate.evaluation.findings import DefenceFindings, Evaluation, Paired, Ruling
from mithridate.evaluation.statistics import wilson_interval
from mithridate.evaluation.wording import applied_gates, failed_gates, ruling_in_words, stated_ruling

CARD = "card.json"
"""Not listed in the manifest: it comes after the bundle, and names the bundle's digest."""

_SUITES = {"standard": 1, "adaptive": 2, "full": 3}

_NOTABLE_LOSS = 0.01
"""A default that is further below its base is warned of, whatever its interval."""

_Unit = Annotated[float, Field(ge=0, le=1)]
_Signed = Annotated[float, Field(ge=-1, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)  # what a later version adds is ignored: the client reads cards too


class Measured(_Frozen):
    """``right`` of ``images``, and what share that is with its 95 % interval (Wilson)."""

    right: Annotated[int, Field(ge=0)]
    images: Annotated[int, Field(ge=0)]
    accuracy: _Unit | None = Field(description="null where there were no images")
    low: _Unit
    high: _Unit

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.right > self.images:
            raise ValueError(f"{self.right} right of {self.images} images")
        return self


class Difference(_Frozen):
    """Defence minus base on the same images, in [-1, 1], with a 95 % interval; McNemar's exact two-sided ``p``."""

    difference: _Signed
    low: _Signed
    high: _Signed
    p: _Unit
    gained: Annotated[int, Field(ge=0)]
    lost: Annotated[int, Field(ge=0)]


class CardDefense(_Frozen):
    """One defence: ``worst_case`` is what stood under every attack, image by image."""

    name: str
    random: bool
    clean: Measured
    worst_case: Measured
    gain: Difference | None = Field(description="of the worst case over the base model's; null for the base model")
    clean_cost: Difference | None = Field(description="of clean accuracy over the base model's; null for the base")
    ruling: Ruling
    reasons: tuple[str, ...]
    gates_passed: int
    gates_failed: tuple[str, ...]
    latency_factor: FiniteFloat | None = Field(description="over the base model's time; null where not measured")


class CardData(_Frozen):
    """The images it was measured on."""

    spec: str
    fingerprint: str


class Card(_Frozen):
    """The verdict on a bundle, in short."""

    schema_version: Literal[1] = 1
    bundle: str = Field(description="the digest of the bundle it is about")
    mithridate: str = Field(description="the version that measured")
    created: str
    command: str | None = Field(default=None, description="null where served: it names files of another machine")
    dataset: CardData
    images: Annotated[int, Field(ge=0)]
    epsilon: str
    suite: str
    effort: dict[str, float] | None = Field(
        default=None,
        description="rounds, steps, queries and so on that were asked for; null where the card does not say",
    )
    seed: int
    defenses: tuple[CardDefense, ...]

    def defense(self, name: str) -> CardDefense | None:
        """That one's, if it was evaluated."""
        return next((entry for entry in self.defenses if entry.name == name), None)


def make_card(evaluation: Evaluation) -> Card:
    """What is worth keeping beside the bundle."""
    return Card(
        bundle=evaluation.bundle["digest"],
        mithridate=evaluation.environment.get("mithridate", mithridate.__version__),
        created=evaluation.created,
        command=evaluation.command,
        dataset=CardData(
            spec=evaluation.dataset.get("spec", ""), fingerprint=evaluation.dataset.get("fingerprint", "")
        ),
        images=evaluation.images,
        epsilon=evaluation.epsilon,
        suite=evaluation.suite,
        effort=evaluation.effort or None,
        seed=evaluation.seed,
        defenses=tuple(_entry(found) for found in evaluation.defences),
    )


def weaker(new: Card, old: Card) -> tuple[str, ...]:
    """By what ``new`` was measured with less than ``old``, in words; empty where by nothing."""
    found = []
    if _SUITES.get(new.suite, 0) < _SUITES.get(old.suite, 0):
        found.append(f"{new.suite} attacks, not {old.suite}")
    if new.images < old.images:
        found.append(f"{new.images} images, not {old.images}")
    if Fraction(new.epsilon) < Fraction(old.epsilon):
        found.append(f"epsilon {new.epsilon}, not {old.epsilon}")
    before, now = old.effort or {}, new.effort or {}
    found += [
        f"{name.replace('_', ' ')} {now[name]:g}, not {value:g}"
        for name, value in before.items()
        if now.get(name, value) < value
    ]
    return tuple(found)


def merge(new: Card, old: Card) -> Card:
    """``new``, with the defences that only ``old`` has where the same was measured in the same way."""
    same = ("bundle", "mithridate", "dataset", "images", "epsilon", "suite", "effort", "seed")
    if any(getattr(new, name) != getattr(old, name) for name in same):
        return new
    kept = tuple(entry for entry in old.defenses if new.defense(entry.name) is None)
    return new.model_copy(update={"defenses": (*new.defenses, *kept)})


def _entry(found: DefenceFindings) -> CardDefense:
    failed = failed_gates(found)
    return CardDefense(
        name=found.name,
        random=found.random,
        clean=_measured(found.clean),
        worst_case=_measured(found.worst),
        gain=_difference(found.gain),
        clean_cost=_difference(found.clean_cost),
        ruling=stated_ruling(found),
        reasons=found.reasons,
        gates_passed=len(applied_gates(found)) - len(failed),
        gates_failed=tuple(gate.name for gate in failed),
        latency_factor=found.latency_factor if math.isfinite(found.latency_factor) else None,
    )


def _measured(right: tuple[bool, ...]) -> Measured:
    low, high = wilson_interval(sum(right), len(right))
    accuracy = sum(right) / len(right) if right else None
    return Measured(right=sum(right), images=len(right), accuracy=accuracy, low=low, high=high)


def _difference(paired: Paired | None) -> Difference | None:
    if paired is None:
        return None
    low, high = paired.interval
    return Difference(
        difference=paired.difference, low=low, high=high, p=paired.p, gained=paired.gained, lost=paired.lost
    )


def write_card(path: Path, card: Card) -> None:
    """Puts it beside the bundle at ``path``, all of it or nothing. Raises BundleError where it cannot be."""
    part = path.parent / f".{path.name}.{CARD}.{os.getpid()}"  # not inside: an unlisted file would spoil the bundle
    try:
        part.write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        part.replace(path / CARD)
    except OSError as error:
        raise BundleError(f"the card cannot be written into {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_card(path: Path, digest: str) -> Card | None:
    """Of the bundle at ``path``, or None where it was not evaluated. Raises BundleError for one that is broken or
    that is not this bundle's: a wrong verdict is worse than none.
    """
    file = path / CARD
    try:
        card = Card.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        raise BundleError(f"{file} is not a valid card; remove it or run mithridate evaluate again") from error
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from error
    if card.bundle != digest:
        raise BundleError(f"{file} is of another bundle ({card.bundle[:19]}...); remove it or evaluate this one")
    return card


def summary(card: Card) -> str:
    """One line: what was measured, and every defence's ruling."""
    ruled = "; ".join(f"{entry.name}: {entry.ruling}" for entry in card.defenses if entry.ruling != "base")
    return f"{card.created}, {card.images} images at {card.epsilon}: {ruled or 'the base model alone'}"


def warning(card: Card | None, defense: str) -> str | None:
    """What whoever serves ``defense`` by default should hear: one line, or None where nothing speaks against it."""
    if card is None:
        return "this bundle was not evaluated: what its defences are worth is not known; run mithridate evaluate"
    entry = card.defense(defense)
    if entry is None:
        return f"the default defence {defense} is not on this bundle's card: what it is worth is not known"
    below = entry.gain is not None and entry.gain.difference < -_NOTABLE_LOSS
    if not below and entry.ruling not in ("harmful", "not trustworthy"):
        return None
    said = [ruling_in_words(entry.ruling)]
    if below and entry.gain is not None:
        said.append(f"{-100 * entry.gain.difference:.1f} points below its base in the worst case")
    if entry.gates_failed:
        said.append(f"failed: {', '.join(entry.gates_failed)}")
    return f"the default defence {defense}, by this bundle's card: {'; '.join(said)}"
