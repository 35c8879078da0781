"""Another bundle goes live: nothing is dropped, nothing is answered by two, and what cannot serve never does."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from process_helpers import engine_pids, is_alive
from service_helpers import (
    Gate,
    ServerProcess,
    check_problem,
    install,
    post,
    predictions,
    wait_ready,
    wait_until,
)
from starlette.testclient import TestClient
from test_service_describe import read_metrics

from mithridate.bundle import MANIFEST, MODEL, Bundle
from service.app import create_app
from service.keys import Key, hash_key, new_key
from service.page import views
from service.settings import load_settings

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Bundles below a root. ``digits`` and ``words`` differ in what they call the classes, and so in their digest."""

    root: Path
    digests: dict[str, str]


def shelve(digits_bundle: Path, root: Path) -> Shelf:
    shutil.copytree(digits_bundle, root / "digits")
    shutil.copytree(digits_bundle, root / "words")
    manifest = json.loads((root / "words" / MANIFEST).read_text())
    (root / "words" / MANIFEST).write_text(json.dumps({**manifest, "name": "words", "classes": WORDS}))
    return Shelf(root=root, digests={name: Bundle.open(root / name).digest for name in ("digits", "words")})


@pytest.fixture(scope="module")
def shelf(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelve(digits_bundle, tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def server(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    patience = {
        "body_timeout_s": 120,
        "min_body_rate": 0,
        "deadline_ms": 120_000,
    }  # a slow upload outlasts the loading of a bundle
    flags: dict[str, Any] = {"threads": 1, "isolation": "process", "offer": ["none"], "defense": "none", **patience}
    (shelf.root / "live").symlink_to(shelf.root / "digits")
    server = ServerProcess(log, bundle=shelf.root / "live", bundle_root=shelf.root, **flags)
    try:
        wait_ready(server.client)
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def here(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Shelf]]:
    """The same in this process, where starting an engine costs little, and bundles of its own to break."""
    shelf = shelve(digits_bundle, tmp_path_factory.mktemp("root"))
    settings = load_settings(
        bundle=shelf.root / "digits", bundle_root=shelf.root, defense="none", offer=["none"], seed=7, lab=True
    )
    with TestClient(
        create_app(settings), base_url="http://localhost", client=("127.0.0.1", 1), raise_server_exceptions=False
    ) as client:
        wait_ready(client)
        yield client, shelf


def swap(client: httpx2.Client, path: str) -> httpx2.Response:
    return client.post("/admin/bundle", json={"path": path})


def live(client: httpx2.Client) -> dict[str, Any]:
    response = client.get("/admin/bundle")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_another_bundle_goes_live_under_load_and_the_one_before_it_again(
    server: ServerProcess, shelf: Shelf, clean: list[bytes]
) -> None:
    seen: list[tuple[str, str]] = []
    stop, began, go_on = threading.Event(), threading.Event(), threading.Event()

    def keep_asking() -> None:
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                response = post(client, clean[0])
                (answer,) = predictions(response)
                seen.append((response.json()["bundle"]["digest"], answer["label"]))

    def slow_body() -> Iterator[bytes]:
        yield clean[0][:20]
        began.set()
        assert go_on.wait(120)
        yield clean[0][20:]

    def ask_slowly() -> tuple[str, str]:
        """Its body is still on its way when the other bundle goes live."""
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            response = client.post("/v1/predict", content=slow_body(), headers={"Content-Type": "image/png"})
            return response.json()["bundle"]["digest"], predictions(response)[0]["label"]

    digits, words = (shelf.digests["digits"], "4"), (shelf.digests["words"], "four")
    with ThreadPoolExecutor(5) as threads:
        asking = [threads.submit(keep_asking) for _ in range(2)]
        slow = threads.submit(ask_slowly)
        assert began.wait(30)
        time.sleep(0.2)  # its head has arrived by then
        swapping = threads.submit(swap, server.client, "words")
        with httpx2.Client(base_url=server.url) as other:
            wait_until(lambda: live(other)["loading"] == "words")
            check_problem(swap(other, "words"), 409, "words is being loaded")
            check_problem(other.post("/admin/bundle/rollback"), 409)
        answer = swapping.result().json()
        assert answer["current"] == {"name": "words", "digest": words[0]}
        assert answer["previous"]["digest"] == digits[0]
        assert predictions(post(server.client, clean[0]))[0]["label"] == "four"
        assert server.client.get("/v1/bundle").json()["classes"] == list(WORDS)
        first, second = engine_pids(server)
        time.sleep(0.3)
        assert is_alive(first), "somebody is still to be answered by it"
        go_on.set()
        assert slow.result() == digits
        wait_until(lambda: not is_alive(first), seconds=10)
        assert is_alive(second)
        back = server.client.post("/admin/bundle/rollback").json()
        assert (back["current"]["digest"], back["previous"]["digest"]) == (digits[0], words[0])
        assert predictions(post(server.client, clean[0]))[0]["label"] == "4"
        stop.set()
        for one in asking:
            one.result()
    assert set(seen) == {digits, words}, "every answer is of one of them"
    assert server.client.get("/readyz").status_code == 200


def test_an_engine_that_dies_while_it_loads_leaves_the_other_one_alone(
    server: ServerProcess, shelf: Shelf, clean: list[bytes]
) -> None:
    before, started = live(server.client), len(engine_pids(server))
    with ThreadPoolExecutor(1) as threads:
        swapping = threads.submit(swap, server.client, "words")
        wait_until(lambda: len(engine_pids(server)) > started)
        os.kill(engine_pids(server)[-1], signal.SIGKILL)
        check_problem(swapping.result(), 503, "stays what it was")
    assert live(server.client) == before
    assert predictions(post(server.client, clean[0]))[0]["label"] == "4"


def test_sighup_loads_what_the_configured_path_leads_to_by_now(server: ServerProcess, shelf: Shelf) -> None:
    (shelf.root / "live").unlink()
    (shelf.root / "live").symlink_to(shelf.root / "words")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: live(server.client)["current"]["digest"] == shelf.digests["words"], seconds=60)
    server.terminate()
    assert server.process.wait(30) == 0


def flip_a_bit(bundle: Path) -> None:
    data = bytearray((bundle / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / MODEL).write_bytes(data)


def lose_the_labels(bundle: Path) -> None:
    (bundle / "labels.npy").unlink()


def scribble(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("broken", "says"), [(flip_a_bit, MODEL), (lose_the_labels, "labels.npy is missing"), (scribble, "is not JSON")]
)
def test_a_broken_bundle_never_goes_live(
    here: tuple[TestClient, Shelf], clean: list[bytes], broken: Callable[[Path], None], says: str
) -> None:
    client, shelf = here
    before = live(client)
    name = f"bad-{broken.__name__}"
    shutil.copytree(shelf.root / "words", shelf.root / name)
    broken(shelf.root / name)
    check_problem(swap(client, name), 422, "stays what it was", says)
    assert live(client) == before
    assert predictions(post(client, clean[0]))[0]["label"] == "4"
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["nowhere", "..", ".", "../outside", "digits/../../outside", "/", "link", "loop", "a\0b", "digits/labels.npy"],
)
def test_no_path_leads_out_of_the_root(here: tuple[TestClient, Shelf], path: str) -> None:
    client, shelf = here
    outside = shelf.root.parent / "outside"
    if not outside.exists():
        shutil.copytree(shelf.root / "words", outside)
        (shelf.root / "link").symlink_to(outside)
        (shelf.root / "loop").symlink_to(shelf.root / "loop")
    check_problem(swap(client, path), 422, "is no bundle inside the configured root")
    assert swap(client, str(outside)).status_code == 422
    assert live(client)["current"]["digest"] == shelf.digests["digits"]


def test_going_back_is_to_what_it_was(here: tuple[TestClient, Shelf], clean: list[bytes]) -> None:
    client, shelf = here
    check_problem(client.post("/admin/bundle/rollback"), 409, "no bundle before")
    assert swap(client, "words").json()["current"]["digest"] == shelf.digests["words"]
    assert predictions(post(client, clean[0]))[0]["label"] == "four"
    manifest = shelf.root / "digits" / MANIFEST
    kept = manifest.read_bytes()
    manifest.write_bytes(kept.replace(b"digits", b"digitz", 1))
    check_problem(client.post("/admin/bundle/rollback"), 422, "it is not what it was")
    assert predictions(post(client, clean[0]))[0]["label"] == "four"
    manifest.write_bytes(kept)
    assert client.post("/admin/bundle/rollback").json()["current"]["digest"] == shelf.digests["digits"]
    assert predictions(post(client, clean[0]))[0]["label"] == "4"


def test_a_straggler_does_not_make_telemetry_begin_anew(here: tuple[TestClient, Shelf], clean: list[bytes]) -> None:
    """Else, while both bundles answer, whatever was seen of an attack is forgotten at every turn."""
    client, _ = here
    app: Any = client.app
    service = app.state.service

    def counted() -> tuple[float, float]:
        service.watching.telemetry.flush()
        metrics = read_metrics(client)
        return metrics["compared_queries_total",], metrics["not_compared_queries_total",]

    gate = Gate(service.engine.loaded.defences["none"])
    install(client, gate)
    before = service.bundles.current.name
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(post, client, clean[0], defense="gate")
        assert gate.entered.wait(30)
        assert swap(client, "words" if before != "words" else "digits").status_code == 200
        assert predictions(post(client, clean[1]))
        compared, left_out = counted()
        recent = service.watching.telemetry._recent
        gate.opened.set()
        assert late.result(30).json()["bundle"]["name"] == before
    assert predictions(post(client, clean[2]))
    assert counted() == (compared + 1, left_out + 1)
    assert service.watching.telemetry._recent is recent


def test_who_may_not(here: tuple[TestClient, Shelf], client: TestClient) -> None:
    mine, _ = here
    for headers in ({"Origin": "http://localhost"}, {"Host": "evil.example"}):
        check_problem(mine.post("/admin/bundle", json={"path": "words"}, headers=headers), 403, "own machine")
        check_problem(mine.post("/admin/bundle/rollback", headers=headers), 403)
    for ask in (client.get, client.post):  # a service without a root
        check_problem(ask("/admin/bundle", **({"json": {"path": "words"}} if ask == client.post else {})), 403, "root")
    app: Any = mine.app
    stranger = TestClient(app, base_url="http://localhost", client=("10.0.0.1", 1), raise_server_exceptions=False)
    check_problem(stranger.get("/admin/bundle"), 403)
    for body, seen in (({"path": ""}, '""'), ({"path": None}, "null"), ({"path": {"a\n": True}}, '{"a\\n": true}')):
        check_problem(mine.post("/admin/bundle", json=body), 422, "body.path", f"seen: {seen}")
    for body in ({}, {"path": "words", "force": True}, ["words"]):
        check_problem(mine.post("/admin/bundle", json=body), 422, "body")
    json_type = {"Content-Type": "application/json"}
    for text in (b"{", b"", b"hello", b'{"path":\n"\xff'):
        refused = mine.post("/admin/bundle", content=text, headers=json_type)
        assert "b'" not in check_problem(refused, 400, "Invalid JSON")["detail"]
    check_problem(mine.post("/admin/bundle", content=b'{"path":"words"}'), 415, "application/json")
    check_problem(swap(mine, 9000 * "x"), 413, "larger than 8192 bytes")


def test_a_stranger_is_refused_before_the_body_is_read(digits_bundle: Path, tmp_path: Path) -> None:
    """Whoever has no key could otherwise hold connections, and megabytes, for as long as they liked."""
    key = Key.model_validate({"id": "mine", "sha256": hash_key(new_key()).hex(), "scopes": ["admin"]})

    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b"{}"

    async def main() -> httpx2.Response:
        app = create_app(load_settings(bundle=digits_bundle, bundle_root=tmp_path, keys=[key]))
        async with (
            asyncio.timeout(5),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client,
        ):
            json_type = {"Content-Type": "application/json"}
            return await client.post("/admin/bundle", content=never(), headers=json_type)

    check_problem(asyncio.run(main()), 401, "a key is needed")


def test_what_is_reported_is_of_the_bundle_that_answered(
    here: tuple[TestClient, Shelf], clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one goes live after the engine's answer and before the lab and the page have written theirs."""
    client, shelf = here
    app: Any = client.app
    service, seen = app.state.service, list[str]()
    if live(client)["current"]["digest"] != shelf.digests["digits"]:
        assert swap(client, "digits").status_code == 200
    answer, views_answer, views_lab = service.answer, views.answer, views.lab

    async def answer_and_swap(request: Any, read: Any) -> Any:
        response = await answer(request, read)
        await service.bundles.swap(shelf.root / "words", named="words")
        return response

    def show(view: Callable[..., Any]) -> Callable[..., Any]:
        def shown(loaded: Any, *args: Any, **options: Any) -> Any:
            seen.append(loaded.bundle.digest)
            return view(loaded, *args, **options)

        return shown

    monkeypatch.setattr(service, "answer", answer_and_swap)
    monkeypatch.setattr(views, "answer", show(views_answer))
    monkeypatch.setattr(views, "lab", show(views_lab))
    for path in ("/v1/lab/attack?label=4", "/page/lab?label=4", "/page/answer"):
        response = client.post(path, content=clean[0], headers={"Content-Type": "image/png"})
        assert response.status_code == 200, response.text
        assert live(client)["current"]["digest"] == shelf.digests["words"]
        assert client.post("/admin/bundle/rollback").status_code == 200
    assert seen == 2 * [shelf.digests["digits"]]
