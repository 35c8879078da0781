"""What a bundle was tuned to: written beside it by ``mithridate bench --tune``, read when it is served."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mithridate.errors import BundleError

TUNING = "tuning.json"
"""Like the card, not listed in the manifest: it comes after the bundle, and names the bundle's digest."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(_Frozen):
    """One setting, measured: images right of ``images`` clean and of ``attacked_images`` attacked ones."""

    defense: str
    images: Annotated[int, Field(ge=1)]
    clean: Annotated[int, Field(ge=0)]
    attacked_images: Annotated[int, Field(ge=1)]
    attacked: Annotated[int, Field(ge=0)]
    milliseconds: Annotated[float, Field(ge=0)]  # an image, in batches of 64

    @property
    def score(self) -> float:
        """What tuning raises: the mean of clean and attacked accuracy."""
        return (self.clean / self.images + self.attacked / self.attacked_images) / 2


class Tuning(_Frozen):
    """``defense`` is what ``rmc`` means for this bundle from now on."""

    schema_version: Literal[1] = 1
    bundle: str  # digest
    defense: str
    against: Literal["static", "adaptive"]
    seed: int
    base: Trial
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        """The trial behind ``defense``."""
        return max(self.trials, key=lambda trial: (trial.score, -trial.milliseconds))


def read_tuning(path: Path, digest: str) -> Tuning | None:
    """Of the bundle at ``path``, or None where it was not tuned. Raises BundleError for one that is not this
    bundle's.
    """
    file = path / TUNING
    try:
        tuning = Tuning.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        raise BundleError(f"{file} is not a valid tuning; remove it or run mithridate bench --tune again") from error
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from error
    if tuning.bundle != digest:
        raise BundleError(f"{file} is of another bundle ({tuning.bundle[:19]}...); remove it or tune this one")
    return tuning


def write_tuning(path: Path, tuning: Tuning) -> None:
    """Puts it beside the bundle at ``path``, all of it or nothing."""
    part = path.parent / f".{path.name}.{TUNING}.{os.getpid()}"  # not inside: an unlisted file would spoil the bundle
    try:
        part.write_text(json.dumps(tuning.model_dump(mode="json"), indent=1) + "\n")
        part.replace(path / TUNING)
    finally:
        part.unlink(missing_ok=True)
