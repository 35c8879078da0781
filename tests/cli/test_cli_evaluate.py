"""``evaluate`` as a user gives it: what it writes and where, its exit codes, and that bad input leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = (
    "--threads",
    1,
    "--rounds",
    1,
    "--steps",
    10,
    "--queries",
    10,
    "--repeats",
    2,
    "--gate-images",
    5,
    "--curve-images",
    0,
)
ASKED = ("--dataset", "digits[test,:6]", "--defense", "rmc", "--attacks", "standard", "--epsilon", "16/255", *TINY)
FILES = {"work", "evaluation.json", "samples.jsonl", "junit.xml", "report.html"}


@pytest.fixture
def bundle(digits_bundle: Path, tmp_path: Path) -> Path:
    """One of its own, to write a card into."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "bundle"))


def test_it_writes_a_report_and_the_card_that_verify_reads(mithridate: Callable, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    first = mithridate("evaluate", bundle, *ASKED, "--no-card", "--out", out)
    assert first.code == 0, first.err
    assert {path.name for path in out.iterdir()} == FILES
    for text in ("6 images, epsilon 16/255, standard attacks", "none", "rmc", "worst case", "verdict"):
        assert text in first.out
    assert f"report: {out / 'report.html'}" in first.err
    assert not (bundle / "card.json").exists()
    assert json.loads(mithridate("verify", bundle, "--json").out)["card"] is None

    refused = mithridate("evaluate", bundle, *ASKED, "--out", out)
    assert refused.code == 2
    assert "--resume" in refused.err
    assert not (bundle / "card.json").exists()

    cells = {file.name: file.stat().st_mtime_ns for file in (out / "work").glob("*.npz")}
    again = mithridate("evaluate", bundle, *ASKED, "--out", out, "--resume", "--strict", "--json")
    assert {file.name: file.stat().st_mtime_ns for file in (out / "work").glob("*.npz")} == cells
    content = json.loads(again.out)
    assert content == json.loads((out / "evaluation.json").read_text())
    assert [one["name"] for one in content["defences"]] == ["none", "rmc"]
    rulings = {one["ruling"] for one in content["defences"]}
    assert again.code == (1 if rulings & {"harmful", "not trustworthy"} else 0)

    verified = mithridate("verify", bundle, "--json")
    assert verified.code == 0
    card = json.loads(verified.out)["card"]
    assert (card["images"], card["epsilon"], card["suite"]) == (6, "16/255", "standard")
    assert [entry["name"] for entry in card["defenses"]] == ["none", "rmc"]
    for entry, one in zip(card["defenses"], content["defences"], strict=True):
        assert entry["worst_case"]["right"] == sum(one["worst"])

    other = mithridate("evaluate", bundle, *ASKED, "--out", out, "--resume", "--seed", 5)
    assert other.code == 2
    assert "seed" in other.err
    assert json.loads((out / "evaluation.json").read_text()) == content, "what was there is left alone"


def making_up(monkeypatch: pytest.MonkeyPatch, ruling: str) -> None:
    """Nothing is attacked: every defence that is asked for gets the ``ruling``, of so many images as there are."""
    import mithridate.evaluation.evaluate as module
    from mithridate.evaluation.findings import DefenceFindings, Evaluation

    def one(name: str, said: str, images: int) -> DefenceFindings:
        right = (True,) * images
        return DefenceFindings(
            name=name, description="", random=False, clean=right, cells=(), worst=(*right[1:], False),
            latency_factor=1.0, gates=(), clean_cost=None, gain=None, ruling=said, reasons=("because",),  # type: ignore[arg-type]
        )  # fmt: skip

    def made(plan: module.EvaluationPlan, work: Path, **_: object) -> Evaluation:
        work.mkdir(parents=True)
        images = len(plan.data)
        return Evaluation(
            command="", created="2026-01-01T00:00:00+00:00", seconds=1.0, environment={},
            bundle={"name": "digits", "digest": plan.bundle.digest},
            dataset={"spec": plan.data.spec, "fingerprint": plan.data.fingerprint()},
            classes=tuple(plan.data.classes), images=images, labels=tuple(plan.data.labels.tolist()),
            epsilon=str(plan.epsilon), seed=plan.seed, suite=plan.suite, effort=plan.effort.in_numbers(),
            defences=(one("none", "base", images), *(one(name, ruling, images) for name in plan.defenses)),
        )  # fmt: skip

    monkeypatch.setattr(module, "evaluate", made)


@pytest.mark.parametrize(("ruling", "code"), [("harmful", 1), ("not trustworthy", 1), ("gain", 0)])
def test_strict_says_by_its_exit_code_what_was_found(
    ruling: str, code: int, mithridate: Callable, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With findings made up, so that each ruling occurs."""
    making_up(monkeypatch, ruling)
    asked = ("evaluate", digits_bundle, *ASKED, "--no-card")
    assert mithridate(*asked, "--out", tmp_path / "strict", "--strict").code == code
    assert mithridate(*asked, "--out", tmp_path / "plain").code == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--defense", "nonsense"), "nonsense"),
        (("--defense", "rmc:gate=7"), "gate"),
        (("--defense", "prm"), "no PRM"),
        (("--defense", "rmc:scope=tail"), "tail"),
        (("--steps", 0), "steps 0 is out of range"),
        (("--rounds", 0), "rounds 0 is out of range"),
        (("--minutes", 0), "allowed: above 0"),
        (("--minutes", "nan"), "allowed: above 0"),
        (("--minutes", "inf"), "minutes inf is out of range"),
        (("--gate-images", 1), "allowed: 5 to"),
        (("--epsilon", "0.03"), "as in 8/255"),
        (("--epsilon", "0/255"), "epsilon 0/255"),
        (("--attacks", "some"), "standard"),
        (("--dataset", "digits[test,:0]"), ""),
        (("--dataset", "npz:nowhere.npz"), "nowhere.npz"),
        (("--load", "nowhere.json"), "nowhere.json cannot be read"),
        (("--load", __file__), "is no summary of a load test"),
        (("--device", "cuda:99"), "cuda"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: tuple[object, ...], says: str, mithridate: Callable, digits_bundle: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in digits_bundle.iterdir())
    result = mithridate("evaluate", digits_bundle, *ASKED, "--out", tmp_path / "out", *options)
    assert result.code == 2
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("error: ")
    assert says in result.err
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in digits_bundle.iterdir()) == before


def test_a_list_is_no_summary_and_another_data_set_does_not_fit(
    mithridate: Callable, digits_bundle: Path, tmp_path: Path
) -> None:
    import numpy as np

    (tmp_path / "list.json").write_text("[1, 2]")
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "colour.npz",
        images=random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        labels=np.arange(6) % 3,
    )
    for options in (("--load", tmp_path / "list.json"), ("--dataset", f"npz:{tmp_path / 'colour.npz'}")):
        result = mithridate("evaluate", digits_bundle, *ASKED, "--out", tmp_path / "out", *options)
        assert result.code == 2
        assert result.err.count("\n") == 1, result.err
        assert not (tmp_path / "out").exists()


def test_a_report_does_not_spoil_the_bundle(mithridate: Callable, bundle: Path) -> None:
    for out in (bundle, bundle / "report", bundle / ".." / bundle.name / "deep" / "report"):
        refused = mithridate("evaluate", bundle, *ASKED, "--resume", "--out", out)
        assert refused.code == 2
        assert "lies in the bundle" in refused.err
    assert mithridate("verify", bundle).code == 0


def test_a_glance_does_not_replace_what_was_measured_with_more(
    mithridate: Callable, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making_up(monkeypatch, "no evidence of gain")

    def evaluate(name: str, *options: object) -> str:
        found = mithridate("evaluate", bundle, *ASKED, "--out", tmp_path / name, *options)
        assert found.code == 0, found.err
        return found.err

    def card() -> dict[str, object]:
        return json.loads((bundle / "card.json").read_text())

    evaluate("first")
    first = card()
    assert first["effort"] == {
        "rounds": 1, "steps": 10, "queries": 10, "repeats": 2, "gate_images": 5, "minutes": 20.0
    }  # fmt: skip
    said = evaluate("glance", "--dataset", "digits[test,:5]")
    assert "keeps its card: this run was weaker (5 images, not 6)" in said
    assert card() == first

    evaluate("another", "--defense", "webnn")  # beside rmc, which ASKED names
    assert [entry["name"] for entry in card()["defenses"]] == ["none", "rmc", "webnn"]
    evaluate("again")
    assert [entry["name"] for entry in card()["defenses"]] == ["none", "rmc", "webnn"], (
        "what only the old one has stays"
    )
    assert "no longer on the bundle's card: webnn" in evaluate("forced", "--dataset", "digits[test,:5]", "--card")
    assert [entry["name"] for entry in card()["defenses"]] == ["none", "rmc"]
    assert card()["images"] == 5
