"""Tables beside the matrix, in the report: shown as they are, read back, and red where an attack succeeded that must
not."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from evaluation_helpers import HOSTILE, synthetic
from extras_helpers import APART, COST, STANDS

from mithridate.evaluation.findings import Entry, Evaluation, Extra, Share
from mithridate.evaluation.reader import evaluation_from_json, to_json_text
from mithridate.evaluation.report.junit import junit_xml
from mithridate.evaluation.report.page import render
from mithridate.evaluation.report.threats import techniques
from mithridate.evaluation.wording import entry_text


def evaluation(*extras: Extra) -> Evaluation:
    return synthetic(50, extras=extras, service=None)


def test_what_was_asked_reads_back() -> None:
    made = evaluation(COST, APART, STANDS)
    assert evaluation_from_json(json.loads(to_json_text(made))) == made
    older = json.loads(to_json_text(made))
    del older["extras"]
    assert evaluation_from_json(older).extras == ()


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (None, "–"),  # noqa: RUF001
        ("Flat", "Flat"),
        (1250, "1,250"),
        (6e-08, "6.0e-08"),
        (0.0, "0"),
        (17.25, "17.2"),
        (float("nan"), "–"),  # noqa: RUF001
        (Share(right=45, n=50), "90.0 % (78.6–95.7)"),  # noqa: RUF001
        (Share(right=0, n=0), "not measured"),
    ],
)
def test_entries_are_said_with_what_they_rest_on(entry: Entry, text: str) -> None:
    assert entry_text(entry) == text


def test_the_page_says_which_attack_succeeded_that_must_not() -> None:
    page = render(evaluation(COST, APART, STANDS))
    assert '<a href="#extras">' in page
    assert "Succeeded, and must not, against &lt;" in page
    assert page.count("Failed against every defence, as it must.") == 0
    assert "90.0 % <small>78.6–95.7</small>" in page  # noqa: RUF001
    assert HOSTILE not in page
    assert "Failed against every defence, as it must." in render(
        evaluation(Extra(**{**vars(APART), "failed": (), "rows": APART.rows[:1]}))
    )
    assert "extras" not in render(evaluation()).partition("<body>")[2]


def test_a_build_goes_red_for_contamination() -> None:
    root = ElementTree.fromstring(junit_xml(evaluation(COST, APART)))
    (suite,) = [suite for suite in root if suite.get("name") == APART.title]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    passed, failed = suite.findall("testcase")
    assert passed.find("failure") is None
    assert failed.find("failure") is not None
    assert "changed answers: 3" in (failed.findtext("failure") or "")
    plain = ElementTree.fromstring(junit_xml(evaluation()))
    assert int(root.get("failures", "")) == int(plain.get("failures", "")) + 1
    assert int(root.get("tests", "")) == int(plain.get("tests", "")) + 2


def test_atlas_names_cost_and_contamination_where_they_were_run() -> None:
    named = {"AML.T0034", "AML.T0029", "AML.T0031"}
    assert not named & {entry.id for entry in techniques(evaluation(STANDS))}
    assert named & {entry.id for entry in techniques(evaluation(COST))} == {"AML.T0034", "AML.T0029"}
    assert named & {entry.id for entry in techniques(evaluation(APART))} == {"AML.T0031"}
    loaded = synthetic(50, extras=(COST,))
    assert [e.by for e in techniques(loaded) if e.id == "AML.T0029"] == ["Cost attack, the load test"]
