"""``attack`` as a user gives it and sees it, on a service that knows nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "attack_client"))  # for the small services there
from client_helpers import FakeService, listening

DATA = ("--dataset", "digits[test,:6]", "--queries", "4", "--rate", "1000", "--threads", "2")


def test_it_asks_and_reports_and_goes_on(mithridate: Callable, tmp_path: Path) -> None:
    out, service = tmp_path / "out", FakeService()
    with listening(service) as url:
        asked = ("attack", url, *DATA, "--attack", "square", "--attack", "noise", "--out", out)
        first = mithridate(*asked)
        assert first.code == 0, first.err
        for text in ("square / rmc", "random-noise / none", "worst case", "after 4", "rmc: no evidence of gain: "):
            assert text in first.out
        files = {"summary.json", "images.jsonl", "outcomes.jsonl", "junit.xml", "report.html", "plan.json"}
        assert files | {"examples", "queries"} == {path.name for path in out.iterdir()}
        answered = service.images
        refused = mithridate(*asked)
        assert refused.code == 2
        assert "--resume" in refused.err
        again = mithridate(*asked, "--resume", "--json")
        assert again.code == 0
        assert service.images == answered
        summary = json.loads(again.out)
        assert summary["black_box"]["cases"][0]["requests_recalled"] > 0
        other = mithridate(*asked, "--resume", "--seed", "5")
        assert other.code == 2
        assert "another seed: 0; seen: 5" in other.err
        assert "report.html" in {path.name for path in out.iterdir()}, "what was there is left alone"


@pytest.mark.parametrize(("options", "says"), [(("--fail-under", "99"), "is below 99 %"), ((), "")])
def test_a_threshold_decides_the_exit_code(
    mithridate: Callable, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    with listening(FakeService()) as url:
        result = mithridate("attack", url, *DATA, "--attack", "noise", "--out", tmp_path / "out", *options)
    assert result.code == (1 if options else 0)
    assert says in result.err
    assert ("<failure" in (tmp_path / "out" / "junit.xml").read_text()) == bool(options)


def test_what_was_not_measured_is_no_success(mithridate: Callable, tmp_path: Path) -> None:
    with listening(FakeService(fails_together=True)) as url:
        result = mithridate("attack", url, *DATA, "--attack", "noise", "--out", tmp_path / "out")
    assert result.code == 1
    assert "random-noise on rmc: 6 of 6 queries have no answer: HTTP 500" in result.err
    assert "not measured" in result.out


def test_refusals_are_told_and_cost_nothing_but_time(mithridate: Callable, tmp_path: Path) -> None:
    with listening(FakeService(refuses=9)) as url:
        result = mithridate("attack", url, *DATA, "--attack", "noise", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "9 requests were refused (429) and sent again" in result.err


def test_a_radius_of_nothing_is_refused_before_anything_is_asked(mithridate: Callable, tmp_path: Path) -> None:
    """Every image would stand, of any defence, and the report would say so."""
    for attack in (("--attack", "square"), ("--attack", "pgd2", "--bundle", tmp_path)):
        options = ("--epsilon", "0/255", "--out", tmp_path / "out")
        result = mithridate("attack", "http://127.0.0.1:9", *DATA, *attack, *options)
        assert result.code == 2
        assert result.err == "error: epsilon 0/255 leaves an attack nothing to change; allowed: 1/255 to 255/255\n"
    assert not (tmp_path / "out").exists()
