"""Tuning: on images that are kept out of the neighbours, written beside the bundle, and from then on what rmc means."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mithridate.bundle import Bundle
from mithridate.defenses import Budget, Prediction, Resources, build_defence
from mithridate.errors import BundleError, OptionError
from mithridate.evaluation import tuner
from mithridate.evaluation.tuner import TuningPlan, tune
from mithridate.tuning import TUNING, Trial, Tuning, read_tuning, write_tuning
from mithridate.types import Epsilon

SMALL = {"anchor": ("0.001", "1000.0"), "neighbors": ("32", "64")}


@pytest.fixture
def small_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "AXES", {"rmc": SMALL, "rmc:solver=adam": {"learning_rate": ("1e-06", "0.1")}})


def trial(defense: str, clean: int = 9, attacked: int = 5, milliseconds: float = 1.0) -> Trial:
    return Trial(
        defense=defense, images=10, clean=clean, attacked_images=10, attacked=attacked, milliseconds=milliseconds
    )


@pytest.mark.usefixtures("small_axes")
def test_finds_the_setting_that_repairs_and_leaves_the_one_that_does_nothing(resources: Resources) -> None:
    tuning = tune(resources, TuningPlan(images=100, epsilon=Epsilon(32)), bundle="sha256:0")
    assert "anchor=1000" not in tuning.defense
    by_anchor = {t.defense: t.attacked for t in tuning.trials}
    useless = max(count for name, count in by_anchor.items() if "anchor=1000" in name)
    assert tuning.chosen.attacked > useless + 30
    assert tuning.chosen.score == max(t.score for t in tuning.trials)
    assert tuning.base.attacked < 20


@pytest.mark.usefixtures("small_axes")
def test_the_step_size_decides(resources: Resources) -> None:
    tuning = tune(resources, TuningPlan(start="rmc:solver=adam", images=100, epsilon=Epsilon(32)), bundle="sha256:0")
    assert "learning_rate=1e-06" not in tuning.defense
    assert tuning.defense.startswith("rmc:solver=adam")


@pytest.mark.usefixtures("small_axes")
def test_an_image_that_is_tuned_on_is_nobodys_neighbour(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own copies would lie next to it, with its true label: every setting would look perfect."""
    seen: list[torch.Tensor] = []
    answer = tuner._right

    def spy(defence, pixels, labels):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(0)
        answered: Prediction = defence.predict(pixels.float() / 255, generator=generator, budget=Budget())
        seen.extend(n.ids for n in answered.neighborhoods if n is not None)
        return answer(defence, pixels, labels)

    monkeypatch.setattr(tuner, "_right", spy)
    tune(resources, TuningPlan(images=20, seed=5, epsilon=Epsilon(32)), bundle="sha256:0")
    sources = resources.exemplars.layout.sources
    kept_out = torch.randperm(sources, generator=torch.Generator().manual_seed(5))[:20]
    found = torch.cat(seen) % sources
    assert len(found) > 0
    assert not torch.isin(found, kept_out).any()


@pytest.mark.usefixtures("small_axes")
def test_an_attacker_who_knows_the_candidate_is_never_easier_than_the_stored_attack(resources: Resources) -> None:
    plan = TuningPlan(images=30, epsilon=Epsilon(32), attack="pgd5")
    static = tune(resources, plan, bundle="sha256:0")
    adaptive = tune(resources, replace(plan, against="adaptive"), bundle="sha256:0")
    counts = {t.defense: t.attacked for t in static.trials}
    shared = [(t.attacked, counts[t.defense]) for t in adaptive.trials if t.defense in counts]
    assert shared
    assert all(against <= without for against, without in shared)
    assert any(against < without for against, without in shared)


@pytest.mark.usefixtures("small_axes")
def test_the_threshold_turns_away_the_share_of_clean_images_that_was_asked_for(resources: Resources) -> None:
    tuning = tune(resources, TuningPlan(images=200, abstain=0.1, epsilon=Epsilon(32)), bundle="sha256:0")
    assert "abstain=" in tuning.defense
    held_out = tuner._hold_out(resources, TuningPlan(images=200, epsilon=Epsilon(32)))
    defence = build_defence(tuning.defense, held_out.resources)
    answer = defence.predict(held_out.clean.float() / 255, generator=torch.Generator().manual_seed(0), budget=Budget())
    assert answer.abstained is not None
    assert 0.05 <= float(answer.abstained.double().mean()) <= 0.1


def test_what_cannot_be_tuned_is_refused_in_one_line(resources: Resources) -> None:
    for start in ("webnn", "none"):
        with pytest.raises(OptionError, match="cannot be tuned"):
            TuningPlan(start=start)
    with pytest.raises(OptionError, match="leaves too few"):
        tune(resources, TuningPlan(images=100_000), bundle="sha256:0")
    with pytest.raises(OptionError, match="too few"):
        TuningPlan(images=3)
    with pytest.raises(OptionError, match="rejection rate"):
        TuningPlan(abstain=1.5)


def test_a_tuned_bundle_serves_what_it_was_tuned_to(digits_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned"
    shutil.copytree(digits_bundle, path)
    opened = Bundle.open(path)
    assert Resources.load(opened).tuning is None
    chosen = "rmc:neighbors=32,temperature=0.75"
    tuning = Tuning(
        bundle=opened.digest, defense=chosen, against="static", seed=0, base=trial("none"), trials=(trial(chosen),)
    )
    write_tuning(path, tuning)
    assert not list(Bundle.open(path).problems())  # it is no part of the bundle, and no foreign file either
    loaded = Resources.load(Bundle.open(path))
    assert build_defence("rmc", loaded).name == chosen
    assert build_defence("rmc:preset=tuned", loaded).name == chosen
    assert build_defence("rmc:preset=tuned,neighbors=48", loaded).name == "rmc:neighbors=48,temperature=0.75"
    assert build_defence("rmc:preset=balanced", loaded).name == "rmc:preset=balanced"
    assert read_tuning(path, opened.digest) == tuning
    assert [f.name for f in tmp_path.iterdir()] == ["tuned"]  # no half-written file beside it


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema_version": 1}', "\x00"])
def test_a_damaged_tuning_is_named_and_nothing_is_served(digits_bundle: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tuned"
    shutil.copytree(digits_bundle, path)
    (path / TUNING).write_text(damage)
    with pytest.raises(BundleError, match=TUNING):
        Bundle.open(path)


def test_the_tuning_of_another_bundle_is_refused(digits_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned"
    shutil.copytree(digits_bundle, path)
    tuning = Tuning(
        bundle="sha256:other", defense="rmc", against="static", seed=0, base=trial("none"), trials=(trial("rmc"),)
    )
    (path / TUNING).write_text(json.dumps(tuning.model_dump()))
    with pytest.raises(BundleError, match="another bundle"):
        Resources.load(Bundle.open(path, verify=False))
