"""What the service says, as types. Fields the service adds later are ignored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mithridate.errors import InputError


class Scored(BaseModel):
    """A class and how sure the service is of it."""

    model_config = ConfigDict(frozen=True)

    label: str
    class_index: int
    confidence: float


class ImageAnswer(Scored):
    """The answer for one image; ``undefended`` is what the base model alone would have said.

    ``undefended`` and ``adaptation`` are None where the caller's key may not explain. ``abstained``: the label is the
    defence's best guess, but it does not stand by it.
    """

    top: tuple[Scored, ...]
    undefended: Scored | None
    suspicious: bool
    abstained: bool = False
    adaptation: dict[str, Any] | None
    neighbors: tuple[dict[str, Any], ...] | None = None

    @property
    def answered_from(self) -> str | None:
        """``"adapted"`` or ``"base"`` weights; None where nothing adapts or the service does not say."""
        weights = (self.adaptation or {}).get("answered_from")
        return weights if isinstance(weights, str) else None

    @property
    def held_out_loss(self) -> tuple[float, float] | None:
        """Before and after adaptation; None where none was held out or the service does not say."""
        match (self.adaptation or {}).get("held_out_loss"):
            case {"before": float() | int() as before, "after": float() | int() as after}:
                return float(before), float(after)
        return None


class BatchSize(BaseModel):
    """How many requests and images were answered together."""

    model_config = ConfigDict(frozen=True)

    requests: int
    images: int


class Answer(BaseModel):
    """The answer to one request; ``batch`` is None where the service does not say."""

    model_config = ConfigDict(frozen=True)

    id: str
    bundle: dict[str, str]
    defense: str
    predictions: Annotated[tuple[ImageAnswer, ...], Field(min_length=1)]
    batch: BatchSize | None = None
    timings_ms: dict[str, float]


class BundleDescription(BaseModel):
    """``GET /v1/bundle``."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    arch: str


class DefenseDescription(BaseModel):
    """One of ``GET /v1/defenses``. ``cost``: what an image takes, relative to the undefended model; None where that
    was not measured.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    cost: float | None = None


class Defenses(BaseModel):
    """``GET /v1/defenses``."""

    model_config = ConfigDict(frozen=True)

    default: str
    defenses: tuple[DefenseDescription, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may ask for."""
        return tuple(entry.name for entry in self.defenses)


def parse_answer(content: bytes, kind: type[BaseModel], url: str) -> Any:
    """Reads JSON as ``kind``. Raises InputError where it is something else: then this is not a Mithridate service."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise InputError(f"{url} does not answer as Mithridate does: {error.errors()[0]['msg']}") from error
