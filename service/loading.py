"""From a bundle on disk to defences that have answered once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from mithridate.bundle import Bundle
from mithridate.defenses import (
    WITH_PRM,
    Budget,
    Defence,
    Resources,
    build_defence,
    defence_name,
    describe_defence,
    servable_defences,
)
from mithridate.defenses.options import unknown
from mithridate.devices import resolve_device, use_threads
from mithridate.errors import MithridateError, OptionError, UnknownDefenceError
from mithridate.evaluation.card import Card, read_card, warning
from mithridate.exemplars import ExemplarStore
from mithridate.types import to_images
from service.ceilings import check_ceilings
from service.settings import ALL, Settings

logger = logging.getLogger("mithridate.service")

_REPEATS, _SECONDS, _LONG = 9, 0.5, 5.0
"""So often a warm defence is timed at the most, and so long; once where an answer takes up to that long."""


class Named(Protocol):
    """A defence, or what stands for one of another process."""

    @property
    def name(self) -> str:
        """Its canonical name."""
        ...


D = TypeVar("D", bound=Named, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What an answer is reported with where another process has the model: the exemplars, memory-mapped."""

    exemplars: ExemplarStore
    tuning: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[D]):
    """A verified bundle and its defences, by canonical name; ``default`` is one of them.

    ``resources`` are Shown where another process answers, and the defences then only names. ``costs``: what an image
    takes, relative to the undefended model, None where that was not measured. ``card``: what an evaluation of this
    bundle found, None where there was none. ``seconds``: what one image alone took here, of a defence that fine-tunes
    a single step.
    """

    bundle: Bundle
    resources: Resources | Shown
    defences: Mapping[str, D]
    descriptions: Mapping[str, str]
    costs: Mapping[str, float | None]
    default: str
    card: Card | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def defence(self, text: str | None) -> D:
        """The defence a request names, or the default. Raises OptionError where it is not offered."""
        if text is None:
            return self.defences[self.default]
        try:
            found = self.defences.get(text) or self.defences.get(defence_name(text, self.resources))
        except UnknownDefenceError as error:  # which names all that there are
            raise OptionError(unknown("defence", text, self.defences)) from error
        if found is None:
            raise OptionError(f"defence {text!r} is not offered here; allowed: {', '.join(self.defences)}")
        return found


def load(settings: Settings) -> Loaded[Defence]:
    """Verifies and loads the bundle and answers once with every defence. Call it in the thread that will answer."""
    use_threads(settings.threads)
    bundle = Bundle.open(settings.bundle)
    resources = Resources.load(bundle, device=resolve_device(settings.device), allow_factory=settings.arch)
    if settings.defense == ALL:
        raise OptionError(f"defense={ALL} names no defence; it belongs to offer")
    made = {text: build_defence(text, resources) for text in _offered(settings, resources)}
    if ALL in settings.offer:
        made |= _all(resources)
    for text, defence in made.items():
        if getattr(defence, "offline", False):
            raise OptionError(f"{text} is for offline comparison only and cannot be served; leave it out of --offer")
    defences = {defence.name: defence for defence in made.values()}
    check_ceilings(defences.values(), settings)
    card, default = read_card(bundle.path, bundle.digest), made[settings.defense].name
    _say_what_it_is_worth(card, default)
    costs, took = _warm(resources, defences)
    return Loaded(
        bundle=bundle,
        resources=resources,
        defences=defences,
        descriptions={name: describe_defence(defence) for name, defence in defences.items()},
        costs=costs,
        default=default,
        card=card,
        seconds=took,
    )


def _say_what_it_is_worth(card: Card | None, default: str) -> None:
    """Once, to the operator; gently where nobody has measured."""
    said = warning(card, default)
    if said is not None:
        logger.log(logging.INFO if card is None else logging.WARNING, said)


def _warm(resources: Resources, defences: dict[str, Defence]) -> tuple[dict[str, float | None], dict[str, float]]:
    """One answer from every defence, on an exemplar; a single step where the whole network is fine-tuned. Then what a
    warm one costs relative to the undefended model: none that is fine-tuned, whose single step says nothing; and the
    seconds.
    """
    images = to_images(torch.from_numpy(resources.exemplars.pixels(torch.tensor([0])).numpy()))

    def seconds(defence: Defence) -> float:
        budget = Budget(max_steps=1) if _fine_tunes(defence) else Budget()
        started = time.perf_counter()
        defence.predict(images, generator=torch.Generator().manual_seed(0), budget=budget)
        return time.perf_counter() - started

    base = build_defence("none", resources)
    seconds(base)
    costs: dict[str, float | None] = {}
    took: dict[str, float] = {}
    for name, defence in defences.items():
        first = seconds(defence)
        logger.info("warmed %s in %.0f ms", name, 1000 * first)
        # The first answer may have loaded a library: it counts only where a second one would keep users waiting.
        repeats = max(int(first < _LONG), min(_REPEATS, int(_SECONDS / first)))
        pairs = [(seconds(defence), seconds(base)) for _ in range(repeats)] or [(first, seconds(base))]
        mine, plain = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
        costs[name], took[name] = None if _fine_tunes(defence) else mine / plain, mine
    return costs, took


def _fine_tunes(defence: Defence) -> bool:
    return "scope=" in defence.name


def _offered(settings: Settings, resources: Resources) -> list[str]:
    """What was asked for by name. Of what was not, without what cannot be, and with what the bundle has beside."""
    if settings.offer_is_explicit:
        return [text for text in settings.offered if text != ALL]
    usual = [*settings.offered, *(WITH_PRM if resources.prms else ())]
    return [text for text in usual if "rmc" not in text or text == settings.defense or resources.classifier.has_head]


def _all(resources: Resources) -> dict[str, Defence]:
    """Whatever this bundle and its network allow."""
    made = {}
    for text in servable_defences(resources):
        try:
            made[text] = build_defence(text, resources)
        except MithridateError as error:
            logger.warning("%s is not offered: %s", text, error)
    return made
