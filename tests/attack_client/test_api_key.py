"""The red team with a key: it gets in, and the key is nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_helpers import listening

from attack_client.client import Client, ServiceError
from attack_client.load_plan import LoadPlan, from_dataset
from attack_client.load_report import write_load_html
from attack_client.load_test import run_load_test
from mithridate.datasets import LabelledImages
from mithridate.errors import OptionError
from service.app import create_app
from service.keys import hash_key, new_key
from service.settings import load_settings


def test_a_load_test_of_a_service_with_keys(digits_bundle: Path, digits_test: LabelledImages, tmp_path: Path) -> None:
    key = new_key()
    keys = [{"id": "red", "sha256": hash_key(key).hex(), "scopes": ["predict"]}]
    app = create_app(load_settings(bundle=digits_bundle, defense="none", offer=[], keys=keys))
    with listening(app, lifespan="on") as url:
        with Client(url) as stranger:
            stranger.wait_until_ready()
            with pytest.raises(ServiceError, match="HTTP 401: a key is needed"):
                stranger.bundle()
        plan = LoadPlan(url=url, rates=(20.0,), seconds=0.5, warmup_seconds=0.0, command="load", api_key=key)
        summary = run_load_test(plan, from_dataset(digits_test), progress=lambda *_: None)
        assert summary.steps[0].answered
        assert not summary.steps[0].errors
        write_load_html(summary, tmp_path / "report.html")
        for text in (repr(plan), str(summary.to_json()), (tmp_path / "report.html").read_text()):
            assert key not in text


def test_a_key_that_no_header_can_carry_is_refused_and_not_quoted() -> None:
    for bad in ("", "a b", "a\r\nX-Evil: 1", "clé"):
        with pytest.raises(OptionError, match="the API key has characters") as raised:
            Client("http://h:1", api_key=bad)
        assert not bad or bad not in str(raised.value)
