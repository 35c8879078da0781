"""From the API's answers to HTML: what the templates are given, and the templates themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mithridate.evaluation import wording
from mithridate.exemplars import CLEAN
from service.lab import MAX_LEVELS, LabResponse
from service.lab_defence import STEPS
from service.loading import Loaded
from service.page.pictures import SMALL, Thumbnail, difference, thumbnails
from service.schemas import ImagePrediction, PredictResponse, Timings

SHOWN = 12
"""Neighbours of a kind that are shown."""
_VOTES = 6
"""Labels of neighbours that are shown one by one."""

_STOPPED = {
    "converged": "converged",
    "patience": "the held-out loss fell no further",
    "max_steps": "reached its ceiling of steps",
    "deadline": "the deadline passed",
    "cancelled": "cancelled",
}
_PHASES = {
    "queue": "waiting for the engine",
    "decode": "decoding",
    "embed": "embedding",
    "search": "searching",
    "adapt": "adapting",
    "predict": "predicting",
}
_STATIC = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}


@dataclass(frozen=True, kw_only=True)
class StaticFile:
    """One of the page's own files; ``tag`` changes with its content."""

    content: bytes
    media_type: str
    tag: str


def static_files() -> dict[str, StaticFile]:
    """The style and the script, from the package."""
    files = {}
    for name, media_type in _STATIC.items():
        content = (resources.files("service.page") / "static" / name).read_bytes()
        files[name] = StaticFile(content=content, media_type=media_type, tag=sha256(content).hexdigest()[:12])
    return files


class Views:
    """Renders. Labels, names and errors come from bundles and clients that may not be friends: all is escaped."""

    def __init__(self, static: dict[str, StaticFile]) -> None:
        self._environment = Environment(
            loader=PackageLoader("service.page"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        said = ("percent", "span", "points", "ruling_in_words")
        self._environment.globals.update({name: getattr(wording, name) for name in said})
        self._environment.globals.update(
            tags={name: file.tag for name, file in static.items()},
            stopped=_STOPPED,
            milliseconds=milliseconds,
            max_levels=MAX_LEVELS,
            lab_steps=STEPS,
        )

    def page(self, **content: Any) -> str:
        """The whole page."""
        return self._render("page", **content)

    def about(self, **content: Any) -> str:
        """What the page says of the bundle."""
        return self._render("about", **content)

    def answer(self, **content: Any) -> str:
        """The answer to one image."""
        return self._render("answer", **content)

    def lab(self, **content: Any) -> str:
        """What the lab found."""
        return self._render("lab_answer", **content)

    def _render(self, name: str, **content: Any) -> str:
        return wording.printable(self._environment.get_template(f"{name}.html.jinja").render(content))


def about(loaded: Loaded[Any], *, visible: bool, choice: bool) -> dict[str, Any]:
    """Bundle, defences, card and samples; without a ``choice`` the default defence alone."""
    manifest, exemplars = loaded.bundle.manifest, loaded.resources.exemplars
    channels, height, width = manifest.image_shape
    return {
        "bundle": manifest.name,
        "classes": len(manifest.classes),
        "width": width,
        "height": height,
        "colour": "colour" if channels == 3 else "grey",
        "exact": manifest.resize == "exact",
        "exemplars": len(manifest.layout),
        "copies": manifest.layout.copies,
        "digest": loaded.bundle.digest,
        "default": loaded.default,
        "defences": [
            {"name": name, "text": text, "cost": _cost(loaded.costs.get(name))}
            for name, text in loaded.descriptions.items()
            if choice or name == loaded.default
        ],
        "card": loaded.card,
        "samples": _samples(loaded) if visible and len(exemplars) else [],
        "small": max(height, width) <= SMALL,
    }


def answer(loaded: Loaded[Any], response: PredictResponse, *, visible: bool) -> dict[str, Any]:
    """One image's answer and what moved it."""
    prediction = response.predictions[0]
    shape = loaded.bundle.manifest.image_shape
    return {
        "answer": response,
        "prediction": prediction,
        "verdict": _verdict(response.defense, prediction),
        "groups": _groups(loaded, prediction, visible=visible),
        "votes": _votes(prediction),
        "phases": phases(response.timings_ms),
        "small": max(shape[1:]) <= SMALL,
    }


def lab(loaded: Loaded[Any], found: LabResponse) -> dict[str, Any]:
    """Base and defence, before and after an attack."""
    shape = loaded.bundle.manifest.image_shape
    address, factor = difference(found.clean_png, found.adversarial_png, shape[0])
    return {
        "lab": found,
        "outcome": _outcome(found),
        "difference": address,
        "factor": factor,
        "small": max(shape[1:]) <= SMALL,
    }


def phases(timings: Timings) -> list[dict[str, Any]]:
    """Where the time went, with each phase's share and where it begins in the whole, in percent."""
    total, begins, listed = max(timings.total, 1e-9), 0.0, []
    known = {name: getattr(timings, name) for name in _PHASES}
    rest = max(0.0, timings.total - sum(known.values()))
    for name, spent in {**known, "other": rest}.items():
        share = min(100.0 - begins, 100 * spent / total)
        listed.append(
            {"name": name, "text": _PHASES.get(name, "everything else"), "ms": spent, "share": share, "begins": begins}
        )
        begins += share
    return listed


def milliseconds(value: float) -> str:
    """``0.4 ms``, ``12 ms``, ``1.2 s``."""
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms" if value >= 0.05 else "<0.1 ms" if value else "0 ms"


def _cost(factor: float | None) -> str:
    if factor is None or not math.isfinite(factor):
        return "as many steps as it needs"
    return "\u00d71" if factor < 1.05 else f"\u00d7{factor:.0f}" if factor >= 10 else f"\u00d7{factor:.1f}"


def _samples(loaded: Loaded[Any]) -> list[dict[str, Any]]:
    """One clean exemplar of each of the first classes."""
    exemplars, classes = loaded.resources.exemplars, loaded.bundle.manifest.classes
    clean = exemplars.labels[: exemplars.clean_count].cpu()
    chosen = []
    for index, label in enumerate(classes[:SHOWN]):
        found = (clean == index).nonzero()
        if len(found):
            chosen.append({"exemplar": int(found[0]), "label": label})
    return chosen


def _verdict(defense: str, prediction: ImagePrediction) -> dict[str, str]:
    said, base = prediction.label, prediction.undefended
    if prediction.abstained:
        text = f"Its best guess is {said}, but it does not stand by it: do not act on this answer."
        return {"kind": "abstains", "title": f"{defense} abstains", "text": text}
    if prediction.suspicious:
        text = "Images that were tampered with tend to do this; so do ambiguous ones."
        other = f"the base model says {base.label}" if base else "the base model differs"
        return {"kind": "suspicious", "title": f"Suspicious: {other}, {defense} says {said}", "text": text}
    if defense == "none":
        text = "No defence was asked, so nothing was compared."
        return {"kind": "plain", "title": f"The base model says {said}", "text": text}
    text = "Nothing speaks against this image. That is not proof that it was left alone."
    return {"kind": "agrees", "title": f"Both models say {said}", "text": text}


def _groups(loaded: Loaded[Any], prediction: ImagePrediction, *, visible: bool) -> list[dict[str, Any]]:
    groups = []
    everybody = prediction.neighbors or []
    for kind, of_kind in (
        ("clean", [neighbor for neighbor in everybody if neighbor.copy_name == CLEAN]),
        ("poisoned", [neighbor for neighbor in everybody if neighbor.copy_name != CLEAN]),
    ):
        shown: list[Thumbnail] = thumbnails(loaded.resources.exemplars, of_kind[:SHOWN], visible=visible)
        groups.append({"kind": kind, "count": len(of_kind), "shown": shown, "more": len(of_kind) - len(shown)})
    return groups if everybody else []


def _votes(prediction: ImagePrediction) -> list[dict[str, Any]]:
    """How the neighbours are labelled, most first."""
    if prediction.adaptation is None:
        return []
    counts = list(prediction.adaptation.neighbor_labels.items())
    if len(counts) > _VOTES + 1:
        counts = [*counts[:_VOTES], ("others", sum(count for _, count in counts[_VOTES:]))]
    total = max(1, sum(count for _, count in counts))
    return [{"label": label, "count": count, "share": 100 * count / total} for label, count in counts]


def _outcome(found: LabResponse) -> dict[str, str]:
    label = found.label.label
    assert found.adversarial.undefended is not None  # the caller may explain
    base, defended = found.adversarial.undefended.label, found.adversarial.label
    if base == label and defended == label:
        text = "Both still say what they said. A larger epsilon, or the other attack, may move them."
        return {"kind": "plain", "title": f"Neither is fooled: both say {label}", "text": text}
    if found.defense == "none":
        return {
            "kind": "harmed",
            "title": f"The base model is fooled: it says {base}",
            "text": "Choose a defence to compare.",
        }
    if defended == label:
        text = f"The base model now says {base}. One image is an anecdote: the card below says what holds over many."
        return {"kind": "repaired", "title": f"{found.defense} still says {label}", "text": text}
    if base == label:
        text = f"It now says {defended}, while the base model still says {label}: this attack was made for the defence."
        return {"kind": "harmed", "title": f"{found.defense} alone is fooled", "text": text}
    text = f"The base model now says {base}, {found.defense} says {defended}."
    return {"kind": "harmed", "title": "Both are fooled", "text": text}
