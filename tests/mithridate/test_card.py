"""The card: what an evaluation found, kept beside the bundle it is about and beside no other."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import GATES, synthetic, ugly

from mithridate.bundle import Bundle
from mithridate.errors import BundleError
from mithridate.evaluation.card import CARD, Card, make_card, merge, read_card, summary, warning, weaker, write_card
from mithridate.evaluation.findings import DefenceFindings, Gate, Paired

DIGEST = synthetic().bundle["digest"]


def found(name: str) -> DefenceFindings:
    return next(entry for entry in synthetic().defences if entry.name == name)


def card_with(entry: DefenceFindings) -> Card:
    return make_card(replace(synthetic(), defences=(synthetic().base, entry)))


def test_says_what_was_found() -> None:
    card = make_card(synthetic())
    assert [(entry.name, entry.ruling) for entry in card.defenses] == [
        (entry.name, entry.ruling) for entry in synthetic().defences
    ]
    entry, source = card.defense("rmc:scope=tail"), found("rmc:scope=tail")
    assert entry is not None
    assert (entry.worst_case.right, entry.worst_case.images) == (sum(source.worst), 200)
    assert entry.worst_case.low < sum(source.worst) / 200 < entry.worst_case.high
    assert source.gain is not None
    assert entry.gain is not None
    assert (entry.gain.difference, entry.gain.low, entry.gain.high) == (source.gain.difference, *source.gain.interval)
    failed = card.defense("prm+rmc")
    assert failed is not None
    assert (failed.gates_passed, failed.gates_failed) == (3, (GATES[1],))
    assert "prm: gain" in summary(card)
    assert "none" not in summary(card)


def test_a_gain_is_not_said_unless_the_interval_excludes_zero_and_every_gate_passed() -> None:
    gain = found("prm").gain
    assert gain is not None
    doubtful = replace(found("prm"), gain=replace(gain, interval=(0.0, 0.2)))
    assert card_with(doubtful).defenses[1].ruling == "no evidence of gain"
    assert card_with(replace(found("prm"), gain=None)).defenses[1].ruling == "no evidence of gain"
    failed = replace(found("prm"), gates=(Gate(id="G1", name="one", passed=False, evidence="no"),))
    assert card_with(failed).defenses[1].ruling == "not trustworthy"
    assert card_with(found("prm")).defenses[1].ruling == "gain"


def test_what_was_not_measured_is_null_and_the_file_is_json(tmp_path: Path) -> None:
    card = make_card(ugly())
    assert {entry.latency_factor for entry in card.defenses if entry.name == "always"} == {None}
    write_card(tmp_path, card)
    assert "NaN" not in (tmp_path / CARD).read_text()
    assert read_card(tmp_path, DIGEST) == card


def test_lies_in_the_bundle_without_changing_it(digits_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(digits_bundle, bundle)
    digest = Bundle.open(bundle).digest
    assert read_card(bundle, digest) is None
    card = make_card(synthetic(bundle={"digest": digest}))
    write_card(bundle, card)
    write_card(bundle, card)
    assert Bundle.open(bundle).digest == digest
    assert read_card(bundle, digest) == card
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
    write_card(bundle, make_card(synthetic()))
    with pytest.raises(BundleError, match=r"card.json is of another bundle .*; remove it or evaluate this one"):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": 2}', "\x00\xff"])
def test_a_broken_card_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / CARD).write_text(content)
    with pytest.raises(BundleError, match="not a valid card; remove it or run mithridate evaluate again"):
        read_card(tmp_path, DIGEST)


def test_numbers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    content = make_card(synthetic()).model_dump(mode="json")
    content["defenses"][1]["worst_case"]["right"] = 201
    (tmp_path / CARD).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="not a valid card"):
        read_card(tmp_path, DIGEST)


def test_what_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bundle" / CARD / "x").mkdir(parents=True)
    with pytest.raises(BundleError, match="the card cannot be written into"):
        write_card(tmp_path / "bundle", make_card(synthetic()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("defense", "says"),
    [
        ("none", None),
        ("rmc", None),
        ("prm", None),
        ("rmc:scope=tail", "Harmful on this base; 18.0 points below its base"),
        ("prm+rmc", f"Not trustworthy: the evaluation failed its own checks; failed: {GATES[1]}"),
        ("sap:passes=3", "not on this bundle's card"),
    ],
)
def test_warns_of_a_default_that_harms(defense: str, says: str | None) -> None:
    said = warning(make_card(synthetic()), defense)
    assert said is None if says is None else says in (said or "")


@pytest.mark.parametrize(("difference", "warns"), [(-0.0101, True), (-0.01, False), (0.05, False), (-1.0, True)])
def test_warns_of_more_than_a_point_below_the_base(difference: float, warns: bool) -> None:
    gain = Paired(n=200, gained=0, lost=3, difference=difference, interval=(-1.0, 1.0), p=0.5)
    card = card_with(replace(found("rmc"), gain=gain))
    assert (warning(card, "rmc") is not None) is warns


def test_no_card_is_said_too() -> None:
    assert "not evaluated" in str(warning(None, "rmc"))


def test_needs_neither_torch_nor_a_template_engine() -> None:
    code = (
        "import sys, mithridate.evaluation.card; print([m for m in ('torch', 'jinja2', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_latency_is_that_of_the_run() -> None:
    entries = {entry.name: entry.latency_factor for entry in make_card(synthetic()).defenses}
    assert entries["none"] == 1
    assert math.isclose(entries["rmc"] or 0, 2.34)


def card_of(**changes: Any) -> Card:
    effort = {"rounds": 10.0, "steps": 40.0, "queries": 1000.0}
    return make_card(synthetic()).model_copy(update={"suite": "adaptive", "effort": effort} | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({"suite": "full", "images": 1000, "epsilon": "16/255"}, []),
        ({"suite": "standard"}, ["standard attacks, not adaptive"]),
        ({"images": 3, "epsilon": "4/255"}, ["3 images, not 200", "epsilon 4/255, not 8/255"]),
        ({"effort": {"rounds": 20.0, "steps": 39.0, "queries": 10.0}}, ["steps 39, not 40", "queries 10, not 1000"]),
        ({"effort": None}, []),
    ],
)
def test_by_what_a_card_was_measured_with_less(changes: dict[str, Any], says: list[str]) -> None:
    assert list(weaker(card_of(**changes), card_of())) == says
    assert weaker(card_of(), card_of(effort=None)) == ()


def test_defences_of_the_card_before_stay_where_the_same_was_measured() -> None:
    old, only = card_of(), make_card(synthetic()).defenses[:2]
    new = card_of(defenses=only, created="later")
    both = merge(new, old)
    assert both.created == "later"
    assert both.defenses[:2] == only
    assert {entry.name for entry in both.defenses} == {entry.name for entry in old.defenses}
    assert merge(card_of(defenses=only, seed=5), old).defenses == only
