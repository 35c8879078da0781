"""``mithridate bench``: times defences, tunes rmc, and refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mithridate.evaluation import tuner
from mithridate.tuning import TUNING


@pytest.fixture
def bundle(digits_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    path = tmp_path / "bundle"
    shutil.copytree(digits_bundle, path)
    return path


def test_times_the_defences_beside_the_forward_pass(mithridate: Callable, bundle: Path) -> None:
    result = mithridate("bench", bundle, "--defense", "rmc", "--json", "--threads", 2)
    assert result.code == 0
    (entry,) = json.loads(result.out)["defenses"]
    assert entry["defense"] == "rmc"
    for batch in ("batch_1", "batch_64"):
        assert entry[batch]["ms_per_image"] > 0
        assert entry[batch]["ratio_to_forward"] > 0
    assert not (bundle / TUNING).exists()


def test_tunes_and_writes_what_rmc_means_from_then_on(
    mithridate: Callable, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "AXES", {"rmc": {"neighbors": ("48",), "anchor": ("1000.0",)}})
    tried = mithridate("bench", bundle, "--tune", "--images", 40, "--dry-run", "--threads", 2)
    assert tried.code == 0
    assert not (bundle / TUNING).exists()
    result = mithridate("bench", bundle, "--tune", "--images", 40, "--threads", 2)
    assert result.code == 0
    written = json.loads((bundle / TUNING).read_text())
    assert f"rmc = {written['defense']}" in result.err
    assert "none" in result.out  # the base model is in the table
    assert mithridate("verify", bundle).code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tune", "--defense", "webnn"), "cannot be tuned"),
        (("--tune", "--images", "100000"), "leaves too few"),
        (("--tune", "--defense", "rmc", "--defense", "rmc:neighbors=9"), "one --defense"),
        (("--defense", "rcm"), "did you mean 'rmc'"),
        (("--tune", "--against", "everything"), "everything"),
    ],
)
def test_refusals_are_one_line(mithridate: Callable, bundle: Path, arguments: tuple[str, ...], says: str) -> None:
    result = mithridate("bench", bundle, *arguments)
    assert result.code == 2
    assert says in result.err
    assert result.err.count("\n") == 1
    assert not (bundle / TUNING).exists()
