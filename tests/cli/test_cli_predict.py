"""``mithridate predict``: what its table says of an answer that the defence does not stand by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mithridate.datasets import LabelledImages
from mithridate.images import encode_png


@pytest.mark.parametrize("defense", ["none", "rmc", "rmc:gate=1,abstain=1"])
def test_the_table_and_json_say_when_it_abstains_and_which_weights_answered(
    mithridate: Callable, digits_bundle: Path, digits_test: LabelledImages, tmp_path: Path, defense: str
) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(encode_png(digits_test.images[number]))
    table = mithridate("predict", digits_bundle, *paths, "--defense", defense).out
    rows = {line.split()[0]: line for line in table.splitlines() if ".png" in line}
    answers = json.loads(mithridate("predict", digits_bundle, *paths, "--defense", defense, "--json").out)
    abstained = [answer["abstained"] for answer in answers["predictions"]]
    from_base = [(answer["adaptation"] or {}).get("answered_from") == "base" for answer in answers["predictions"]]
    assert ["abstained" in rows[path.name] for path in paths] == abstained
    assert ["base weights" in rows[path.name] for path in paths] == from_base
    for path, answer in zip(paths, answers["predictions"], strict=True):
        assert f"{answer['label']} (" in rows[path.name], "the best guess is there all the same"
    assert any(abstained) is ("abstain" in defense)
    assert any(from_base) or "gate" not in defense, "else this shows nothing"
