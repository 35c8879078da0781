"""From a training set to a bundle."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from index_builder.progress import Progress, silent
from index_builder.training import TrainingPlan, train_classifier
from index_builder.workspace import Workspace, open_workspace, plan_changes
from mithridate import __version__
from mithridate.attacks import PGD, parse_attack
from mithridate.bundle import (
    EMBEDDINGS,
    FEATURES,
    INDEX,
    LABELS,
    MANIFEST,
    MODEL,
    PREDICTIONS,
    SCHEMA_VERSION,
    Bundle,
    CopyEntry,
    DatasetEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    sha256_of,
)
from mithridate.datasets import LabelledImages
from mithridate.errors import BuildError, OptionError
from mithridate.exemplars import CLEAN, Layout
from mithridate.models import Classifier, load_classifier, save_weights
from mithridate.models.splitting import DEFAULT_LAYER
from mithridate.neighbors import AUTO, NeighborIndex, resolve_factory
from mithridate.types import Epsilon, to_images

PUBLISHED_ATTACKS = ("pgd10", "pgd30", "pgd100")
"""The three adversarial copies of the RMC paper."""

_PARTS = "parts"
_VERSIONS = ("mithridate", "torch")


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that decides what the bundle will be.

    ``model`` None trains ``arch`` first (small-cnn where that is not given either). ``shard_size`` images are attacked,
    stored and, after a kill, kept together; ``batch_size`` of them at a time.
    """

    data: LabelledImages
    out: Path
    model: Path | None = None
    arch: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    embedding_layer: str = DEFAULT_LAYER
    attacks: Sequence[str] = PUBLISHED_ATTACKS
    epsilon: Epsilon = Epsilon(8)
    index: str = AUTO
    name: str | None = None
    resize: Literal["exact", "center-crop"] = "exact"
    training: TrainingPlan = field(default_factory=TrainingPlan)
    seed: int = 0
    shard_size: int = 512
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(set(self.attacks)) != len(self.attacks):
            raise OptionError(f"an attack is named twice in {', '.join(self.attacks)}; name each once")
        if not 1 <= self.batch_size <= self.shard_size:
            raise OptionError(f"batch size {self.batch_size} must be from 1 to the shard size, {self.shard_size}")
        self.parsed_attacks()

    def parsed_attacks(self) -> tuple[PGD, ...]:
        """The attacks themselves. Raises OptionError for one that does not exist."""
        return tuple(parse_attack(name, epsilon=self.epsilon) for name in self.attacks)

    @property
    def layout(self) -> Layout:
        """How the exemplars will be numbered."""
        return Layout(sources=len(self.data), copies=(CLEAN, *self.attacks), shard_size=self.shard_size)

    def resolved_training(self) -> TrainingPlan | None:
        """How the model is trained, or None where one is given."""
        if self.model is not None:
            return None
        return replace(self.training, arch=self.arch or self.training.arch, seed=self.seed)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted build and its resumption."""
        return {
            "mithridate": __version__,
            "torch": torch.__version__,
            "dataset": self.data.fingerprint(),
            "spec": self.data.spec,
            "model": sha256_of(self.model) if self.model else repr(self.resolved_training()),
            "arch": self.arch,
            "normalisation": [list(part) if part else None for part in (self.mean, self.std)],
            "embedding_layer": self.embedding_layer,
            "attacks": list(self.attacks),
            "epsilon": str(self.epsilon),
            "name": self.name,
            "resize": self.resize,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a build did. ``accuracy`` of the base model by copy; ``seconds`` of this run only."""

    path: Path
    digest: str
    trained: bool
    images: int
    exemplars: int
    accuracy: dict[str, float]
    embedding_dim: int
    seconds: float
    bytes: int


def build_bundle(plan: BuildPlan, *, resume: bool = False, progress: Progress = silent) -> BuildSummary:
    """Builds ``plan.out``. Interrupted at any point, it goes on with ``resume=True`` and ends with the same bytes.

    Raises BuildError where it cannot start or go on, ModelError or OptionError for what does not fit.
    """
    started = time.monotonic()
    _check(plan)
    needed = _estimate_bytes(plan)
    with open_workspace(plan.out, plan.fingerprint(), resume=resume, needed_bytes=needed) as workspace:
        if workspace.has(MANIFEST):
            _check_finished(plan, workspace)
        else:
            _fill(plan, workspace, progress)
        workspace.discard(_PARTS)
        workspace.publish()
    bundle = Bundle.open(plan.out, verify=False)  # every byte was just written and hashed here
    manifest = bundle.manifest
    return BuildSummary(
        path=plan.out,
        digest=bundle.digest,
        trained=plan.model is None,
        images=manifest.dataset.images,
        exemplars=len(manifest.layout),
        accuracy={copy.name: copy.base_correct / manifest.dataset.images for copy in manifest.copies},
        embedding_dim=bundle.embeddings.shape[1],
        seconds=time.monotonic() - started,
        bytes=sum(entry.bytes for entry in manifest.files.values()) + len(manifest.encode()),
    )


def _fill(plan: BuildPlan, workspace: Workspace, progress: Progress) -> None:
    classifier = _model(plan, workspace, progress)
    layout, total = plan.layout, len(plan.layout)
    attacks: tuple[PGD | None, ...] = (None, *plan.parsed_attacks())
    for copy, attack in enumerate(attacks):
        for shard in range(layout.shards_per_copy):
            rows = layout.rows(shard)
            if not workspace.has(layout.shard_path(copy, shard)):
                _make_shard(plan, workspace, classifier, attack, copy, shard)
            progress(f"attack {attack.name}" if attack else "embed", copy * layout.sources + rows.stop, total)
    _assemble(plan, workspace, classifier, progress)


def finished_bundle(plan: BuildPlan) -> Bundle | None:
    """The bundle where ``plan.out`` is finished already, or None. Raises BuildError where it is of another plan."""
    if not (plan.out / MANIFEST).is_file():
        return None
    bundle = Bundle.open(plan.out)
    before = {**bundle.manifest.plan, "index": bundle.manifest.index}
    now = {**plan.fingerprint(), "index": resolve_factory(plan.index)}
    seen = plan_changes(before, {key: value for key, value in now.items() if key not in _VERSIONS})
    if seen:
        raise BuildError(
            f"{plan.out} is finished, but of another plan ({seen}); choose another name or remove it first"
        )
    return bundle


def _check_finished(plan: BuildPlan, workspace: Workspace) -> None:
    """A kill just before the rename left a finished bundle: its index, which a plan may change until then, is fixed."""
    seen = Bundle.open(workspace.path, verify=False).manifest.index
    if seen != resolve_factory(plan.index):
        raise BuildError(f"{workspace.path} is finished, with index {seen!r}; resume with --index {seen}")


def _check(plan: BuildPlan) -> None:
    """Says what is wrong with the model or the index before any work is done and anything is written."""
    classifier = _load(plan, plan.model)
    with torch.no_grad():
        embedding = classifier.embed(torch.zeros(1, *plan.data.image_shape))
    NeighborIndex.check_factory(plan.index, embedding.shape[1])


def _model(plan: BuildPlan, workspace: Workspace, progress: Progress) -> Classifier:
    """The base model: trained or taken over once, and from then on read from the workspace."""
    training = plan.resolved_training()
    if not workspace.has(MODEL):
        if plan.model is not None:
            classifier = _load(plan, plan.model)
        else:
            assert training is not None
            classifier = train_classifier(plan.data, training, device=plan.device, progress=progress)
        with workspace.writing(MODEL) as path:
            save_weights(classifier, path)
    return _load(plan, workspace.path / MODEL).to(plan.device)


def _load(plan: BuildPlan, path: Path | None) -> Classifier:
    """The classifier with the weights in ``path``, or with fresh ones."""
    training = plan.resolved_training()
    return load_classifier(
        path,
        arch=training.arch if training else plan.arch,
        num_classes=len(plan.data.classes),
        image_shape=plan.data.image_shape,
        mean=plan.mean,
        std=plan.std,
        embedding_layer=plan.embedding_layer,
    )


def _make_shard(
    plan: BuildPlan, workspace: Workspace, classifier: Classifier, attack: PGD | None, copy: int, shard: int
) -> None:
    """Attacks and embeds one shard. The pixels are written last: where they are, the rest is."""
    clean = torch.from_numpy(plan.data.images[plan.layout.rows(shard)])
    generator = torch.Generator().manual_seed(_shard_seed(plan, copy, shard))
    pixels, results = [], []
    for batch in torch.split(clean, plan.batch_size):
        batch = batch.to(plan.device)
        if attack is not None:
            with torch.no_grad():
                predicted = classifier(to_images(batch)).argmax(1)  # untargeted on its own answer: no label leaks
            batch = attack.run(classifier, batch, predicted, generator=generator)
        with torch.no_grad():
            images = to_images(batch)
            embedding, head_input = classifier.features(images)
            predictions = (classifier.head(head_input) if classifier.has_head else classifier(images)).argmax(1)
        pixels.append(batch.cpu())
        results.append((embedding.cpu(), head_input.cpu(), predictions.int().cpu()))
    embeddings, features, answers = (torch.cat(column).numpy() for column in zip(*results, strict=True))
    path = plan.layout.shard_path(copy, shard)
    workspace.write_array(_part(EMBEDDINGS, path), embeddings)
    if _separate_features(classifier):
        workspace.write_array(_part(FEATURES, path), features)
    workspace.write_array(_part(PREDICTIONS, path), answers)
    workspace.write_array(path, torch.cat(pixels).numpy())


def _assemble(plan: BuildPlan, workspace: Workspace, classifier: Classifier, progress: Progress) -> None:
    """Joins the parts, builds the index, and writes the manifest last."""
    progress("index", 0, 1)
    embeddings = _join(plan, workspace, EMBEDDINGS)
    if not np.isfinite(embeddings).all():
        raise BuildError("the model gives NaN or infinite embeddings for some training images; check its weights")
    predictions = _join(plan, workspace, PREDICTIONS)
    if _separate_features(classifier):
        workspace.write_array(FEATURES, _join(plan, workspace, FEATURES))
    workspace.write_array(EMBEDDINGS, embeddings)
    workspace.write_array(PREDICTIONS, predictions)
    workspace.write_array(LABELS, plan.data.labels.astype(np.int64))
    index = NeighborIndex.build(embeddings, factory=plan.index)
    with workspace.writing(INDEX) as path:
        index.write(path)
    progress("index", 1, 1)
    workspace.write_bytes(MANIFEST, _manifest(plan, workspace, classifier, predictions).encode())


def _manifest(
    plan: BuildPlan, workspace: Workspace, classifier: Classifier, predictions: NDArray[np.int32]
) -> Manifest:
    layout, spec, options = plan.layout, classifier.spec, plan.fingerprint()
    names = [layout.shard_path(c, s) for c, s in layout.shards]
    names += [MODEL, LABELS, PREDICTIONS, EMBEDDINGS, INDEX, *([FEATURES] if workspace.has(FEATURES) else [])]
    correct = (predictions.reshape(len(layout.copies), -1) == plan.data.labels).sum(1)
    attacks: tuple[PGD | None, ...] = (None, *plan.parsed_attacks())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=plan.name or f"{plan.data.spec.split(':')[0].split('[')[0]}-{spec.arch}",
        dataset=DatasetEntry(spec=plan.data.spec, fingerprint=options["dataset"], images=len(plan.data)),
        classes=plan.data.classes,
        image_shape=plan.data.image_shape,
        resize=plan.resize,
        model=ModelEntry(arch=spec.arch, mean=spec.mean, std=spec.std, embedding_layer=spec.embedding_layer),
        copies=tuple(_copy_entry(a, int(n)) for a, n in zip(attacks, correct, strict=True)),
        seed=plan.seed,
        shard_size=plan.shard_size,
        index=resolve_factory(plan.index),
        plan=options,
        built_with={
            "mithridate": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        files={
            name: FileEntry(sha256=sha256_of(workspace.path / name), bytes=(workspace.path / name).stat().st_size)
            for name in sorted(names)
        },
    )


def _copy_entry(attack: PGD | None, correct: int) -> CopyEntry:
    if attack is None:
        return CopyEntry(name=CLEAN, base_correct=correct)
    return CopyEntry(
        name=attack.name,
        epsilon=str(attack.epsilon),
        steps=attack.steps,
        step_size=attack.step_size,
        random_start=attack.random_start,
        base_correct=correct,
    )


def _join(plan: BuildPlan, workspace: Workspace, name: str) -> NDArray[Any]:
    layout = plan.layout
    paths = [layout.shard_path(c, s) for c, s in layout.shards]
    return np.concatenate([np.load(workspace.path / _part(name, path), allow_pickle=False) for path in paths])


def _part(name: str, shard_path: str) -> str:
    return f"{_PARTS}/{Path(shard_path).stem}-{name}"


def _separate_features(classifier: Classifier) -> bool:
    """Whether the head's input is something else than what the index is searched with."""
    return classifier.has_head and classifier.spec.embedding_layer != DEFAULT_LAYER


def _shard_seed(plan: BuildPlan, copy: int, shard: int) -> int:
    """Each shard has randomness of its own, so it does not matter which were made before a kill."""
    text = f"{plan.seed}/{plan.layout.copies[copy]}/{shard}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def _estimate_bytes(plan: BuildPlan) -> int:
    """The pixels of all copies: a lower bound, so that it never refuses wrongly."""
    return plan.data.images.nbytes * len(plan.layout.copies)
