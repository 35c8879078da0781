"""A build beyond the basics: activations for the tail scope, another metric, copies that attack a defence."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_build_interrupted import drive, is_finished, make_plan, stop_at

from index_builder import attackers
from index_builder.build import BuildPlan, build_bundle, finished_bundle
from index_builder.training import TrainingPlan, train_classifier
from index_builder.workspace import Workspace, working_path
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.errors import BuildError, InputError, ModelError, OptionError
from mithridate.exemplars import ExemplarStore, Layout
from mithridate.models import save_weights
from mithridate.neighbors import NeighborIndex
from mithridate.types import Epsilon, to_images

ALL: dict[str, Any] = {"tail_layer": "auto", "metric": "cosine", "attacks": ["pgd2", "pgd2@webnn:neighbors=8"]}


@pytest.fixture(scope="module")
def few() -> LabelledImages:
    return load_dataset("digits[train,:128]")


@pytest.fixture(scope="module")
def model(few: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "own.safetensors"
    save_weights(train_classifier(few, TrainingPlan(epochs=3)), path)
    return path


@pytest.fixture
def plan(few: LabelledImages, model: Path, tmp_path: Path) -> BuildPlan:
    """Everything new at once."""
    return make_plan(tmp_path / "bundle", few, model=model, **{**ALL, "attacks": tuple(ALL["attacks"])})


@pytest.fixture(scope="module")
def whole(few: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What an uninterrupted build makes, training included."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    build_bundle(make_plan(out, few, **ALL))
    return Bundle.open(out)


# Activations


def test_activations_are_what_the_trunk_gives_for_every_copy(whole: Bundle) -> None:
    resources = Resources.load(whole)
    classifier, exemplars = resources.classifier, resources.exemplars
    assert exemplars.activations is not None
    assert exemplars.activations.shape == (3 * 128, 64, 4, 4)
    assert exemplars.activations.dtype == torch.float16
    for start in range(0, 3 * 128, 50):
        ids = torch.arange(start, min(start + 50, 3 * 128))
        with torch.no_grad():
            wanted = classifier.trace(to_images(exemplars.pixels(ids))).activation
            assert wanted is not None
            assert torch.equal(exemplars.gather_activations(ids), wanted.half())
            logits = classifier.tail(exemplars.gather_activations(ids).float())
        assert (logits.argmax(1).int() == exemplars.predictions[ids]).float().mean() > 0.97  # but for float16
    assert whole.manifest.model.tail_layer == "auto"
    assert whole.manifest.files["activations.npy"].bytes == (whole.path / "activations.npy").stat().st_size
    assert not list(whole.path.glob("parts*"))


def test_a_build_says_what_it_stored(plan: BuildPlan) -> None:
    assert build_bundle(plan).activation == (64, 4, 4)
    assert build_bundle(replace(plan, out=plan.out.with_name("plain"), tail_layer=None)).activation is None
    assert not (plan.out.with_name("plain") / "activations.npy").exists()


def test_activations_change_nothing_else(plan: BuildPlan) -> None:
    plain = replace(plan, out=plan.out.with_name("plain"), tail_layer=None)
    build_bundle(plan)
    build_bundle(plain)
    files, others = (Bundle.open(out).manifest.files for out in (plan.out, plain.out))
    del files["activations.npy"]
    assert files == others


def test_killed_at_random_it_resumes_to_the_same_bytes(plan: BuildPlan, few: LabelledImages, whole: Bundle) -> None:
    """With SIGKILL: in the copy that attacks a defence, in the middle of a file, and at the end."""
    steps, files = (plan.out.parent / name / "bundle" for name in ("steps", "files"))
    kills: list[tuple[tuple[str, Any], tuple[str, Any]]] = [
        (("phase", "embed"), ("file", 7)),  # the activations of a shard are its third file
        (("phase", "attack pgd2"), ("file", 9)),
        (("phase", "attack pgd2-at-webnn-neighbors-8"), ("file", 15)),
        (("phase", "index"), ("file", 11)),
    ]
    fates = drive([[(steps, *one), (files, *other)] for one, other in kills], **ALL)
    assert [first for first, _ in fates] == [(-9, "")] * 4
    assert fates[0][1] == (-9, "")
    for out in (steps, files):
        if not out.exists():
            build_bundle(make_plan(out, few, **ALL), resume=True)
        is_finished(replace(plan, out=out), whole)


def test_interrupted_in_a_copy_that_attacks_a_defence_it_resumes(plan: BuildPlan) -> None:
    """Between its shards, and while what the defence works with is still there."""
    digest = build_bundle(replace(plan, out=plan.out.with_name("whole"))).digest
    for call in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            build_bundle(plan, resume=True, progress=stop_at("attack pgd2-at-webnn-neighbors-8", call))
        assert len(list(working_path(plan.out).rglob("exemplars/pgd2-at-*.npy"))) == call + 1
    assert build_bundle(plan, resume=True).digest == digest


def test_files_that_do_not_fit_stop_the_build_and_lose_nothing(plan: BuildPlan, whole: Bundle) -> None:
    files = whole.manifest.files
    out, part = plan.out, files["activations.npy"].bytes // 12
    rounds: list[list[tuple[Path, str, Any]]] = [
        [(out, "phase", "embed")],  # the first shard
        [(out, "limit", part - 1000)],
        [(out, "phase", "index")],
        [(out, "limit", files["activations.npy"].bytes - 3)],
    ]
    fates = drive(rounds, **ALL)
    assert [fate for (fate,) in (fates[0], fates[2])] == [(-9, "")] * 2
    for ((code, message),), name in ((fates[1], "-activations.npy"), (fates[3], "/activations.npy")):
        assert code == 3
        assert "cannot write" in message
        assert name in message
    assert list(out.parent.rglob("*.partial")) == []
    build_bundle(make_plan(out, plan.data, **ALL), resume=True)
    is_finished(plan, whole)


def test_a_value_that_float16_cannot_hold_stops_the_build(plan: BuildPlan, model: Path, tmp_path: Path) -> None:
    state = load_file(model)
    state["stage1.1.weight"] = state["stage1.1.weight"] * 1e6
    state["stage2.0.weight"] = state["stage2.0.weight"] * 1e-6  # and nothing but the activation is large
    large = tmp_path / "large.safetensors"
    save_file(state, large, metadata={"arch": "small-cnn"})
    with pytest.raises(BuildError, match=r"tail layer 'auto' reach [1-9.]+e\+0[5-7]; .* float16, which ends at 65504"):
        build_bundle(replace(plan, model=large))
    assert not plan.out.exists()
    build_bundle(replace(plan, model=large, tail_layer=None, out=tmp_path / "without"))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("stage9", ModelError, "no layer 'stage9'"),
        ("linear", ModelError, "behind the layer 'linear' there is nothing to train"),
    ],
)
def test_a_tail_that_cannot_be_is_said_before_anything_is_written(
    plan: BuildPlan, layer: str, error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_bundle(replace(plan, tail_layer=layer))
    assert list(plan.out.parent.iterdir()) == []


def test_a_disk_on_which_parts_and_whole_do_not_fit_is_refused(
    plan: BuildPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are there at the same time. Pixels 3 * 128 * 64 bytes, activations 3 * 128 * 1024 of 2 bytes each."""
    needed = 3 * 128 * (64 + 2 * 2 * 1024)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed - 200))
    with pytest.raises(BuildError, match=r"needs at least 1\.6 MB more"):
        build_bundle(plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed))
    build_bundle(plan)


def test_joining_is_what_numpy_would_save_without_holding_it_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 99, (rows, 64, 32, 32)).astype(np.float16) for rows in (40, 40, 40, 7)]
    workspace, names = Workspace(tmp_path / "out", tmp_path), []
    for number, part in enumerate(parts):
        names.append(f"{number}.npy")
        workspace.write_array(names[-1], part)
    np.save(tmp_path / "wanted.npy", np.concatenate(parts))
    tracemalloc.start()
    workspace.join_arrays("joined.npy", names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "joined.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()
    assert peak < parts[-1].nbytes / 2


# The metric


@pytest.mark.parametrize(("metric", "factory"), [("cosine", "auto"), ("ip", "auto"), ("ip", "HNSW8"), ("l2", "auto")])
def test_the_metric_is_the_bundles(plan: BuildPlan, metric: Any, factory: str) -> None:
    build_bundle(replace(plan, metric=metric, index=factory, attacks=()))
    bundle = Bundle.open(plan.out)
    assert bundle.manifest.metric == bundle.index().metric == metric
    points = np.array(bundle.embeddings, dtype=np.float64)
    products = points @ points.T
    lengths = np.linalg.norm(points, axis=1)
    distances = {
        "ip": -products,
        "cosine": 1 - products / np.outer(lengths, lengths),
        "l2": lengths[:, None] ** 2 + lengths**2 - 2 * products,
    }[metric]
    found = bundle.index().search(torch.from_numpy(np.array(bundle.embeddings)), 5)
    assert (np.abs(found.distances[:, 0].numpy() - distances.min(1)) < 1e-4).mean() > 0.8
    if factory == "auto":  # the other one is approximate
        np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :5], atol=1e-4)


def test_an_unknown_metric_is_refused(plan: BuildPlan) -> None:
    with pytest.raises(OptionError, match="'l3' is unknown; allowed: l2, cosine, ip"):
        replace(plan, metric="l3")  # type: ignore[arg-type]


# Attacks on defences


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pgd10@none", "pgd10-at-none"),
        ("fgsm@webnn:neighbors=64", "fgsm-at-webnn-neighbors-64"),
        ("pgd3@rmc:neighbors=64", "pgd3-at-rmc-neighbors-64"),
    ],
)
def test_copies_have_names_that_files_can_have(plan: BuildPlan, text: str, name: str) -> None:
    copy = replace(plan, attacks=(text,)).copies()[1]
    assert (copy.name, copy.defense) == (name, text.partition("@")[2])
    assert copy.attack is not None
    assert copy.attack.epsilon == plan.epsilon


def test_long_texts_still_have_names_of_their_own() -> None:
    from index_builder.plan import _read_copy

    texts = [f"pgd10@rmc:{'neighbors=64,' * 40}x={number}/../.." for number in range(3)]
    names = {_read_copy(text, Epsilon(8)).name for text in texts}
    assert len(names) == 3
    assert all(len(name) < 120 and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        (("pgd2@nonsense",), "unknown defence 'nonsense'"),
        (("pgd2@",), "unknown defence ''"),
        (("pgd2@webnn:neighbours=3",), "neighbours"),
        (("cw@none",), "unknown attack 'cw'"),
        (("pgd2@none", "pgd2@none"), "named twice"),
        (
            ("pgd2@webnn:neighbors=8", "pgd2@webnn:neighbors= 8"),
            "one name in clean, pgd2-at-webnn-neighbors-8, pgd2-at",
        ),
        (("pgd2", "pgd2@none:x=1"), "none takes no options"),
    ],
)
def test_a_wrong_defence_is_said_before_any_work(plan: BuildPlan, attacks: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(plan, attacks=attacks)


def test_a_defence_that_this_bundle_cannot_have_is_said_before_anything_is_written(plan: BuildPlan) -> None:
    attacked = replace(plan, attacks=("pgd2@rmc:scope=tail",), tail_layer=None)
    with pytest.raises(InputError, match="tail"):
        build_bundle(attacked)
    assert list(plan.out.parent.iterdir()) == []


def test_an_image_needs_others_to_be_defended_by(plan: BuildPlan) -> None:
    with pytest.raises(OptionError, match="128 images, batch size 128"):
        replace(plan, batch_size=128, shard_size=128)
    replace(plan, batch_size=128, shard_size=128, attacks=("pgd2",))


def test_an_attacked_defence_works_on_the_copies_before_and_on_no_copy_of_its_own_images(
    plan: BuildPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defence that writes down all that it could find, and of what."""
    seen: list[tuple[list[int], set[int]]] = []

    @dataclass
    class Watching:
        resources: Resources

        def surrogate(self, images: torch.Tensor, *, generator: torch.Generator, budget: Budget) -> torch.Tensor:
            index, store = self.resources.index, self.resources.exemplars
            assert len(store) == len(store.labels) == len(store.features) == len(store.predictions) == 256
            assert store.activations is not None
            assert len(store.activations) == 256
            some = torch.tensor([0, 127, 128, 255])
            wanted = self.resources.classifier.trace(to_images(store.pixels(some))).activation
            assert wanted is not None
            assert torch.equal(store.gather_activations(some), wanted.half())
            found = index.search(self.resources.classifier.embed(images), 9999).ids
            assert all(set(row) == set(found[0].tolist()) for row in found.tolist())
            sources = [self._source(image) for image in images]
            seen.append((sources, set(found[0].tolist())))
            return self.resources.classifier(images)

        def _source(self, image: torch.Tensor) -> int:
            clean = to_images(self.resources.exemplars.pixels(torch.arange(128)))
            return int((clean - image).abs().amax((1, 2, 3)).argmin())

    real = attackers.build_defence
    monkeypatch.setattr(
        attackers, "build_defence", lambda text, res: Watching(res) if len(res.exemplars) == 256 else real(text, res)
    )
    build_bundle(plan)
    assert len(seen) == 8 * 3  # batches of 16, two steps and the end
    assert sorted({source for sources, _ in seen for source in sources}) == list(range(128))
    for sources, found in seen:
        assert found == {i for i in range(256) if i % 128 not in sources}


@pytest.mark.parametrize("text", ["webnn:neighbors=8", "rmc:neighbors=32"])
def test_the_pixels_are_what_a_slow_and_obvious_attack_finds(plan: BuildPlan, text: str) -> None:
    """Everything rebuilt by hand from the finished bundle, one batch at a time, its own images left out."""
    plan = replace(plan, attacks=("pgd2", f"pgd2@{text}"), metric="l2")
    build_bundle(plan)
    bundle = Bundle.open(plan.out)
    names, resources = bundle.manifest.layout.copies, Resources.load(bundle)
    assert bundle.manifest.copies[2].defense == text
    assert (bundle.manifest.copies[1].defense, bundle.manifest.copies[2].epsilon) == (None, "16/255")
    classifier, store = resources.classifier, resources.exemplars
    attack = plan.copies()[2].attack
    assert attack is not None
    moved = 0
    for shard in range(4):
        from index_builder.shards import _shard_seed

        generator = torch.Generator().manual_seed(_shard_seed(plan, 2, shard))
        for start in (32 * shard, 32 * shard + 16):
            clean = torch.from_numpy(plan.data.images[start : start + 16])
            kept = [i for i in range(256) if not start <= i % 128 < start + 16]
            assert store.activations is not None
            others = ExemplarStore(
                Layout(sources=112, copies=names[:2], shard_size=112),
                shards=[store.pixels(torch.tensor(kept[k : k + 112])).numpy() for k in (0, 112)],
                labels=store.labels[kept[:112]].numpy(),
                features=store.features[kept].numpy(),
                predictions=store.predictions[kept].numpy(),
                activations=store.activations[kept].numpy(),
            )
            index = NeighborIndex.build(bundle.embeddings[kept])
            defence = build_defence(text, Resources(classifier=classifier, index=index, exemplars=others))
            with torch.no_grad():
                answers = classifier(to_images(clean)).argmax(1)
            found = attack.run(
                lambda images, d=defence, g=generator: d.surrogate(images, generator=g, budget=Budget()),
                clean,
                answers,
                generator=generator,
            )
            stored = store.pixels(torch.arange(256 + start, 256 + start + 16))
            assert int((found.int() - clean.int()).abs().max()) == 16
            moved += int((found != stored).sum())
            # Sums over other neighbours in another order round differently, and a sign may turn.
    assert moved < 0.01 * 128 * 64
    plain = store.pixels(torch.arange(128, 256))
    assert (plain != store.pixels(torch.arange(256, 384))).any()


# Builds of before


def test_a_plain_build_is_what_it_was_before_there_was_any_of_this(few: LabelledImages, tmp_path: Path) -> None:
    """A manifest without the new fields opens with the same meaning and is written without them."""
    plan = make_plan(tmp_path / "bundle", few)
    build_bundle(plan)
    file = plan.out / "manifest.json"
    content = json.loads(file.read_text())
    assert {"metric", "tail_layer"}.isdisjoint({*content, *content["model"]})
    assert all("defense" not in copy for copy in content["copies"])
    for key in ("metric", "tail_layer"):  # an earlier build did not have them in its plan either
        del content["plan"][key]
    raw = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    file.write_bytes(raw)
    old = Bundle.open(plan.out)
    assert old.manifest.encode() == raw
    assert (old.manifest.metric, old.manifest.model.tail_layer, old.activations) == ("l2", None, None)
    assert not old.classifier().has_tail
    assert [copy.defense for copy in old.manifest.copies] == [None] * 3
    found = finished_bundle(plan)
    assert found is not None
    for change, message in [
        ({"metric": "ip"}, "metric was 'l2', now 'ip'"),
        ({"tail_layer": "auto"}, "tail_layer was None, now 'auto'"),
    ]:
        with pytest.raises(BuildError, match=message):
            finished_bundle(replace(plan, **change))  # type: ignore[arg-type]


def test_another_tail_or_metric_does_not_go_on_with_an_interrupted_build(plan: BuildPlan) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_bundle(plan, progress=stop_at("embed", 1))
    for change, message in [
        ({"metric": "l2"}, "metric was 'cosine', now 'l2'"),
        ({"tail_layer": None}, "tail_layer was 'auto', now None"),
        ({"attacks": ("pgd2", "pgd2@none")}, "attacks was"),
    ]:
        with pytest.raises(BuildError, match=message):
            build_bundle(replace(plan, **change), resume=True)  # type: ignore[arg-type]
