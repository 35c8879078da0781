"""What a copy's attack runs against: the base model, or a defence that works with the copies made before.

An attack on an adapted model finds other images than one on the base model; filed among the exemplars they are what the
adaptation has to know of (Wu et al. 2020 attack the base model only).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from index_builder.plan import BuildPlan, CopyPlan
from index_builder.shards import PARTS, Attacker, join, parts_of
from index_builder.workspace import Workspace
from mithridate.attacks import PGD
from mithridate.bundle import ACTIVATIONS, EMBEDDINGS, FEATURES, PREDICTIONS
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.exemplars import ExemplarStore, Layout
from mithridate.models import Classifier, load_prm
from mithridate.neighbors import NeighborIndex
from mithridate.types import Images, Labels, Logits, Pixels, to_images

_REHEARSAL = 8


@contextmanager
def open_attacker(
    plan: BuildPlan, workspace: Workspace, classifier: Classifier, copy: int
) -> Iterator[Attacker | None]:
    """What makes copy number ``copy`` out of clean images; None for the clean one."""
    wanted = plan.copies()[copy]
    if wanted.attack is None:
        yield None
    elif wanted.defense is None:
        yield _on_base(classifier, wanted.attack)
    else:
        joined = workspace.path / PARTS / f"before-{wanted.name}-{ACTIVATIONS}"
        yield _on_defence(plan, wanted, _resources(plan, workspace, classifier, copy, joined))
        joined.unlink(missing_ok=True)


def check_defences(plan: BuildPlan, classifier: Classifier) -> None:
    """Makes each defence that is to be attacked, on a few images. Raises what is wrong with one (OptionError ...)."""
    for number, copy in enumerate(plan.copies()):
        if copy.defense is not None:
            build_defence(copy.defense, _rehearsal(plan, classifier, number))


def _on_base(classifier: Classifier, attack: PGD) -> Attacker:
    def run(pixels: Pixels, answers: Labels, sources: slice, generator: torch.Generator) -> Pixels:
        return attack.run(classifier, pixels, answers, generator=generator)

    return run


def _on_defence(plan: BuildPlan, copy: CopyPlan, resources: Resources) -> Attacker:
    """A defence that knew an image's own copies would know its label: those of the whole batch are withheld from it."""
    attack, text = copy.attack, copy.defense
    assert attack is not None
    assert text is not None
    layout = resources.exemplars.layout

    def run(pixels: Pixels, answers: Labels, sources: slice, generator: torch.Generator) -> Pixels:
        others = torch.ones(len(layout.copies), layout.sources, dtype=torch.bool)
        others[:, sources] = False
        defence = build_defence(text, replace(resources, index=resources.index.only(others.flatten())))

        def forward(images: Images) -> Logits:
            return defence.surrogate(images, generator=generator, budget=Budget())

        return attack.run(forward, pixels, answers, generator=generator)

    return run


def _resources(plan: BuildPlan, workspace: Workspace, classifier: Classifier, copies: int, joined: Path) -> Resources:
    """The first ``copies`` copies as a defence sees them; their activations are joined in a file of that name."""
    layout = replace(plan.layout, copies=plan.layout.copies[:copies])
    embeddings = join(plan, workspace, EMBEDDINGS, copies=copies)
    separate = workspace.has(parts_of(plan, FEATURES, copies=1)[0])
    activations = None
    if classifier.has_tail:
        name = joined.relative_to(workspace.path).as_posix()
        workspace.join_arrays(name, parts_of(plan, ACTIVATIONS, copies=copies))
        activations = np.load(joined, mmap_mode="c", allow_pickle=False)
    exemplars = ExemplarStore(
        layout,
        shards=[np.load(workspace.path / layout.shard_path(c, s), mmap_mode="c") for c, s in layout.shards],
        labels=plan.data.labels.astype(np.int64),
        features=join(plan, workspace, FEATURES, copies=copies) if separate else embeddings,
        predictions=join(plan, workspace, PREDICTIONS, copies=copies),
        activations=activations,
    )
    # Exact, whatever the bundle's own index will be: that one may still be changed when a build is resumed.
    index = NeighborIndex.build(embeddings, metric=plan.metric)
    device = classifier.device
    return Resources(
        classifier=classifier,
        index=index.to(device),
        exemplars=exemplars.to(device),
        prms=tuple(load_prm(path, image_shape=plan.data.image_shape).to(device) for path in plan.prm),
    )


@torch.no_grad()
def _rehearsal(plan: BuildPlan, classifier: Classifier, copies: int) -> Resources:
    """A few clean images, as often as there will be copies."""
    images, labels = plan.data.images[:_REHEARSAL], plan.data.labels[:_REHEARSAL]
    trace = classifier.trace(to_images(torch.from_numpy(images)))
    embeddings = np.tile(trace.embedding.numpy(), (copies, 1))
    halves = None if trace.activation is None else torch.cat([trace.activation.half()] * copies).numpy()
    exemplars = ExemplarStore(
        Layout(sources=len(images), copies=plan.layout.copies[:copies], shard_size=_REHEARSAL),
        shards=[images] * copies,
        labels=labels.astype(np.int64),
        features=np.tile(trace.head_input.numpy(), (copies, 1)),
        predictions=np.tile(labels, copies).astype(np.int32),
        activations=halves,
    )
    index = NeighborIndex.build(embeddings, metric=plan.metric)
    prms = tuple(load_prm(path, image_shape=plan.data.image_shape) for path in plan.prm)
    return Resources(classifier=classifier, index=index, exemplars=exemplars, prms=prms)
