"""From a bundle on disk to defences that have answered once."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from mithridate.bundle import Bundle
from mithridate.defenses import Budget, Defence, Resources, build_defence, defence_name, describe_defence
from mithridate.devices import resolve_device, use_threads
from mithridate.errors import OptionError
from mithridate.types import to_images
from service.settings import Settings

logger = logging.getLogger("mithridate.service")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified bundle and its defences, by canonical name; ``default`` is one of them."""

    bundle: Bundle
    resources: Resources
    defences: dict[str, Defence]
    descriptions: dict[str, str]
    default: str

    def defence(self, text: str | None) -> Defence:
        """The defence a request names, or the default. Raises OptionError where it is not offered."""
        if text is None:
            return self.defences[self.default]
        found = self.defences.get(text) or self.defences.get(defence_name(text, self.resources))
        if found is None:
            raise OptionError(f"defence {text!r} is not offered here; allowed: {', '.join(self.defences)}")
        return found


def load(settings: Settings) -> Loaded:
    """Verifies and loads the bundle and answers once with every defence. Call it in the thread that will answer."""
    use_threads(settings.threads)
    bundle = Bundle.open(settings.bundle)
    resources = Resources.load(bundle, device=resolve_device(settings.device), allow_factory=settings.arch)
    offered = settings.offered if resources.classifier.has_head else _without_head(settings)
    made = {text: build_defence(text, resources) for text in offered}
    for text, defence in made.items():
        if getattr(defence, "offline", False):
            raise OptionError(f"{text} is for offline comparison only and cannot be served; leave it out of --offer")
    defences = {defence.name: defence for defence in made.values()}
    loaded = Loaded(
        bundle=bundle,
        resources=resources,
        defences=defences,
        descriptions={name: describe_defence(defence) for name, defence in defences.items()},
        default=made[settings.defense].name,
    )
    _warm(loaded)
    return loaded


def _warm(loaded: Loaded) -> None:
    """One answer from every defence, on an exemplar; a single step where the whole network is fine-tuned."""
    images = to_images(torch.from_numpy(loaded.resources.exemplars.pixels(torch.tensor([0])).numpy()))
    for defence in loaded.defences.values():
        started = time.perf_counter()
        defence.predict(images, generator=torch.Generator().manual_seed(0), budget=Budget(max_steps=1))
        logger.info("warmed %s in %.0f ms", defence.name, 1000 * (time.perf_counter() - started))


def _without_head(settings: Settings) -> tuple[str, ...]:
    """Leaves out what cannot be, but never what was asked for by name."""
    return tuple(name for name in settings.offered if name != "rmc" or name == settings.defense)
