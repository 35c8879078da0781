"""``build`` with activations, another metric and an attacked defence, as a user gives and sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mithridate.bundle import Bundle

DIGITS = ("build", "--dataset", "digits[train,:200]", "--attack", "pgd2")


def test_the_table_says_what_is_stored(mithridate: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = ("--attack", "pgd2@webnn:neighbors=8", "--tail-layer", "auto", "--metric", "cosine")
    done = mithridate(*DIGITS, *options, "--out", out)
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert any("activation" in line and "64x4x4 float16, 1.2 MB in all" in line for line in lines), done.out
    assert any("embedding" in line and "128 numbers, cosine" in line for line in lines), done.out
    assert any("base accuracy, pgd2-at-webnn-neighbors-8" in line for line in lines), done.out
    manifest = Bundle.open(out).manifest
    assert (manifest.model.tail_layer, manifest.metric) == ("auto", "cosine")
    assert [copy.defense for copy in manifest.copies] == [None, None, "webnn:neighbors=8"]
    again = mithridate(*DIGITS, *options, "--out", out, "--resume")
    assert (again.code, "finished already" in again.err) == (0, True)
    assert mithridate("verify", out).code == 0


def test_as_json(mithridate: Callable[..., Any], tmp_path: Path) -> None:
    for name, options, shape in [("a", ("--tail-layer", "stage1"), [64, 4, 4]), ("b", (), None)]:
        done = mithridate(*DIGITS, *options, "--out", tmp_path / name, "--json")
        assert json.loads(done.out)["activation"] == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tail-layer", "stage9"), "no layer 'stage9'"),
        (("--tail-layer", "linear"), "there is nothing to train"),
        (("--metric", "l3"), "metric 'l3' is unknown; allowed: l2, cosine, ip"),
        (("--attack", "pgd2@rnc"), "unknown defence 'rnc'"),
        (("--attack", "pgd2@rmc:scope=tail"), "--tail-layer"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_any_work(
    mithridate: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = mithridate(*DIGITS, *options, "--out", tmp_path / "bundle")
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []
