"""``mithridate load`` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attack_client.load_servers import one_at_a_time, serving


@pytest.fixture(scope="module")
def quick() -> Iterator[str]:
    """A service that answers 500 a second, without a model."""
    with serving(lambda: one_at_a_time(0.002)) as url:
        yield url


QUICKLY = ("--duration", "1", "--warmup", "0.2")


def test_mixed_traffic_leaves_a_report_and_says_the_same_as_json(
    mithridate: Callable, quick: str, digits_bundle: Path, tmp_path: Path
) -> None:
    attack = ("--attack", "pgd2", "--bundle", digits_bundle, "--adversarial-share", "0.25")
    result = mithridate(
        "load",
        quick,
        "--dataset",
        "digits[test,:8]",
        *attack,
        "--rate",
        "40",
        *QUICKLY,
        "--out",
        tmp_path / "o",
        "--json",
    )
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said == json.loads((tmp_path / "o" / "summary.json").read_text())
    assert said["traffic"]["attack"] == "pgd2"
    assert set(said["steps"][0]["kinds"]) == {"clean", "pgd2"}
    lines = (tmp_path / "o" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 48
    page = (tmp_path / "o" / "report.html").read_text()
    assert "pgd2" in page
    assert "http://" not in page.replace(quick, "").replace("http://www.w3.org/2000/svg", "")


def test_a_rate_too_high_is_a_no(mithridate: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not looked at by this service")
    with serving(lambda: one_at_a_time(0.05)) as url:
        result = mithridate("load", url, "--images", tmp_path / "x.png", "--rate", "60,80", *QUICKLY)
    assert result.code == 1
    assert "Saturated at the lowest rate" in result.err
    assert "Not measured: 80" in result.err


def test_clients_in_a_loop(mithridate: Callable, quick: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    result = mithridate("load", quick, "--images", tmp_path / "x.png", "--clients", "2", *QUICKLY)
    assert result.code == 0
    assert "2 clients" in result.out
    assert "Closed model" in result.err


def test_a_run_too_short_for_a_percentile_says_how_long_it_has_to_be(
    mithridate: Callable, quick: str, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    sent = ("load", quick, "--images", tmp_path / "x.png", "--rate", "200,100", "--warmup", "0")
    said = [line for line in mithridate(*sent, "--duration", "0.5").err.splitlines() if "--duration" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "fewer than 5 samples beyond; --duration that is long enough at 100/s: p95 1, p99 5, p99.9 50"
    )
    assert "p95" not in mithridate(*sent, "--duration", "1.2").err, "and so it is"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", "0"), "rate 0 is out of range"),
        (("--rate", "fast"), "--rate 'fast'"),
        (("--rate", "10", "--clients", "2"), "either --rate"),
        (("--images", "x.png"), "either --dataset SPEC or --images FILE"),
        (("--attack", "pgd2"), "needs a --dataset and one model"),
        (("--model", "m"), "needs an --attack"),
        (("--objective-ms", "nan"), "objective nan"),
        (("--attack", "pgd2", "--model", "m", "--epsilon", "0/255"), "epsilon 0/255 leaves an attack nothing to"),
        ((), "does not answer"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    mithridate: Callable, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    data = ("--dataset", "digits[test,:4]", "--out", tmp_path / "o")
    result = mithridate("load", "http://127.0.0.1:9", *data, *arguments)
    assert result.code == 2
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_load_test_of_another_bundle_is_not_put_on_a_report(
    mithridate: Callable, quick: str, digits_bundle: Path, tmp_path: Path
) -> None:
    loaded = mithridate(
        "load", quick, "--dataset", "digits[test,:4]", "--rate", "20", *QUICKLY, "--out", tmp_path / "o"
    )
    assert (tmp_path / "o" / "summary.json").exists(), loaded.err
    options = ("--dataset", "digits[test,:4]", "--load", tmp_path / "o" / "summary.json", "--out", tmp_path / "v")
    result = mithridate("evaluate", digits_bundle, *options)
    assert result.code == 2
    assert "load test of another bundle" in result.err
    assert not (tmp_path / "v").exists()
