"""Keys and scopes: who is let in, what they may ask for, and that a key is nowhere but with its owner."""

from __future__ import annotations

import json
import logging
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_helpers import (
    ServerProcess,
    Serving,
    check_problem,
    post,
    post_json,
    predictions,
    wait_ready,
    wait_until,
)
from service_helpers import answer as whole_answer
from starlette.testclient import TestClient

from mithridate.errors import OptionError
from service.access import Access, is_loopback
from service.app import create_app
from service.keys import SCOPES, Key, KeyRing, add_key, hash_key, new_key, read_keys, remove_key
from service.settings import load_settings


@dataclass(frozen=True)
class Keyed:
    client: TestClient
    keys: dict[str, str]
    file: Path

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}


def entry(identity: str, key: str, *scopes: str, **limits: float) -> Key:
    return Key.model_validate({"id": identity, "sha256": hash_key(key).hex(), "scopes": scopes, **limits})


@pytest.fixture(scope="module")
def keyed(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A service with one key of each scope (each but ``metrics`` and ``admin`` with ``predict``), one with all."""
    file, keys = tmp_path_factory.mktemp("keys") / "keys.jsonl", {}
    wanted: dict[str, tuple[str, ...]] = {scope: (scope, "predict") for scope in ("choose-defense", "explain")}
    wanted |= {scope: (scope,) for scope in ("predict", "metrics", "admin")} | {"all": SCOPES}
    for name, scopes in wanted.items():
        keys[name] = new_key()
        add_key(file, entry(name, keys[name], *scopes))
    with serving(keys_file=file, offer=["none", "rmc"], confidence_decimals=2) as client:
        yield Keyed(client, keys, file)


ROUTES = {"/v1/bundle": "predict", "/v1/defenses": "predict", "/v1/card": "predict", "/metrics": "metrics"}
OPTIONS: dict[str, dict[str, Any]] = {
    "predict": {},
    "choose-defense": {"defense": "none"},
    "explain": {"explain": True},
    "explain, by more classes": {"top_k": 2},
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_asks_for_its_scope(keyed: Keyed, route: str) -> None:
    scope = ROUTES[route]
    check_problem(keyed.client.get(route), 401, "a key is needed")
    assert keyed.client.head(route).status_code == 401
    for name, key in keyed.keys.items():
        may = name in (scope, "all") or (scope == "predict" and name in ("choose-defense", "explain"))
        may = may or (scope == "metrics" and name == "admin")
        answer = keyed.client.get(route, headers={"X-API-Key": key})
        if may:
            assert answer.status_code in (200, 404), name  # there is no card
        else:
            check_problem(answer, 403, f"the scope {scope}")
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_asks_for_its_scope(keyed: Keyed, clean: list[bytes], option: str) -> None:
    """In the query and in JSON: a right that one form of the body needs is no good if another goes without."""
    scope = option.partition(",")[0]
    for name in keyed.keys:
        may = name == "all" or name == scope or (scope == "predict" and name in ("choose-defense", "explain"))
        keyed.client.headers.update(keyed.headers(name))
        try:
            answers = [
                post(keyed.client, clean[0], **OPTIONS[option]),
                post_json(keyed.client, clean[:2], **OPTIONS[option]),
            ]
        finally:
            del keyed.client.headers["Authorization"]
        for answer in answers:
            if may:
                assert predictions(answer)
            else:
                check_problem(answer, 403, "predict" if name in ("metrics", "admin") else scope)


def test_naming_the_default_defence_is_no_choice(keyed: Keyed, clean: list[bytes]) -> None:
    keyed.client.headers.update(keyed.headers("predict"))
    try:
        assert predictions(post(keyed.client, clean[0], defense="rmc"))
        assert predictions(post(keyed.client, clean[0], defense="rmc:scope=head", deadline_ms=20_000))
    finally:
        del keyed.client.headers["Authorization"]


def test_health_needs_no_key(keyed: Keyed) -> None:
    assert keyed.client.get("/livez").status_code == keyed.client.get("/readyz").status_code == 200


def test_a_missing_and_an_unknown_key_are_the_same(keyed: Keyed, clean: list[bytes]) -> None:
    """Nobody learns from an answer whether a key was nearly right, or whether the header was the right one."""
    one = keyed.keys["predict"]
    for headers in (
        {},
        {"Authorization": "Bearer " + new_key()},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer " + one[:-1]},
        {"Authorization": "Basic " + one},
        {"Authorization": one},
        {"X-API-Key": "é" * 40},
        {"X-API-Key": hash_key(one).hex()},
    ):
        answer = keyed.client.post(
            "/v1/predict",
            content=clean[0],
            headers={k: v.encode("latin-1") for k, v in {"Content-Type": "image/png", **headers}.items()},
        )
        document = check_problem(answer, 401)
        assert document["detail"] == "a key is needed that this service knows; send it as Authorization: Bearer KEY"
        assert answer.headers["www-authenticate"] == 'Bearer realm="mithridate"'


def test_whoever_is_refused_is_counted_once_whatever_he_asked_through(keyed: Keyed, clean: list[bytes]) -> None:
    def counted(status: int) -> float:
        lines = keyed.client.get("/metrics", headers=keyed.headers("metrics")).text.splitlines()
        wanted = [line for line in lines if line.startswith("mithridate_requests_total{") and f'"{status}"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in wanted)

    headers = {"Content-Type": "image/png"}
    for path in ("/v1/predict", "/v2/models/digits-small-cnn/infer", "/page/answer", "/"):
        before = counted(401)
        keyed.client.post(path, content=clean[0], headers=headers)
        assert counted(401) == before + 1, path
    before = counted(404)
    keyed.client.post("/v2/models/mnist/infer", json={}, headers=keyed.headers("predict"))
    assert counted(404) == before + 1


def test_what_is_shown_without_explain(keyed: Keyed, clean: list[bytes], adversarial: list[bytes]) -> None:
    """The answer is the same; what leads beyond it (the base model's answer, neighbours, more digits) is not there."""
    for file in (clean[0], adversarial[0]):
        few = keyed.client.post(
            "/v1/predict", content=file, headers={"Content-Type": "image/png"} | keyed.headers("predict")
        )
        full = keyed.client.post(
            "/v1/predict", content=file, headers={"Content-Type": "image/png"} | keyed.headers("explain")
        )
        [shown], [whole] = predictions(few), predictions(full)
        assert shown["undefended"] is shown["adaptation"] is shown["neighbors"] is None
        assert whole["undefended"] is not None
        assert whole["adaptation"] is not None
        assert shown["confidence"] == shown["top"][0]["confidence"] == round(whole["confidence"], 2)
        assert [shown[name] for name in ("label", "suspicious", "abstained")] == [
            whole[name] for name in ("label", "suspicious", "abstained")
        ]


OPEN = ("/livez", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}/ready")
OPEN += ("/v2/models/{name}/versions/{version}/ready",)


def test_the_openapi_document_says_that_a_key_is_needed(keyed: Keyed, client: TestClient) -> None:
    document = keyed.client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"key", "key-header"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            open_to_all = path in OPEN
            assert ("security" in operation) is not open_to_all, path
            assert open_to_all or {"401", "403"} <= set(operation["responses"]), path
    assert "security" not in client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"], "without keys, none"


def test_logs_name_the_owner_and_never_the_key(
    keyed: Keyed, clean: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keyed.client.get("/v1/bundle", headers=keyed.headers("explain"))
    keyed.client.get("/v1/bundle", headers={"X-API-Key": keyed.keys["all"][:-2] + "xx"})
    lines = [record.getMessage() for record in caplog.records if record.name == "mithridate.access"]
    assert ["key_id=explain" in line for line in lines] == [True, False]
    for key in keyed.keys.values():
        assert key[4:-2] not in caplog.text
        assert hash_key(key).hex() not in caplog.text


def test_a_key_that_is_revoked_stops_working_and_a_new_one_begins(
    serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, old, new = tmp_path / "keys", new_key(), new_key()
    add_key(file, entry("old", old, "predict"))
    with serving(keys_file=file, defense="none", offer=[]) as client:

        def status(key: str) -> int:
            return client.get("/v1/bundle", headers={"X-API-Key": key}).status_code

        assert (status(old), status(new)) == (200, 401)
        add_key(file, entry("new", new, "predict"))
        remove_key(file, "old")
        wait_until(lambda: status(old) == 401, seconds=5)
        assert status(new) == 200
        file.write_text("a slip of the pen\n")
        wait_until(lambda: "the old ones stay" in caplog.text or status(new) != 200, seconds=5)
        assert status(new) == 200
        file.write_text("# all gone\n")
        wait_until(lambda: status(new) == 401, seconds=5)


def test_without_keys_a_page_that_has_its_name_lead_to_loopback_is_refused(
    client: TestClient, clean: list[bytes]
) -> None:
    """DNS rebinding: to a browser such a page is no other site, so it could read whatever is answered."""

    def status(path: str, host: str) -> int:
        return client.get(path, headers={"Host": host}).status_code

    foreign = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "")
    for host in foreign:
        for path in ("/v1/bundle", "/v1/defenses", "/metrics", "/page/about", "/page/exemplars/0.png"):
            assert status(path, host) == 403, (path, host)
        assert status("/readyz", host) == 200
    answer = client.post("/v1/predict", content=clean[0], headers={"Host": "evil.example", "Content-Type": "image/png"})
    check_problem(answer, 403, "own machine", "evil.example")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.1.2.3", "[::1]", "[::1]:8000"):
        assert status("/v1/bundle", host) == 200, host


def test_without_keys_it_is_the_name_in_an_absolute_target_that_counts(digits_bundle: Path, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", bundle=digits_bundle, offer=["none"], defense="none")
    address = ("127.0.0.1", httpx2.URL(server.url).port)

    def status(target: str, host: str) -> int:
        with closing(socket.create_connection(address, timeout=10)) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return int(whole_answer(connection).split()[1])

    with closing(server):
        wait_ready(server.client)
        assert status("http://localhost:8000/v1/bundle", "localhost:8000") == 200
        assert status("http://evil.example/v1/bundle", "localhost") == 403
        assert status("http://localhost/v1/bundle", "evil.example") == 200
        assert status("http://localhost@evil.example/v1/bundle", "localhost") == 400
        assert status("http://evil.example/livez", "evil.example") == 200


def test_with_keys_or_a_proxy_the_name_does_not_matter(keyed: Keyed, serving: Serving) -> None:
    headers = {"Host": "shop.example", **keyed.headers("predict")}
    assert keyed.client.get("/v1/bundle", headers=headers).status_code == 200
    with serving(insecure_no_keys=True, offer=["none"], defense="none") as client:
        assert client.get("/v1/bundle", headers={"Host": "shop.example"}).status_code == 200


def test_a_proxy_may_use_authorization_for_itself(keyed: Keyed) -> None:
    for taken in ("Bearer of-the-proxy", "Basic dTpw"):
        headers = {"Authorization": taken, "X-API-Key": keyed.keys["predict"]}
        assert keyed.client.get("/v1/bundle", headers=headers).status_code == 200


def test_without_keys_only_an_operator_on_this_machine_is_admin(client: TestClient) -> None:
    """A page in a browser here, or a proxy here, brings strangers to loopback."""
    app: Any = client.app

    def scopes(peer: str, **headers: str) -> frozenset[str]:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        request = _request(app, peer, raw)
        found: frozenset[str] = app.state.service.authorize(request).scopes
        return found

    assert scopes("127.0.0.1") == scopes("::1") == set(SCOPES)
    everybody = set(SCOPES) - {"admin"}
    assert scopes("10.0.0.7") == scopes("127.0.0.1", x_forwarded_for="1.2.3.4") == everybody
    assert scopes("127.0.0.1", origin="https://evil.example") == scopes("127.0.0.1", via="1.1 proxy") == everybody


def _request(app: Any, peer: str, headers: list[tuple[bytes, bytes]]) -> Any:
    from starlette.requests import Request

    return Request({"type": "http", "headers": headers, "client": (peer, 1), "state": {}, "app": app, "path": "/"})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "myhost", "localhost.evil.example", "")),
    ],
)
def test_without_keys_only_loopback_is_served(host: str, loopback: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert is_loopback(host) is loopback
    if loopback:
        Access(load_settings(bundle="b", host=host))
        return
    with pytest.raises(OptionError, match="without keys only loopback is served") as raised:
        create_app(load_settings(bundle="b", host=host))
    assert "\n" not in str(raised.value)
    Access(load_settings(bundle="b", host=host, insecure_no_keys=True))
    assert "no keys: whoever reaches" in caplog.text
    key = {"id": "a", "sha256": "0" * 64, "scopes": ["predict"]}
    Access(load_settings(bundle="b", host=host, keys=[key]))


# --- the file


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
        st.tuples(st.sets(st.sampled_from(SCOPES), min_size=1), st.none() | st.floats(0.001, 1e9)),
        max_size=6,
    )
)
@settings(max_examples=8, deadline=None)
def test_what_is_written_is_read_and_each_key_is_found(tmp_path_factory: pytest.TempPathFactory, made: Any) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys"
    keys = {identity: new_key() for identity in made}
    for identity, (scopes, limit) in made.items():
        add_key(
            file, entry(identity, keys[identity], *scopes, **({} if limit is None else {"requests_per_minute": limit}))
        )
    if not made:
        return
    ring = KeyRing(read_keys(file))
    for identity, (scopes, limit) in made.items():
        found = ring.find(keys[identity])
        assert found is not None
        assert (found.id, found.scopes, found.requests_per_minute) == (identity, scopes, limit)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = file.read_text()
    assert not any(key in content for key in keys.values())
    gone = next(iter(made))
    remove_key(file, gone)
    assert KeyRing(read_keys(file)).find(keys[gone]) is None
    assert len(read_keys(file)) == len(made) - 1
    assert not [path for path in file.parent.iterdir() if path != file], "something half-written is left"


def test_comments_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  # theirs")
    add_key(file, entry("a", new_key(), "predict"))
    add_key(file, entry("b", new_key(), "predict"))
    remove_key(file, "a")
    assert file.read_text().startswith("# ours\n\n  # theirs\n{")
    assert [key.id for key in read_keys(file)] == ["b"]


SECRET = "mth_" + 43 * "s"  # the same in every test process
BROKEN = {
    f'{{"id": "a", "sha256": "{SECRET}", "scopes": ["predict"]}}': "line 2: sha256: String should match",
    f'{{"id": "a", "key": "{SECRET}", "scopes": ["predict"]}}': "line 2: sha256: Field required",
    '{"id": "a b", "sha256": "' + "0" * 64 + '", "scopes": ["predict"]}': "line 2: id: String should match",
    '{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": []}': "line 2: scopes",
    '{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": ["root"]}': "line 2: scopes.*predict",
    '{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": ["admin"], "requests_per_minute": 0}': "greater than 0",
    SECRET: "line 2: Invalid JSON",
    "[1]": "line 2: Input should be an object",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_file_is_one_line_that_quotes_nothing(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(OptionError, match=BROKEN[line]) as raised:
        create_app(load_settings(bundle="b", keys_file=file))
    assert SECRET not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_that_cannot_be_told_apart_or_read(tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "keys"
    with pytest.raises(OptionError, match="the id of key 'a' is there twice"):
        KeyRing([entry("a", key, "predict"), entry("a", new_key(), "predict")])
    with pytest.raises(OptionError, match="the sha256 of key 'a' is there twice"):
        KeyRing([entry("a", key, "predict"), entry("b", key, "admin")])
    with pytest.raises(OptionError, match=r"cannot read the keys in .*: No such file"):
        Access(load_settings(bundle="b", keys_file=file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="it is not text"):
        Access(load_settings(bundle="b", keys_file=file))
    file.write_text("# nobody\n")
    with pytest.raises(OptionError, match="holds no key; make one"):
        Access(load_settings(bundle="b", keys_file=file))


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    monkeypatch.setenv("MITHRIDATE_KEYS", json.dumps([json.loads(entry("env", key, "predict").line())]))
    ring = KeyRing(load_settings(bundle="b").keys)
    found = ring.find(key)
    assert found is not None
    assert found.id == "env"
    monkeypatch.setenv("MITHRIDATE_KEYS", json.dumps([{"id": "a", "sha256": SECRET, "scopes": ["predict"]}]))
    with pytest.raises(OptionError, match=r"keys\.0\.sha256") as raised:
        load_settings(bundle="b")
    assert SECRET not in str(raised.value)


def test_a_client_with_a_key(keyed: Keyed) -> None:
    """And what a key must not be: a second header."""
    from attack_client import wire

    target = wire.Target.parse("http://h:1", api_key=keyed.keys["all"])
    assert f"Authorization: Bearer {keyed.keys['all']}\r\n".encode() in target.predict(b"x")
    assert keyed.keys["all"] not in repr(target)
    for bad in ("", "a b", "a\r\nX-Evil: 1", "é"):
        with pytest.raises(OptionError, match="the API key has characters") as raised:
            wire.Target.parse("http://h:1", api_key=bad)
        assert not bad or bad not in str(raised.value)
