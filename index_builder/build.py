"""From a training set to a bundle."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from index_builder.attackers import check_defences, open_attacker
from index_builder.plan import PUBLISHED_ATTACKS, BuildPlan, CopyPlan
from index_builder.progress import Progress, silent
from index_builder.shards import PARTS, join, make_shard, parts_of
from index_builder.training import train_classifier
from index_builder.workspace import Workspace, open_workspace, plan_changes
from mithridate import __version__
from mithridate.bundle import (
    ACTIVATIONS,
    EMBEDDINGS,
    FEATURES,
    INDEX,
    LABELS,
    MANIFEST,
    MODEL,
    PREDICTIONS,
    PRM_FILE,
    SCHEMA_VERSION,
    Bundle,
    CopyEntry,
    DatasetEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    PRMEntry,
    sha256_of,
)
from mithridate.errors import BuildError
from mithridate.models import Classifier, load_classifier, load_prm, save_weights
from mithridate.neighbors import NeighborIndex, resolve_factory

__all__ = ["PUBLISHED_ATTACKS", "BuildPlan", "BuildSummary", "build_bundle", "finished_bundle"]

_VERSIONS = ("mithridate", "torch")


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a build did. ``accuracy`` of the base model by copy; ``seconds`` of this run only.

    ``activation`` is the shape of what is stored for the tail scope of one exemplar, None where nothing is.
    """

    path: Path
    digest: str
    trained: bool
    images: int
    exemplars: int
    accuracy: dict[str, float]
    embedding_dim: int
    activation: tuple[int, ...] | None
    seconds: float
    bytes: int


def build_bundle(plan: BuildPlan, *, resume: bool = False, progress: Progress = silent) -> BuildSummary:
    """Builds ``plan.out``. Interrupted at any point, it goes on with ``resume=True`` and ends with the same bytes.

    Raises BuildError where it cannot start or go on, ModelError or OptionError for what does not fit.
    """
    started = time.monotonic()
    needed = _estimate_bytes(plan, _check(plan))
    with open_workspace(plan.out, plan.fingerprint(), resume=resume, needed_bytes=needed) as workspace:
        if workspace.has(MANIFEST):
            _check_finished(plan, workspace)
        else:
            _fill(plan, workspace, progress)
        workspace.discard(PARTS)
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
        activation=_activation_shape(plan.out),
        seconds=time.monotonic() - started,
        bytes=sum(entry.bytes for entry in manifest.files.values()) + len(manifest.encode()),
    )


def _activation_shape(bundle: Path) -> tuple[int, ...] | None:
    """From the file's header: reading all of it once more would be slow."""
    if not (bundle / ACTIVATIONS).is_file():
        return None
    shape: tuple[int, ...] = np.load(bundle / ACTIVATIONS, mmap_mode="r", allow_pickle=False).shape[1:]
    return shape


def _fill(plan: BuildPlan, workspace: Workspace, progress: Progress) -> None:
    classifier = _model(plan, workspace, progress)
    for number, given in enumerate(plan.prm):
        workspace.write_bytes(PRM_FILE.format(number), given.read_bytes())
    layout, total = plan.layout, len(plan.layout)
    for number, copy in enumerate(plan.copies()):
        missing = [s for s in range(layout.shards_per_copy) if not workspace.has(layout.shard_path(number, s))]
        phase = f"attack {copy.name}" if copy.attack else "embed"
        if not missing:
            progress(phase, (number + 1) * layout.sources, total)
            continue
        with open_attacker(plan, workspace, classifier, number) as attacker:
            for shard in range(layout.shards_per_copy):
                if shard in missing:
                    make_shard(plan, workspace, classifier, attacker, number, shard)
                progress(phase, number * layout.sources + layout.rows(shard).stop, total)
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


def _check(plan: BuildPlan) -> int:
    """Says what is wrong with the model, the index or a defence before any work is done and anything is written.

    Gives how many numbers an activation has, 0 where none are stored.
    """
    classifier = _load(plan, plan.model)
    with torch.no_grad():
        trace = classifier.trace(torch.zeros(1, *plan.data.image_shape))
    NeighborIndex.check_factory(plan.index, trace.embedding.shape[1], plan.metric)
    check_defences(plan, classifier)
    return 0 if trace.activation is None else math.prod(trace.activation.shape)


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
        tail_layer=plan.tail_layer,
    )


def _assemble(plan: BuildPlan, workspace: Workspace, classifier: Classifier, progress: Progress) -> None:
    """Joins the parts, builds the index, and writes the manifest last."""
    progress("index", 0, 1)
    embeddings = join(plan, workspace, EMBEDDINGS)
    predictions = join(plan, workspace, PREDICTIONS)
    workspace.write_array(EMBEDDINGS, embeddings)
    workspace.write_array(PREDICTIONS, predictions)
    workspace.write_array(LABELS, plan.data.labels.astype(np.int64))
    for name in (FEATURES, ACTIVATIONS):
        parts = parts_of(plan, name)
        if workspace.has(parts[0]) and not workspace.has(name):
            workspace.join_arrays(name, parts)
    index = NeighborIndex.build(embeddings, factory=plan.index, metric=plan.metric)
    with workspace.writing(INDEX) as path:
        index.write(path)
    progress("index", 1, 1)
    workspace.write_bytes(MANIFEST, _manifest(plan, workspace, classifier, predictions).encode())


def _manifest(
    plan: BuildPlan, workspace: Workspace, classifier: Classifier, predictions: NDArray[np.int32]
) -> Manifest:
    layout, spec, options = plan.layout, classifier.spec, plan.fingerprint()
    names = [layout.shard_path(c, s) for c, s in layout.shards]
    names += [MODEL, LABELS, PREDICTIONS, EMBEDDINGS, INDEX]
    names += [name for name in (FEATURES, ACTIVATIONS) if workspace.has(name)]
    prms = [PRM_FILE.format(number) for number in range(len(plan.prm))]
    names += prms
    correct = (predictions.reshape(len(layout.copies), -1) == plan.data.labels).sum(1)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=plan.name or f"{plan.data.spec.split(':')[0].split('[')[0]}-{spec.arch}",
        dataset=DatasetEntry(spec=plan.data.spec, fingerprint=options["dataset"], images=len(plan.data)),
        classes=plan.data.classes,
        image_shape=plan.data.image_shape,
        resize=plan.resize,
        model=ModelEntry(
            arch=spec.arch,
            mean=spec.mean,
            std=spec.std,
            embedding_layer=spec.embedding_layer,
            tail_layer=spec.tail_layer,
        ),
        prm=tuple(_prm_entry(workspace, plan, file) for file in prms),
        copies=tuple(_copy_entry(c, int(n)) for c, n in zip(plan.copies(), correct, strict=True)),
        seed=plan.seed,
        shard_size=plan.shard_size,
        index=resolve_factory(plan.index),
        metric=plan.metric,
        plan=options,
        built_with={
            "mithridate": __version__,
            "torch": torch.__version__,
            "torchvision": metadata.version("torchvision"),
        },
        files={
            name: FileEntry(sha256=sha256_of(workspace.path / name), bytes=(workspace.path / name).stat().st_size)
            for name in sorted(names)
        },
    )


def _prm_entry(workspace: Workspace, plan: BuildPlan, file: str) -> PRMEntry:
    spec = load_prm(workspace.path / file, image_shape=plan.data.image_shape).spec
    return PRMEntry(file=file, variant=spec.variant, size=spec.size)


def _copy_entry(copy: CopyPlan, correct: int) -> CopyEntry:
    attack = copy.attack
    if attack is None:
        return CopyEntry(name=copy.name, base_correct=correct)
    return CopyEntry(
        name=copy.name,
        epsilon=str(attack.epsilon),
        steps=attack.steps,
        step_size=attack.step_size,
        random_start=attack.random_start,
        defense=copy.defense,
        base_correct=correct,
    )


def _estimate_bytes(plan: BuildPlan, activation_numbers: int) -> int:
    """The pixels and activations of all copies: a lower bound, so that it never refuses wrongly.

    Activations count twice: until they are joined their parts are kept, to go on from.
    """
    activations = len(plan.layout) * activation_numbers * np.dtype(np.float16).itemsize
    return plan.data.images.nbytes * len(plan.layout.copies) + 2 * activations
