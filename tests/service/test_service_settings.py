"""Settings: flags over environment over a file over defaults, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mithridate.defenses import DEFAULT_DEFENCES
from mithridate.errors import OptionError
from service.settings import load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "service.toml"
    path.write_text('bundle = "from-file"\nport = 1001\nqueue_size = 11\noffer = ["none", "webnn"]\n')
    return path


def test_defaults() -> None:
    settings = load_settings(bundle="b")
    assert settings.bundle == Path("b")
    assert (settings.host, settings.port, settings.defense) == ("127.0.0.1", 8000, "rmc")
    assert set(settings.offered) == set(DEFAULT_DEFENCES)
    assert settings.offered[0] == "rmc"
    assert settings.seed is None, "a fixed seed must be asked for"


def test_flags_over_environment_over_file_over_defaults(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITHRIDATE_PORT", "2002")
    monkeypatch.setenv("MITHRIDATE_BUNDLE", "from-environment")
    settings = load_settings(config, bundle=Path("from-flag"))
    assert settings.bundle == Path("from-flag")
    assert settings.port == 2002
    assert settings.queue_size == 11
    assert settings.host == "127.0.0.1"
    assert load_settings(config).bundle == Path("from-environment")
    assert load_settings(config, port=3003).port == 3003
    assert load_settings(bundle="b").queue_size == 64, "no file, nothing from a file"


def test_a_flag_that_is_none_was_not_given(config: Path) -> None:
    assert load_settings(config, port=None, bundle=None).port == 1001
    assert load_settings(config, port=0).port == 0, "zero was"


def test_lists_and_absent_values(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(config).offer == ("none", "webnn")
    monkeypatch.setenv("MITHRIDATE_OFFER", '["deepnn"]')
    assert load_settings(config).offered == ("rmc", "deepnn")
    monkeypatch.setenv("MITHRIDATE_DOCS", "false")
    assert load_settings(config).docs is False


def test_the_default_defence_is_offered_once_and_first() -> None:
    settings = load_settings(bundle="b", defense="webnn", offer=("none", "webnn", "none"))
    assert settings.offered == ("webnn", "none")


def test_settings_do_not_change() -> None:
    settings: Any = load_settings(bundle="b")
    with pytest.raises(ValidationError):
        settings.port = 1


BAD: dict[str, Any] = {
    "port": [-1, 65_536, "http", 1.5],
    "queue_size": [0, -1, "many"],
    "queue_seconds": [0, -1, float("nan")],
    "max_neighbors": [0],
    "max_steps": [0],
    "max_passes": [0],
    "confidence_decimals": [-1, 16],
    "insecure_no_keys": ["perhaps"],
    "max_images": [0],
    "max_batch_images": [0],
    "max_body_bytes": [0],
    "max_pixels": [0],
    "deadline_ms": [0, -1, float("nan"), "soon"],
    "body_timeout_s": [0],
    "drain_seconds": [-1],
    "drain_timeout_s": [0],
    "threads": [0, 5000],
    "seed": [-1, 2**62],
    "docs": ["perhaps"],
    "offer": [3],
    "log_format": ["xml"],
    "engine_nice": [-1, 20, 0.5],
    "engine_hang_s": [0, -1, float("nan")],
    "query_window": [0, 9],
    "query_memory_mb": [0],
    "near_duplicate_distance": [0, 1.1, float("nan")],
    "near_duplicate_alert": [0, 1.1],
    "spelling": [1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_flag_is_named(name: str, value: Any) -> None:
    check_error(name, bundle="b", **{name: value})


def check_error(says: str, config: Path | None = None, **flags: Any) -> None:
    with pytest.raises(OptionError, match=says) as raised:
        load_settings(config, **flags)
    assert "\n" not in str(raised.value)


def test_a_bad_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITHRIDATE_PORT", "eighty")
    check_error("port.*'eighty'", bundle="b")
    monkeypatch.delenv("MITHRIDATE_PORT")
    monkeypatch.setenv("MITHRIDATE_OFFER", "none,rmc")  # a list is written as JSON
    check_error("offer", bundle="b")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('bundel = "b"', "bundel"),
        ("port = 70000", "port.*70000"),
        ("[server]\nport = 80", "server"),
        ("port 80", "cannot read the settings"),
        ("port = ", "cannot read the settings"),
        ("\x00", "cannot read the settings"),
    ],
)
def test_a_bad_file(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "service.toml"
    path.write_text(content)
    check_error(says, path, bundle="b")


@pytest.mark.parametrize("wrong", ['devices = "cpu,"', 'kyes = "{key}"', 'host = ["{key}"]', 'keys_file = ["{key}"]'])
def test_an_error_quotes_no_key(tmp_path: Path, wrong: str) -> None:
    """Also where settings do not go together: what is wrong then is all of them."""
    key = "mth_" + "k" * 43
    path = tmp_path / "service.toml"
    good = f'keys = [{{id = "a", sha256 = "{"0" * 64}", scopes = ["predict"]}}]'
    path.write_text(f"{wrong.format(key=key)}\n{good}\n")
    with pytest.raises(OptionError) as raised:
        load_settings(path, bundle="b")
    assert wrong.split()[0] in str(raised.value)
    assert key not in str(raised.value)
    assert "0" * 64 not in str(raised.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "service.toml"
    path.write_bytes(b"\xff\xfe\x00")
    check_error("cannot read the settings", path, bundle="b")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    check_error("there is no configuration file .*absent.toml", tmp_path / "absent.toml", bundle="b")
    check_error("there is no configuration file", tmp_path, bundle="b")


def test_no_bundle() -> None:
    check_error("setting bundle: Field required$")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "service.toml"
    path.touch()
    assert load_settings(path, bundle="b").port == 8000
