"""The report: whatever an evaluation found is shown as it is, and nothing that could be taken for more."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from evaluation_helpers import ATTACKS, DEFENCES, HOSTILE, LONG, findings, paired, synthetic, ugly

from mithridate.errors import InputError, OptionError
from mithridate.evaluation.findings import Evaluation
from mithridate.evaluation.reader import evaluation_from_json, read_evaluation, to_json_text
from mithridate.evaluation.report import write_report
from mithridate.evaluation.report.junit import junit_xml
from mithridate.evaluation.report.matrix import heat, sheets
from mithridate.evaluation.report.page import render
from mithridate.evaluation.report.threats import mitigations, techniques
from mithridate.evaluation.report.verdicts import headline

FILES = {"evaluation.json", "samples.jsonl", "junit.xml", "report.html"}
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Reads a page strictly: what is opened must be closed, and in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, attribute: str) -> set[str]:
        return {value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None}


@pytest.fixture(scope="module", params=["fair", "ugly"])
def evaluation(request: pytest.FixtureRequest) -> Evaluation:
    return synthetic() if request.param == "fair" else ugly()


@pytest.fixture(scope="module")
def page(evaluation: Evaluation) -> Page:
    return Page(render(evaluation))


# Files


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    written = write_report(synthetic(), tmp_path / "a" / "out")
    assert {path.name for path in written} == FILES == {path.name for path in (tmp_path / "a" / "out").iterdir()}
    assert read_evaluation(written[0]) == synthetic()


def test_what_was_not_measured_survives_the_way_through_json() -> None:
    text = to_json_text(ugly())
    assert "NaN" not in text
    back = evaluation_from_json(json.loads(text))
    assert math.isnan(next(found for found in back.defences if found.name == "always").latency_factor)
    assert to_json_text(back) == text


def test_a_line_for_each_image_defence_and_attack(tmp_path: Path) -> None:
    evaluation = synthetic(30)
    write_report(evaluation, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 30 * len(DEFENCES) * (len(ATTACKS) + 2)
    (line,) = [e for e in lines if (e["image"], e["defense"], e["attack"]) == (7, "sap", "square")]
    cell = next(found for found in evaluation.defences if found.name == "sap").cell("square")
    assert cell is not None
    label = evaluation.labels[7]
    assert line["right"] == cell.right[7]
    assert (line["label"], line["truth"], line["median_queries"]) == (label, evaluation.classes[label], 913.5)
    worst = [e["right"] for e in lines if e["defense"] == "prm" and e["attack"] == "worst case"]
    assert worst == list(next(found for found in evaluation.defences if found.name == "prm").worst)


def test_an_old_report_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    write_report(synthetic(20), tmp_path)
    write_report(synthetic(30), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "30 images" in Page((tmp_path / "report.html").read_text()).text


def test_what_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written into") as raised:
        write_report(synthetic(20), tmp_path / "file")
    assert "\n" not in str(raised.value)
    (tmp_path / "out" / "samples.jsonl").mkdir(parents=True)
    with pytest.raises(OptionError):
        write_report(synthetic(20), tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_without_the_base_model_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without the base model"):
        write_report(synthetic(20, defences=synthetic(20).defences[1:]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "list instead of an object"),
        ("{}", "schema None; this Mithridate reads 1"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": true}', "schema True"),
        ('{"schema": 1}', "not a valid evaluation: command: "),
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_evaluation_is_one_error(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(says)) as raised:
        read_evaluation(tmp_path / "evaluation.json")
    assert "\n" not in str(raised.value)


def test_a_wrong_field_is_named() -> None:
    content = json.loads(to_json_text(synthetic(20)))
    content["defences"][1]["ruling"] = "splendid"
    with pytest.raises(InputError, match=r"defences\.1\.ruling"):
        evaluation_from_json(content)


# JUnit


def test_a_build_goes_red_for_what_harms_or_cannot_be_trusted() -> None:
    root = ElementTree.fromstring(junit_xml(synthetic()))
    failed = {
        (suite.get("name"), case.get("name"))
        for suite in root
        for case in suite.iter("testcase")
        if case.find("failure") is not None
    }
    assert failed == {
        ("rmc:scope=tail", "ruling"),
        ("sap", "ruling"),
        ("prm+rmc", "ruling"),
        ("prm+rmc", "G2 twice the steps"),
    }
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("36", "4", "6")
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
        assert int(suite.get("failures", "")) == len(suite.findall("testcase/failure"))


def test_names_that_xml_cannot_say() -> None:
    root = ElementTree.fromstring(junit_xml(ugly()))
    assert HOSTILE.replace("\x08", "\N{REPLACEMENT CHARACTER}") in [suite.get("name") for suite in root]


# The page


def test_asks_for_nothing_and_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    assert {tag for tag, attrs in page.tags if "src" in attrs} == {"img"}
    assert all(source.startswith("data:image/png;base64,") for source in page.all("src"))
    assert all(target.startswith("#") for target in page.all("href"))
    assert all(target[1:] in page.all("id") for target in page.all("href"))
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not any("url(" in value or "@import" in value for value in [*page.all("style"), *page.words])
    assert any("default-src 'none'" in value for value in page.all("content"))


def test_whoever_named_a_class_cannot_write_the_page(evaluation: Evaluation) -> None:
    text = render(evaluation)
    assert "alert(1)</script>" not in text
    assert text.count("</style>") == 1
    assert "\x08" not in text


def test_every_picture_and_table_can_be_read_aloud(page: Page) -> None:
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(
        attrs.get("aria-label") or attrs.get("aria-hidden") == "true" for tag, attrs in page.tags if tag == "svg"
    )
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(headings))


def test_numbers_are_those_of_the_findings() -> None:
    evaluation = synthetic()
    text = Page(render(evaluation)).text
    tail = next(found for found in evaluation.defences if found.name == "rmc:scope=tail")
    assert tail.gain is not None
    assert sum(tail.worst) == 34
    assert "In the worst case the base model keeps 35.0 % (28.7–41.8), this defence 17.0 % (12.4–22.8)." in text  # noqa: RUF001
    assert f"−18.0 points (−26.4 to −9.6), p < 0.001; gained {tail.gain.gained}, lost {tail.gain.lost} of 200" in text  # noqa: RUF001
    assert "2.3 × the base model's" in text  # noqa: RUF001
    assert "3 of 4 passed; failed: twice the steps" in text
    assert "sap falls to 0 % under every one of 8 attacks." in text


def test_says_plainly_what_came_out() -> None:
    assert headline(synthetic()) == [
        "Gain over the base model, 1 of 5: prm.",
        "Harmful on this base, 2 of 5: rmc:scope=tail, sap.",
        "Not to be judged, because a check of the evaluation failed, 1 of 5: prm+rmc.",
    ]


def test_no_word_of_gain_where_the_interval_does_not_exclude_zero() -> None:
    whole = synthetic()
    prm = next(found for found in whole.defences if found.name == "prm")
    doubtful = replace(prm, gain=paired(whole.base.worst, whole.base.worst))
    text = Page(render(replace(whole, defences=(whole.base, doubtful)))).text
    assert "No evidence of gain: prm is not shown to keep more than the base model." in text
    assert "Gain over its base" not in text


def test_the_base_model_is_on_every_sheet_of_paper() -> None:
    evaluation = ugly()
    printed = sheets(evaluation)
    assert len(printed) == 4
    assert {sheet.defences[0].name for sheet in printed} == {"none"}
    assert {len(sheet.defences) for sheet in printed} == {5, 6}
    shown = [found.name for sheet in printed for found in sheet.defences[1:]]
    assert shown == [found.name for found in evaluation.defences if found.ruling != "base"]
    assert sheets(synthetic()) == []


def test_an_attack_that_was_not_run_is_no_zero() -> None:
    whole = synthetic()
    rmc = whole.defences[1]
    without = replace(rmc, cells=tuple(cell for cell in rmc.cells if cell.attack != "square"))
    page = Page(render(replace(whole, defences=(whole.base, without))))
    assert sum(attrs.get("aria-label") == "not run" for _, attrs in page.tags) == 1


def test_fewer_images_are_said_where_they_count() -> None:
    whole = synthetic()
    rmc = whole.defences[1]
    cells = (replace(rmc.cells[0], right=rmc.cells[0].right[:50]), *rmc.cells[1:])
    assert "n = 50" in Page(render(replace(whole, defences=(whole.base, replace(rmc, cells=cells))))).text
    assert "n = " not in Page(render(whole)).text


def test_what_random_defences_are_asked_is_shown() -> None:
    text = Page(render(synthetic())).text
    assert "expected 88.8 majority 91.5 10 tries 54.9 100 tries 18.3" in text


@pytest.mark.parametrize("left_out", ["curves", "strips", "notes", "service"])
def test_what_is_missing_is_left_out(left_out: str) -> None:
    evaluation = synthetic(20, **{left_out: None if left_out == "service" else ()})
    page = Page(render(evaluation))
    section = {"strips": "images", "notes": ""}.get(left_out, left_out)
    assert section not in page.all("id")


def test_the_base_model_alone() -> None:
    page = Page(render(synthetic(20, defences=synthetic(20).defences[:1])))
    assert "Only the base model was evaluated." in page.text


def test_no_checks_are_said_to_be_none() -> None:
    defences = tuple(replace(found, gates=()) for found in synthetic(20).defences)
    text = Page(render(synthetic(20, defences=defences))).text
    assert "Numbers without them should not be quoted" in text
    assert "0 of 0 passed" in text


def test_nobody_attacked_and_nothing_was_measured() -> None:
    base = findings("none", 1.0, "base", (), None, attacks={})
    page = Page(render(synthetic(20, images=0, defences=(base,), labels=(), curves=(), strips=())))
    assert "Only the base model was evaluated." in page.text


@pytest.mark.parametrize("service", [{"p50": 1}, {"steps": "x", "knee": 3, "notes": 7}, {"steps": [{}, 1, None]}])
def test_any_summary_of_a_load_test_can_be_shown(service: dict[str, object]) -> None:
    assert "service" in Page(render(synthetic(20, service=service))).all("id")


def test_the_load_test_is_shown() -> None:
    text = Page(render(synthetic(20))).text
    for said in (
        "Holds 150 requests a second",
        "3 http 429",
        "p99: 1.12 (0.95 to 1.31)",
        "adversarial share",
        "85.0 %",
    ):
        assert said in text


def test_atlas_lists_only_what_was_exercised() -> None:
    whole = synthetic()
    assert {entry.id for entry in techniques(whole)} == {
        *("AML.T0043.000", "AML.T0043.001", "AML.T0043.002", "AML.T0042", "AML.T0015", "AML.T0029")
    }
    assert {entry.id for entry in mitigations(whole)} == {"AML.M0003", "AML.M0006", "AML.M0010", "AML.M0008"}
    base = replace(whole.base, cells=tuple(cell for cell in whole.base.cells if cell.kind == "transfer"))
    small = replace(whole, defences=(base,), service=None)
    assert {entry.id for entry in techniques(small)} == {"AML.T0043.002", "AML.T0042", "AML.T0015"}
    assert {entry.id for entry in mitigations(small)} == {"AML.M0008"}
    assert {entry.by for entry in mitigations(ugly()) if entry.id == "AML.M0006"} == {LONG}


def luminance(color: str) -> float:
    levels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_cells_can_be_read_in_grey_and_by_every_eye() -> None:
    shades = [heat(share / 200) for share in range(201)]
    lights = [luminance(color) for color, _ in shades]
    assert lights == sorted(lights, reverse=True)
    for color, ink in shades:
        low, high = sorted((luminance(color), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
