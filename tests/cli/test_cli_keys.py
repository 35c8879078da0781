"""``mithridate keys``, and a server that refuses strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.keys import KeyRing, read_keys


def test_a_key_from_its_making_to_its_end(mithridate: Callable, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = mithridate("keys", "new", "--file", file, "--id", "shop", "--scope", "predict", "--scope", "explain")
    key = made.out.strip()
    assert (made.code, len(key), key[:4]) == (0, 47, "mth_")
    assert key not in made.err
    assert key not in file.read_text()
    found = KeyRing(read_keys(file)).find(key)
    assert found is not None
    assert found.scopes == {"predict", "explain"}
    assert mithridate("keys", "new", "--file", file, "--id", "b", "--requests-per-minute", 5).out.strip() != key
    listed = mithridate("keys", "list", "--file", file)
    assert "shop" in listed.out
    assert found.sha256 not in listed.out
    rows = json.loads(mithridate("keys", "list", "--file", file, "--json").out)["keys"]
    assert [(row["id"], row["scopes"], row["requests_per_minute"]) for row in rows] == [
        ("shop", ["predict", "explain"], None),
        ("b", ["predict"], 5.0),
    ]
    assert mithridate("keys", "revoke", "shop", "--file", file).code == 0
    assert KeyRing(read_keys(file)).find(key) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("keys", "new", "--id", "a"), "--file"),
        (("keys", "new", "--file", "F", "--id", "a b"), "--id 'a b'"),
        (("keys", "new", "--file", "F", "--id", "a", "--scope", "root"), "'predict', 'choose-defense', 'explain'"),
        (("keys", "new", "--file", "F", "--id", "a", "--requests-per-minute", "0"), "--requests-per-minute 0"),
        (("keys", "new", "--file", "no/where", "--id", "a"), "cannot write to no"),
        (("keys", "list", "--file", "nowhere"), "cannot read the keys in nowhere"),
        (("keys", "revoke", "a", "--file", "nowhere"), "cannot read the keys in nowhere"),
        (("load", "http://h:1", "--images", "x.png", "--api-key-env", "mth_secret"), "names no environment variable"),
        (
            (
                "attack",
                "http://h:1",
                "--dataset",
                "digits",
                "--out",
                "O",
                "--attack",
                "square",
                "--api-key-env",
                "mth_s",
            ),
            "names no environment variable",
        ),
    ],
)
def test_one_line_and_exit_code_2(
    mithridate: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = mithridate(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert says in result.err
    assert result.err.count("\n") == 1
    assert "mth_s" not in result.err, "what was given in place of a name may be a key"
    assert not list(tmp_path.iterdir())


def test_without_keys_only_loopback_is_served(mithridate: Callable, digits_bundle: Path) -> None:
    result = mithridate("serve", digits_bundle, "--host", "0.0.0.0", "--port", 0)
    assert result.code == 2
    assert "without keys only loopback is served, not 0.0.0.0" in result.err
