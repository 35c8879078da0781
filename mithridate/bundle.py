"""The bundle: a directory with everything that serving needs. Written once, then read-only, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import EllipsisType
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from mithridate.datasets import LabelledImages
from mithridate.errors import BundleError, OptionError
from mithridate.evaluation.card import CARD, read_card
from mithridate.exemplars import CLEAN, ExemplarStore, Layout
from mithridate.models import PRM, Classifier, is_factory, load_classifier, load_prm
from mithridate.neighbors import NeighborIndex
from mithridate.tuning import TUNING, read_tuning

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
LABELS = "labels.npy"
PREDICTIONS = "predictions.npy"
EMBEDDINGS = "embeddings.npy"
FEATURES = "features.npy"
ACTIVATIONS = "activations.npy"
INDEX = "index.faiss"
PRM_FILE = "prm-{}.safetensors"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetEntry(_Frozen):
    """Which data the bundle was built from."""

    spec: str
    fingerprint: str
    images: Annotated[int, Field(gt=0)]


class ModelEntry(_Frozen):
    """How to build the network that ``model.safetensors`` fits."""

    arch: str
    mean: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    std: Annotated[tuple[Annotated[FiniteFloat, Field(gt=0)], ...], Field(min_length=1)]
    embedding_layer: str
    tail_layer: str | None = None  # where the activations of ACTIVATIONS were taken


class PRMEntry(_Frozen):
    """A pixel robustness manipulator that was stored with the model."""

    file: str
    variant: str
    size: str


class CopyEntry(_Frozen):
    """One copy of the training set: the clean one, or what one attack made of it."""

    name: str
    epsilon: str | None = None
    steps: int | None = None
    step_size: float | None = None
    random_start: bool | None = None
    defense: str | None = None  # what the attack ran against, with the copies before this one; None: the base model
    base_correct: Annotated[int, Field(ge=0)]  # images of this copy that the base model classifies correctly


class FileEntry(_Frozen):
    """What a file of the bundle must be."""

    sha256: str
    bytes: int


class Manifest(_Frozen):
    """``manifest.json``. Holds no time and no host: building the same thing twice gives the same bytes."""

    schema_version: Literal[1]
    name: str
    dataset: DatasetEntry
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    resize: Literal["exact", "center-crop"]
    model: ModelEntry
    prm: tuple[PRMEntry, ...] = ()
    copies: tuple[CopyEntry, ...]
    seed: int
    shard_size: Annotated[int, Field(gt=0)]
    index: str
    metric: Literal["l2", "cosine", "ip"] = "l2"
    plan: dict[str, Any]  # every option that the bundle depends on, as the build had it
    built_with: dict[str, str]
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} points outside the bundle")
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.model.mean) != len(self.model.std):
            raise ValueError(f"{len(self.model.mean)} means and {len(self.model.std)} deviations")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("two classes have one name")
        if any(copy.base_correct > self.dataset.images for copy in self.copies):
            raise ValueError("more images classified correctly than there are")
        if (self.model.tail_layer is None) != (ACTIVATIONS not in self.files):
            raise ValueError(f"model.tail_layer is {self.model.tail_layer!r}, but {ACTIVATIONS} does not go with that")
        unlisted = next((entry.file for entry in self.prm if entry.file not in self.files), None)
        if unlisted is not None:
            raise ValueError(f"prm names {unlisted}, which is not among the files")
        return self

    @property
    def layout(self) -> Layout:
        """How the exemplars are numbered."""
        names = tuple(copy.name for copy in self.copies)
        return Layout(sources=self.dataset.images, copies=names, shard_size=self.shard_size)

    def encode(self) -> bytes:
        """The bytes of the file; their sha256 is the bundle's digest.

        What earlier builds did not know is left out where it is as it was then, so that their bytes stay the same.
        """
        content = self.model_dump(mode="json")
        for entry, key, usual in [(content, "metric", "l2"), (content["model"], "tail_layer", None)]:
            if entry[key] == usual:
                del entry[key]
        for copy in content["copies"]:
            if copy["defense"] is None:
                del copy["defense"]
        if not content["prm"]:
            del content["prm"]
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. The parts are loaded when first asked for."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Bundle:
        """Opens the bundle at ``path``. Raises BundleError for whatever is wrong with it.

        ``verify=False`` skips the digests, for a caller that has just checked them.
        """
        bundle = cls(path, *_read_manifest(path))
        if verify:
            for problem in bundle.problems():
                raise BundleError(f"bundle {path}: {problem}")
        return bundle

    def problems(self) -> Iterator[str]:
        """Every file that is missing, of the wrong size, changed, or not listed."""
        listed = self.manifest.files
        for name, entry in sorted(listed.items()):
            file = self.path / name
            if not file.is_file():
                yield f"{name} is missing"
            elif file.stat().st_size != entry.bytes:
                yield f"{name} has {file.stat().st_size} bytes, the manifest says {entry.bytes}"
            elif sha256_of(file) != entry.sha256:
                yield f"{name} has been changed (its sha256 is not the manifest's)"
        present = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}
        for name in sorted(present - set(listed) - {MANIFEST, CARD, TUNING}):
            yield f"{name} is not listed in the manifest"
        for read in (read_tuning, read_card):
            try:
                read(self.path, self.digest)
            except BundleError as error:
                yield str(error)

    def classifier(self, *, allow_factory: str | None = None) -> Classifier:
        """The base model. ``allow_factory`` must repeat the name where the network is a user's own code."""
        model = self.manifest.model
        if is_factory(model.arch) and model.arch != allow_factory:
            raise BundleError(
                f"the network of {self.path} is built by code outside Mithridate, {model.arch!r}; "
                f"repeat it with --arch {model.arch} to run that code"
            )
        return load_classifier(
            self.path / MODEL,
            arch=model.arch,
            num_classes=len(self.manifest.classes),
            image_shape=self.manifest.image_shape,
            mean=model.mean,
            std=model.std,
            embedding_layer=model.embedding_layer,
            tail_layer=model.tail_layer,
        )

    def check_fits(self, data: LabelledImages) -> None:
        """Raises OptionError where the model does not take these images, or has another number of classes."""
        manifest = self.manifest
        if manifest.image_shape != data.image_shape or len(manifest.classes) != len(data.classes):
            raise OptionError(
                f"the model in {self.path} takes {manifest.image_shape} images of {len(manifest.classes)} classes; "
                f"{data.spec} has {data.image_shape} of {len(data.classes)}"
            )

    def prms(self) -> tuple[PRM, ...]:
        """The pixel robustness manipulators, in the order in which the build was given them."""
        shape = self.manifest.image_shape
        return tuple(load_prm(self.path / entry.file, image_shape=shape) for entry in self.manifest.prm)

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """float32 ``[E, D]``, memory-mapped: what the index was made from."""
        return self._array(EMBEDDINGS, np.float32, len(self.manifest.layout), None)

    @cached_property
    def activations(self) -> NDArray[np.float16] | None:
        """float16 ``[E, ...]``, memory-mapped: the inputs of the tail, or None where none are stored."""
        if self.manifest.model.tail_layer is None:
            return None
        return self._array(ACTIVATIONS, np.float16, len(self.manifest.layout), ...)

    def index(self) -> NeighborIndex:
        """The neighbour index."""
        return NeighborIndex.read(self.path / INDEX, self.embeddings, metric=self.manifest.metric)

    def exemplars(self) -> ExemplarStore:
        """The exemplars' pixels, labels, head features and, where they are stored, activations."""
        layout = self.manifest.layout
        has_features = FEATURES in self.manifest.files
        labels = self._array(LABELS, np.int64, layout.sources)
        if labels.min() < 0 or labels.max() >= len(self.manifest.classes):
            raise BundleError(f"{LABELS} holds labels outside 0..{len(self.manifest.classes) - 1}")
        return ExemplarStore(
            layout,
            shards=[self._shard(copy, shard) for copy, shard in layout.shards],
            labels=labels,
            features=self._array(FEATURES, np.float32, len(layout), None) if has_features else self.embeddings,
            predictions=self._array(PREDICTIONS, np.int32, len(layout)),
            activations=self.activations,
        )

    def _shard(self, copy: int, shard: int) -> NDArray[np.uint8]:
        layout = self.manifest.layout
        rows = layout.rows(shard)
        return self._array(layout.shard_path(copy, shard), np.uint8, rows.stop - rows.start, *self.manifest.image_shape)

    def _array(self, name: str, dtype: type, *shape: int | EllipsisType | None) -> NDArray[Any]:
        """A memory-mapped ``.npy`` file of the bundle. In ``shape`` None allows any length, ``...`` one or more."""
        try:
            # Copy-on-write: torch wants writable memory, and the file must never change.
            array: NDArray[Any] = np.load(self.path / name, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BundleError(f"bundle {self.path}: {name} is not a readable array ({error})") from error
        if not isinstance(array, np.ndarray):
            array.close()
            raise BundleError(f"bundle {self.path}: {name} is not a readable array (several in an archive)")
        if array.dtype != dtype or not _fits(array.shape, shape):
            seen = f"{array.dtype} {list(array.shape)}"
            wanted = f"{np.dtype(dtype)} [{', '.join('...' if s is ... else str(s) for s in shape)}]"
            raise BundleError(f"bundle {self.path}: {name} is {seen}, wanted {wanted}")
        if array.dtype.kind == "f" and not all(np.isfinite(part).all() for part in _parts(array)):
            raise BundleError(f"bundle {self.path}: {name} holds NaN or infinite numbers")
        return array


def _fits(seen: tuple[int, ...], wanted: tuple[int | EllipsisType | None, ...]) -> bool:
    if wanted[-1] is ...:
        return len(seen) >= len(wanted) and _fits(seen[: len(wanted) - 1], wanted[:-1])
    return len(seen) == len(wanted) and all(w in (None, s) for s, w in zip(seen, wanted, strict=True))


def _parts(array: NDArray[Any], size: int = 2**24) -> Iterator[NDArray[Any]]:
    """Some rows at a time, about ``size`` bytes."""
    rows = max(1, size * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file():
        raise BundleError(f"{path} is not a bundle: there is no {MANIFEST} in it")
    raw = file.read_bytes()
    try:
        content = json.loads(raw)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION or type(version) is not int:
            raise BundleError(f"{file} has schema version {version!r}; this Mithridate reads {SCHEMA_VERSION}")
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
        raise BundleError(f"{file} is not a valid manifest: {where}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not JSON ({error})") from error
    # Looked up one after the other: a manifest may claim more shards than could ever be listed.
    unlisted = next((name for name in _required(manifest.layout) if name not in manifest.files), None)
    if unlisted or not manifest.copies or manifest.copies[0].name != CLEAN:
        what = f"does not list {unlisted}" if unlisted else "does not begin with the clean copy"
        raise BundleError(f"{file} is not a valid manifest: it {what}")
    return manifest, f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _required(layout: Layout) -> Iterator[str]:
    """What a bundle of this layout cannot do without."""
    yield from (MODEL, LABELS, PREDICTIONS, EMBEDDINGS, INDEX)
    yield from (layout.shard_path(copy, shard) for copy, shard in layout.shards)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
