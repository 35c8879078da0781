"""A network of the user's own that has no last linear layer: what cannot be offered is not, and says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from service_helpers import Serving, check_problem, post, predictions

from index_builder.build import BuildPlan, build_bundle
from index_builder.training import TrainingPlan
from mithridate.datasets import load_dataset
from mithridate.errors import InputError
from mithridate.types import Epsilon
from service.server import serve
from service.settings import load_settings

ARCH = "headless_network:make"
SOURCE = """
from torch import nn

def make(num_classes, in_channels):
    layers = [nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes), nn.LogSoftmax(1)]
    return nn.Sequential(*layers)
"""


@pytest.fixture
def headless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "headless_network.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "headless_network", raising=False)
    data, out = load_dataset("digits[train,:100]"), tmp_path / "bundle"
    training = TrainingPlan(epochs=1)
    build_bundle(
        BuildPlan(
            data=data, out=out, arch=ARCH, embedding_layer="2", attacks=("fgsm",), epsilon=Epsilon(8), training=training
        )
    )
    return out


def test_without_a_head(serving: Serving, headless: Path, clean: list[bytes]) -> None:
    with serving(bundle=headless, arch=ARCH, defense="none") as client:
        offered = [entry["name"] for entry in client.get("/v1/defenses").json()["defenses"]]
        assert offered == ["none", "webnn", "deepnn"]
        check_problem(post(client, clean[0], defense="rmc"), 422, "'rmc' is not offered here", "webnn")
        check_problem(post(client, clean[0], defense="rmc:neighbors=9"), 422, "not offered here")
        assert predictions(post(client, clean[0], defense="webnn"))
    with pytest.raises(InputError, match="no head to adapt; use rmc:scope=all"):
        serve(load_settings(bundle=headless, arch=ARCH, port=0, isolation="thread"))
    with pytest.raises(InputError, match=f"repeat it with --arch {ARCH} to run that code"):
        serve(load_settings(bundle=headless, port=0, isolation="thread"))
