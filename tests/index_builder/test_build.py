"""A build: everything in the bundle is what it says, and the same plan gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from index_builder.build import BuildPlan, build_bundle, finished_bundle
from index_builder.training import TrainingPlan, train_classifier
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.errors import BuildError, BundleError, ModelError, OptionError
from mithridate.models import load_classifier, save_weights
from mithridate.types import Epsilon, to_images


@pytest.fixture(scope="module")
def few(digits_train: LabelledImages) -> LabelledImages:
    return LabelledImages(
        images=digits_train.images[:200],
        labels=digits_train.labels[:200],
        classes=digits_train.classes,
        spec="few[:200]",
    )


@pytest.fixture(scope="module")
def model(few: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one's own, wrong often enough to tell labels from predictions."""
    path = tmp_path_factory.mktemp("model") / "own.safetensors"
    save_weights(train_classifier(few, TrainingPlan(epochs=3)), path)
    return path


@pytest.fixture
def plan(few: LabelledImages, model: Path, tmp_path: Path) -> BuildPlan:
    return BuildPlan(
        data=few, out=tmp_path / "bundle", model=model, attacks=("pgd3", "fgsm"), epsilon=Epsilon(16), shard_size=64
    )


def array(bundle: Path, name: str) -> Any:
    return np.load(bundle / name, allow_pickle=False)


def test_everything_is_what_the_manifest_says(plan: BuildPlan, model: Path) -> None:
    summary = build_bundle(plan)
    manifest = Bundle.open(plan.out).manifest  # verifies the digests
    data, classifier = plan.data, load_classifier(model, arch=None, num_classes=10, image_shape=(1, 8, 8))
    assert [copy.name for copy in manifest.copies] == ["clean", "pgd3", "fgsm"]
    assert array(plan.out, "labels.npy").tolist() == data.labels.tolist()
    predictions = array(plan.out, "predictions.npy").reshape(3, 200)
    for row, entry in enumerate(manifest.copies):
        shards = [array(plan.out, f"exemplars/{entry.name}-{shard:05d}.npy") for shard in range(4)]
        assert [len(shard) for shard in shards] == [64, 64, 64, 8]
        pixels = np.concatenate(shards)
        distance = np.abs(pixels.astype(int) - data.images.astype(int)).max()
        assert distance == (0 if entry.name == "clean" else 16)
        with torch.no_grad():
            answers = classifier(to_images(torch.from_numpy(pixels))).argmax(1).numpy()
            embeddings = classifier.embed(to_images(torch.from_numpy(pixels))).numpy()
        assert np.array_equal(predictions[row], answers)
        np.testing.assert_allclose(array(plan.out, "embeddings.npy")[row * 200 :][:200], embeddings, atol=1e-5)
        assert entry.base_correct == int((answers == data.labels).sum())
        assert summary.accuracy[entry.name] == entry.base_correct / 200
    clean, pgd, fgsm = manifest.copies
    assert clean.base_correct > pgd.base_correct
    assert (pgd.epsilon, pgd.steps, pgd.random_start) == ("16/255", 3, True)
    assert (fgsm.epsilon, fgsm.steps, fgsm.random_start) == ("16/255", 1, False)
    assert (manifest.name, manifest.dataset.spec, manifest.index) == ("few-small-cnn", "few[:200]", "Flat")
    assert manifest.dataset.fingerprint == data.fingerprint()
    assert (summary.images, summary.exemplars, summary.embedding_dim) == (200, 600, embeddings.shape[1])
    assert summary.digest == f"sha256:{hashlib.sha256((plan.out / 'manifest.json').read_bytes()).hexdigest()}"
    assert summary.bytes == sum(file.stat().st_size for file in plan.out.rglob("*") if file.is_file())
    assert not summary.trained
    assert [path.name for path in plan.out.parent.iterdir()] == ["bundle"]


def test_attacks_aim_at_the_models_own_answer(plan: BuildPlan, model: Path) -> None:
    """No label leaks into the exemplars: other labels, same pixels."""
    build_bundle(plan)
    shuffled = replace(plan.data, labels=np.roll(plan.data.labels, 1))
    build_bundle(replace(plan, data=shuffled, out=plan.out.with_name("other")))
    for name in ("exemplars/pgd3-00000.npy", "exemplars/fgsm-00003.npy", "embeddings.npy"):
        assert np.array_equal(array(plan.out, name), array(plan.out.with_name("other"), name))


def test_the_same_plan_gives_the_same_bytes_anywhere(few: LabelledImages, tmp_path: Path) -> None:
    """Training included. No time, no host, no path: what is not part of the plan is not part of the bundle."""
    plans = [
        BuildPlan(data=few, out=tmp_path / name, attacks=("pgd2",), training=TrainingPlan(epochs=2), shard_size=64)
        for name in ("one", "deep/er/two")
    ]
    first, second = (build_bundle(plan) for plan in plans)
    assert first.digest == second.digest
    assert first.trained
    raw = (tmp_path / "one" / "manifest.json").read_text()
    for private in (str(tmp_path), "one", socket.gethostname()):
        assert private not in raw or len(private) < 4
    assert json.loads(raw)["built_with"].keys() == {"mithridate", "torch", "torchvision"}
    for file in (tmp_path / "one").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "deep/er/two" / file.relative_to(tmp_path / "one")).read_bytes()
    assert build_bundle(replace(plans[0], out=tmp_path / "three", seed=1)).digest != first.digest


def test_files_can_be_read_by_whoever_serves_them(plan: BuildPlan) -> None:
    """A service often runs as another user than the builder."""
    build_bundle(plan)
    plain = plan.out.parent / "plain"
    plain.touch()
    modes = {file.stat().st_mode for file in plan.out.rglob("*") if file.is_file()}
    assert modes == {plain.stat().st_mode}


def test_weights_without_a_header_need_the_architecture(plan: BuildPlan, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(model), bare)
    with pytest.raises(ModelError, match="--arch"):
        build_bundle(replace(plan, model=bare))
    told = replace(plan, model=bare, arch="small-cnn", mean=(0.25,), std=(0.5,), name="mine")  # nothing is in the way
    build_bundle(told)
    manifest = Bundle.open(told.out).manifest
    assert (manifest.name, manifest.model.mean, manifest.model.std) == ("mine", (0.25,), (0.5,))
    assert Bundle.open(told.out).classifier().spec.mean == (0.25,)


def test_a_missing_model_is_said_before_anything_is_written(plan: BuildPlan, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file at"):
        build_bundle(replace(plan, model=tmp_path / "none.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_a_users_network_and_its_bundle(plan: BuildPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def make(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    (tmp_path / "built_nets.py").write_text(f"from torch import nn\n{source}")
    monkeypatch.syspath_prepend(tmp_path)
    build_bundle(replace(plan, model=None, arch="built_nets:make", training=TrainingPlan(epochs=2)))
    loaded = Resources.load(Bundle.open(plan.out), allow_factory="built_nets:make")
    assert torch.equal(loaded.exemplars.features[:200], to_images(torch.from_numpy(plan.data.images)).flatten(1))


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8"])
def test_another_index_is_built_and_used(plan: BuildPlan, factory: str) -> None:
    build_bundle(replace(plan, index=factory))
    bundle = Bundle.open(plan.out)
    assert bundle.manifest.index == factory
    found = bundle.index().search(torch.from_numpy(np.array(bundle.embeddings[:5])), 1)
    assert found.distances.max() == 0


def test_a_separate_embedding_layer_keeps_the_heads_input_beside_it(plan: BuildPlan, few: LabelledImages) -> None:
    build_bundle(replace(plan, embedding_layer="stage1"))
    bundle = Bundle.open(plan.out)
    assert "features.npy" in bundle.manifest.files
    resources = Resources.load(bundle)
    exemplars, head = resources.exemplars, resources.classifier.head
    assert exemplars.features.shape == (600, head.in_features)
    assert bundle.embeddings.shape == (600, 64)
    assert torch.equal(head(exemplars.features).argmax(1).int(), exemplars.predictions)
    images, labels = torch.from_numpy(few.images[:64]), torch.from_numpy(few.labels[:64])
    attack = parse_attack("pgd10", epsilon=Epsilon(32))
    found = to_images(attack.run(resources.classifier, images, labels, generator=torch.Generator().manual_seed(0)))
    for text in ("rmc", "rmc:scope=all,neighbors=20,epochs=1", "webnn", "deepnn"):
        answer = build_defence(text, resources).predict(
            found[: 64 if text == "rmc" else 2], generator=torch.Generator().manual_seed(0), budget=Budget()
        )
        assert torch.isfinite(answer.scores).all()
        if text == "rmc":
            defended, base = (
                float((s.argmax(1) == labels).float().mean()) for s in (answer.scores, answer.base_scores)
            )
            assert defended > base


def test_embeddings_that_overflow_stop_the_build(plan: BuildPlan, model: Path, tmp_path: Path) -> None:
    state = {key: value * 1e20 if value.ndim == 4 else value for key, value in load_file(model).items()}
    broken = tmp_path / "broken.safetensors"
    save_file(state, broken, metadata={"arch": "small-cnn"})
    with pytest.raises(BuildError, match="NaN or infinite embeddings"):
        build_bundle(replace(plan, model=broken))
    assert not plan.out.exists()


def test_an_index_that_faiss_refuses_is_an_option_error(plan: BuildPlan) -> None:
    with pytest.raises(OptionError, match="FAISS refuses the index 'IVF9999,Flat'"):
        build_bundle(replace(plan, index="IVF9999,Flat"))
    assert not plan.out.exists()


def test_progress_reaches_the_end(plan: BuildPlan) -> None:
    seen: list[tuple[str, int, int]] = []
    build_bundle(plan, progress=lambda *state: seen.append(state))
    shards = [(done, total) for phase, done, total in seen if phase != "index"]
    assert shards == sorted(shards)
    assert shards[-1] == (600, 600)
    assert [phase for phase, *_ in seen] == ["embed"] * 4 + ["attack pgd3"] * 4 + ["attack fgsm"] * 4 + ["index"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ("pgd3", "pgd3")}, "an attack is named twice in pgd3, pgd3"),
        ({"attacks": ("pgd3", "cw")}, "unknown attack 'cw'"),
        ({"batch_size": 65}, "batch size 65 must be from 1 to the shard size, 64"),
        ({"batch_size": 0}, "batch size 0"),
        ({"shard_size": 0, "batch_size": 0}, "batch size 0"),
    ],
)
def test_bad_options_are_refused(plan: BuildPlan, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(plan, **options)


def test_no_attack_at_all_gives_a_bundle_of_clean_exemplars(plan: BuildPlan) -> None:
    summary = build_bundle(replace(plan, attacks=()))
    assert summary.exemplars == 200
    assert list(summary.accuracy) == ["clean"]


def test_a_finished_bundle_of_the_same_plan_is_found(plan: BuildPlan) -> None:
    assert finished_bundle(plan) is None
    built = build_bundle(plan)
    found = finished_bundle(plan)
    assert found is not None
    assert found.digest == built.digest
    for change, message in [({"seed": 1}, "seed was 0, now 1"), ({"index": "HNSW8"}, "index was 'Flat', now 'HNSW8'")]:
        with pytest.raises(BuildError, match=message):
            finished_bundle(replace(plan, **change))
    (plan.out / "labels.npy").write_bytes(b"")
    with pytest.raises(BundleError, match=r"labels\.npy"):
        finished_bundle(plan)
