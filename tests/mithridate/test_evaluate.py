"""A whole evaluation on digits, with next to no effort: what it keeps, how it goes on, and what it counts."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Defence, Resources, build_defence
from mithridate.errors import InputError, OptionError
from mithridate.evaluation.battery import Sent
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.effort import Effort, Pace, latency_factor
from mithridate.evaluation.evaluate import EvaluationPlan, evaluate
from mithridate.evaluation.findings import Evaluation
from mithridate.evaluation.report.files import samples
from mithridate.types import Epsilon

IMAGES = 6
TINY = Effort(rounds=1, steps=10, queries=20, repeats=4, probed=5, curve=0, seconds=1e9)
SAP = "sap:passes=1,attack_passes=1"


@pytest.fixture(scope="module")
def plan(digits_bundle: Path, resources: Resources, digits_test: LabelledImages) -> EvaluationPlan:
    data = replace(digits_test, images=digits_test.images[:IMAGES], labels=digits_test.labels[:IMAGES])
    return EvaluationPlan(
        bundle=Bundle.open(digits_bundle),
        resources=resources,
        data=data,
        epsilon=Epsilon(16),
        defenses=("rmc", SAP, "rmc:gate=auto"),
        effort=TINY,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation") / "work"


@pytest.fixture(scope="module")
def whole(plan: EvaluationPlan, work: Path) -> Evaluation:
    return evaluate(plan, work)


@pytest.fixture(scope="module")
def curved(plan: EvaluationPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """A smaller one, with curves of two images, and its folder."""
    folder = tmp_path_factory.mktemp("curved") / "work"
    asked = replace(plan, suite="standard", defenses=("rmc",), effort=replace(TINY, curve=2))
    return evaluate(asked, folder), folder


def told(found: Evaluation) -> dict[str, object]:
    """All that depends neither on the clock nor on rounding, which decides between points that are as good."""
    defences = tuple(
        replace(one, latency_factor=0.0, cells=tuple(replace(cell, seconds=0.0, linf=(), l2=()) for cell in one.cells))
        for one in found.defences
    )
    return replace(found, defences=defences, created="", seconds=0.0).to_json()


def stop_after(calls: int) -> Callable[[str, int, int], None]:
    left = iter(range(calls))

    def progress(what: str, done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


def test_the_base_is_first_and_one_defence_is_one_row(whole: Evaluation) -> None:
    names = [one.name for one in whole.defences]
    assert names[0] == "none"
    assert len(names) == len(set(names)) == 3
    assert "rmc" in names
    assert [one.ruling == "base" for one in whole.defences] == [True, False, False]
    assert [one.gain is None for one in whole.defences] == [True, False, False]


def test_every_defence_gets_every_attack(whole: Evaluation) -> None:
    base, rmc, sap = whole.defences
    everyone = {"white-box", "noise", "fpa", "gmsa-avg", "gmsa-min", "lock-step", "hijack", "square"}
    for one in whole.defences:
        assert everyone <= {cell.attack for cell in one.cells}
        assert all(len(cell.right) == IMAGES for cell in one.cells)
        assert not [cell.config for cell in one.cells if " object at 0x" in cell.config or len(cell.config) > 2000]
    assert {cell.attack for cell in rmc.cells} == {"transfer", "apgd", "soft-knn", *everyone}
    assert sap.cell("apgd") is not None, "attacked as hard as its base"
    assert sum("pgd" in cell.attack for cell in base.cells) == 7, "what is made on the base model is in its own row"
    for one in (base, sap):
        fpa = one.cell("fpa")
        for name in ("gmsa-avg", "gmsa-min", "lock-step"):
            same = one.cell(name)
            assert fpa is not None
            assert same is not None
            assert "nothing adapts" in same.config
            assert same.right == fpa.right


def test_the_worst_case_is_that_of_each_image(whole: Evaluation) -> None:
    for one in whole.defences:
        if not one.random:
            for right in (one.clean, *(cell.right for cell in one.cells)):
                assert all(stood <= answered for stood, answered in zip(one.worst, right, strict=True))
    assert sum(whole.defences[0].worst) < sum(whole.defences[0].clean)


def test_each_attack_on_a_defence_begins_where_transfer_ended(whole: Evaluation) -> None:
    _, rmc, _ = whole.defences
    transfer = rmc.cell("transfer")
    assert transfer is not None
    for name in ("white-box", "fpa", "gmsa-avg", "gmsa-min", "lock-step", "hijack", "soft-knn"):
        cell = rmc.cell(name)
        assert cell is not None
        assert all(late <= early for late, early in zip(cell.right, transfer.right, strict=True))


def test_a_random_defence_is_asked_again_and_again(whole: Evaluation) -> None:
    base, rmc, sap = whole.defences
    assert (base.random, rmc.random, sap.random) == (False, False, True)
    assert all(cell.repeated is not None and cell.repeated.repeats == 4 for cell in sap.cells)
    assert sap.worst_repeated is not None
    assert all(cell.repeated is None for one in (base, rmc) for cell in one.cells)
    assert base.worst_repeated is rmc.worst_repeated is None


def test_what_a_curve_is_of(curved: tuple[Evaluation, Path], whole: Evaluation) -> None:
    steps = next(curve for curve in curved[0].curves if curve.kind == "steps")
    assert set(steps.series) == {"none", "rmc"}
    for points in steps.series.values():
        assert [point.x for point in points] == list(range(0, 101, 5))
        assert all(later.y <= earlier.y for earlier, later in itertools.pairwise(points))
        assert points[0].y == 1 > points[-1].y
    curves = {curve.kind: curve for curve in whole.curves}
    assert set(curves) == {"queries", "rounds"}
    control = curves["queries"].series[f"{whole.defences[2].name}, clean asked as often"]
    assert [point.x for point in control] == [point.x for point in curves["queries"].series[whole.defences[2].name]]
    assert len(curves["queries"].series) == len(whole.defences) + 1, "what is not random needs no control"


def test_what_is_told_of_each_image(whole: Evaluation) -> None:
    lines = [line for line in samples(whole) if line["kind"] not in ("clean", "worst case")]
    assert all(0 <= line["linf"] <= 16 for line in lines)
    assert all(0 < line["l2"] <= line["linf"] / 255 * 8 + 1e-4 for line in lines if line["linf"])
    asked = [line for line in lines if line["kind"] == "black-box"]
    assert asked
    for line in asked:
        assert 0 <= line["broken_at"] <= line["queries"] <= TINY.queries
    assert not any("queries" in line for line in lines if line["kind"] == "white-box")


def test_other_clients_answers_are_looked_at(whole: Evaluation) -> None:
    (extra,) = whole.extras
    assert (extra.kind, extra.failed) == ("contamination", ())
    assert [row[0] for row in extra.rows] == [one.name for one in whole.defences]


def test_two_runs_do_not_share_a_folder(plan: EvaluationPlan, whole: Evaluation, work: Path) -> None:
    first = CellStore.open(work, plan.describe())
    with pytest.raises(OptionError, match="another evaluation is at"):
        CellStore.open(work, plan.describe())
    first.close()
    CellStore.open(work, plan.describe()).close()


def test_how_much_slower_does_not_hang_on_one_answer(plan: EvaluationPlan) -> None:
    none, pixels = build_defence("none", plan.resources), torch.from_numpy(plan.data.images)

    class Sleepy:
        """Takes longer, and once in three times very much longer."""

        calls = 0

        def predict(self, *asked: object, **how: object) -> None:
            self.calls += 1
            time.sleep(0.2 if self.calls % 3 == 0 else 0.02)

    class Even:
        def predict(self, *asked: object, **how: object) -> None:
            time.sleep(0.01)

    slow, even = cast("Defence", Sleepy()), cast("Defence", Even())
    assert 1.4 < latency_factor(slow, even, pixels, seed=0) < 2.6
    assert latency_factor(none, none, pixels, seed=0) == 1


def test_an_interrupted_run_goes_on_to_the_same_end(
    plan: EvaluationPlan, curved: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    small, folder = replace(plan, suite="standard", defenses=("rmc",)), tmp_path / "work"
    whole, complete = replace(curved[0], curves=()), curved[1]
    with pytest.raises(KeyboardInterrupt):
        evaluate(small, folder, progress=stop_after(6))
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    assert 0 < len(kept) < len(list(complete.glob("*.npz")))
    assert not list(folder.glob("*.part"))
    found = replace(evaluate(small, folder), curves=())
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept, "made again"
    assert json.dumps(told(found)) == json.dumps(told(whole))


def test_another_plans_folder_is_refused(plan: EvaluationPlan, whole: Evaluation, work: Path) -> None:
    before = sorted(file.name for file in work.iterdir())
    for other, says in (
        (replace(plan, seed=1), "seed"),
        (replace(plan, epsilon=Epsilon(8)), "epsilon"),
        (replace(plan, effort=replace(TINY, steps=20)), "effort"),
        (replace(plan, data=replace(plan.data, labels=plan.data.labels[::-1].copy())), "dataset"),
    ):
        with pytest.raises(OptionError, match=says):
            evaluate(other, work)
    assert sorted(file.name for file in work.iterdir()) == before


def test_a_defence_that_the_bundle_cannot_serve_is_said_before_anything_is_attacked(
    plan: EvaluationPlan, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="no PRM"):
        evaluate(replace(plan, defenses=("rmc", "prm")), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def made(attack: str = "fpa") -> Sent:
    pixels = torch.arange(2 * 9, dtype=torch.uint8).view(2, 1, 3, 3)
    stood = torch.tensor([[True, True], [True, False]])
    return Sent(attack=attack, kind="adaptive", config="c", pixels=pixels, seconds=1.5, steps=7, stood=stood)


def test_a_cell_comes_back_as_it_was_and_is_made_once(tmp_path: Path) -> None:
    store, calls = CellStore.open(tmp_path, {"seed": 0}), []

    def make() -> Sent:
        calls.append(1)
        return made()

    first = store.get("rmc", "fpa", make)
    store.close()
    store = CellStore.open(tmp_path, {"seed": 0})
    second = store.get("rmc", "fpa", make)
    assert len(calls) == 1
    assert torch.equal(first.pixels, second.pixels)
    assert second.stood is not None
    assert torch.equal(made().stood, second.stood)
    assert (second.steps, second.seconds, second.broken_at, second.spent) == (7, 1.5, None, None)
    assert store.get("rmc", "hijack", lambda: made("hijack")).attack == "hijack"


@pytest.mark.parametrize("content", [b"", b"PK and no more", b"not a file of arrays", None])
def test_a_broken_cell_is_named(tmp_path: Path, content: bytes | None) -> None:
    store = CellStore.open(tmp_path, {})
    store.get("rmc", "fpa", made)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    with pytest.raises(InputError, match=rf"{file.name} cannot be read .*remove it"):
        store.get("rmc", "fpa", made)


def test_results_without_their_plan_are_nobodys(tmp_path: Path) -> None:
    CellStore.open(tmp_path, {"seed": 0}).get("rmc", "fpa", made)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan.json cannot be read"):
        CellStore.open(tmp_path, {"seed": 0})
    (tmp_path / "plan.json").unlink()
    with pytest.raises(OptionError, match=r"no plan.json"):
        CellStore.open(tmp_path, {"seed": 0})


def test_the_pace_is_measured_once(tmp_path: Path) -> None:
    """Else a resumed run would say that it tried harder, or less, than the results that it found there."""
    store = CellStore.open(tmp_path, {})
    assert store.remember("rmc", lambda: {"answer": 1.0, "step": 2.0}) == {"answer": 1.0, "step": 2.0}
    assert store.remember("rmc", lambda: {"answer": 9.0, "step": 9.0}) == {"answer": 1.0, "step": 2.0}


@pytest.mark.parametrize("pace", [Pace(answer=1e-3, step=1e-3), Pace(answer=1.0, step=0.1), Pace(answer=9.0, step=9.0)])
@pytest.mark.parametrize("effort", [Effort(), TINY, Effort(rounds=1, steps=10, queries=5, probed=5, seconds=1.0)])
def test_effort_is_only_made_smaller_and_that_is_said(pace: Pace, effort: Effort) -> None:
    fitted, notes = pace.fit(effort, 100)
    names = ("rounds", "steps", "queries", "probed")
    smaller = [name for name in names if getattr(fitted, name) != getattr(effort, name)]
    assert all(getattr(fitted, name) < getattr(effort, name) for name in smaller)
    said = " ".join(notes)
    for words, which in (("rounds of", {"rounds", "steps"}), ("queries an image", {"queries"}), ("gates", {"probed"})):
        assert (words in said) == bool(which & set(smaller)), words


def test_black_box_attacks_are_made_smaller_by_what_they_ask_and_not_by_what_stands() -> None:
    effort = Effort(queries=1000, seconds=60)
    fitted, notes = Pace(answer=0.01, step=0.001).fit(effort, 0, asked=200)
    assert 200 * fitted.queries * 0.01 <= 60
    assert any("queries" in note for note in notes)
