"""The page without a browser: its addresses, its headers, what it says, and what it keeps to itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import httpx2
import pytest
from evaluation_helpers import synthetic
from service_helpers import Serving, check_problem, install, post
from starlette.testclient import TestClient

from mithridate.bundle import Bundle
from mithridate.evaluation.card import make_card, write_card
from mithridate.evaluation.wording import ruling_in_words
from service.page.callers import shows_exemplars
from service.settings import load_settings


@pytest.fixture(scope="module")
def lab(serving: Serving) -> Iterator[TestClient]:
    with serving(offer=["none", "webnn"], lab=True) as client:
        yield client


def text(answer: httpx2.Response) -> str:
    """What is read on it."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", answer.text)).split())


def ask(client: TestClient, image: bytes, path: str = "/page/answer", **params: Any) -> httpx2.Response:
    return client.post(path, content=image, headers={"Content-Type": "image/png"}, params=params)


def form(client: TestClient, *images: bytes) -> httpx2.Response:
    return client.post("/", files=[("images", ("x.png", image, "image/png")) for image in images])


def test_nothing_but_the_service_itself_may_act_on_the_page(lab: TestClient, clean: list[bytes]) -> None:
    style, script = re.findall(r'(?:href|src)="(page/static/[^"]+)"', lab.get("/").text)
    answers = [lab.get("/"), lab.get("/page/about"), ask(lab, clean[0]), ask(lab, clean[0], "/page/lab")]
    for answer in [*answers, form(lab, clean[0]), lab.get(f"/{style}"), lab.get(f"/{script}")]:
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert not any("unsafe" in rule or "http" in rule or "*" in rule for rule in policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not re.search(r"<style|style=|\son[a-z]+=|javascript:|https?://", answer.text)
        assert not re.search(r"<script(?![^>]*\ssrc=)", answer.text)
    assert all(answer.headers["cache-control"] == "no-store" for answer in answers)
    assert "immutable" in lab.get(f"/{style}").headers["cache-control"]
    check_problem(lab.get("/page/static/routes"), 404)
    check_problem(lab.get("/page/static/page.html.jinja"), 404, "no such file")


def test_the_form_says_what_the_api_says(client: TestClient, adversarial: list[bytes]) -> None:
    image = next(i for i in adversarial if post(client, i).json()["predictions"][0]["suspicious"])
    said = post(client, image, explain=True, top_k=5).json()["predictions"][0]
    answer = form(client, image)
    assert answer.status_code == 200
    shown = text(answer)
    assert f"Suspicious: the base model says {said['undefended']['label']}, rmc says {said['label']}" in shown
    assert f"{100 * said['top'][1]['confidence']:.1f} %" in shown
    loss = said["adaptation"]["held_out_loss"]
    assert f"{loss['before']:.3g} before, {loss['after']:.3g} after" in shown
    poisoned = [neighbor for neighbor in said["neighbors"] if neighbor["copy"] != "clean"]
    assert f"Poisoned {len(poisoned)}" in shown
    assert f"{poisoned[0]['label']} pgd10 {poisoned[0]['distance']:.2f}" in shown
    assert f"Clean {len(said['neighbors']) - len(poisoned)}" in shown


@pytest.mark.parametrize("defense", ["none", "webnn"])
def test_a_defence_that_has_less_shows_less(client: TestClient, clean: list[bytes], defense: str) -> None:
    answer = ask(client, clean[0], defense=defense)
    shown = text(answer)
    assert answer.status_code == 200
    assert "How it adapted" not in shown
    assert ("The neighbours that moved it" in shown) == (defense == "webnn")
    assert "Where the time went" in shown
    assert ("No defence was asked" in shown) == (defense == "none")


def test_an_answer_that_nobody_stands_by_says_so(client: TestClient, clean: list[bytes]) -> None:
    loaded = client.app.state.service.engine.loaded  # type: ignore[attr-defined]
    from mithridate.defenses import build_defence

    install(client, build_defence("rmc:abstain=1", loaded.resources))
    shown = text(ask(client, clean[0], defense="rmc:abstain=1.0"))
    assert "rmc:abstain=1.0 abstains" in shown
    assert "does not stand by it" in shown


def test_bad_input_is_told_on_the_page_and_to_the_script(client: TestClient, clean: list[bytes]) -> None:
    answer = form(client, b"<script>alert(1)</script>")
    assert answer.status_code == 415
    assert "No answer (415)" in text(answer)
    assert "<script>alert" not in answer.text
    assert form(client, clean[0], clean[1]).status_code == 422
    check_problem(ask(client, b"no image"), 415)
    check_problem(ask(client, clean[0], defense="<b>"), 422, "unknown defence")


def test_other_sites_cannot_make_a_visitor_ask(lab: TestClient, clean: list[bytes]) -> None:
    for path in ("/page/answer", "/page/lab"):
        headers = {"Content-Type": "image/png", "Sec-Fetch-Site": "cross-site"}
        check_problem(lab.post(path, content=clean[0], headers=headers), 403, "page itself")
    answer = lab.post("/", files={"images": clean[0]}, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403


def test_training_images_stay_where_others_could_see_them(serving: Serving, clean: list[bytes]) -> None:
    def shown(**flags: Any) -> bool:
        return shows_exemplars(load_settings(bundle="b", **flags))

    assert [shown(), shown(host="::1"), shown(host="localhost"), shown(host="0.0.0.0")] == [True, True, True, False]
    assert not shown(page_exemplars=False)
    assert shown(host="0.0.0.0", page_exemplars=True)
    with serving(offer=["none"], page_exemplars=False) as client:
        answer = ask(client, clean[0])
        assert "Clean" in text(answer)
        assert "data:image" not in answer.text
        assert "data-exemplar" not in client.get("/").text
        check_problem(client.get("/page/exemplars/0.png"), 404)


def test_an_exemplar_is_what_the_bundle_has(client: TestClient, digits_bundle: Path) -> None:
    answer = client.get("/page/exemplars/3.png")
    assert answer.headers["content-type"] == "image/png"
    count = len(Bundle.open(digits_bundle, verify=False).manifest.layout)
    check_problem(client.get(f"/page/exemplars/{count}.png"), 404)
    check_problem(client.get("/page/exemplars/-1.png"), 404)
    check_problem(client.get("/page/exemplars/x.png"), 422)


def test_the_card_is_as_honest_as_the_report(serving: Serving, digits_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(digits_bundle, bundle)
    card = make_card(synthetic(bundle={"digest": Bundle.open(bundle, verify=False).digest}))
    write_card(bundle, card)
    with serving(bundle=bundle, offer=["none"], defense="none") as client:
        shown = text(client.get("/"))
    assert {entry.ruling for entry in card.defenses} >= {"base", "gain", "no evidence of gain", "harmful"}
    for entry in card.defenses:
        assert ruling_in_words(entry.ruling) in shown
        assert f"{100 * entry.worst_case.low:.1f}\u2013{100 * entry.worst_case.high:.1f}" in shown
        assert entry.ruling == "base" or all(reason in shown for reason in entry.reasons)
    assert card.command is None or card.command not in shown


def test_a_bundle_that_nobody_measured_says_so(client: TestClient) -> None:
    assert "what its defences are worth is not known" in text(client.get("/"))


def test_switched_off(serving: Serving, clean: list[bytes]) -> None:
    with serving(offer=["none"], defense="none", page=False, lab=False) as client:
        for path in ("/", "/page/about", "/page/static/page.css", "/page/exemplars/0.png"):
            check_problem(client.get(path), 404)
        for path in ("/page/answer", "/page/lab", "/v1/lab/attack"):
            check_problem(ask(client, clean[0], path), 404)
        assert "/v1/lab/attack" not in client.get("/openapi.json").text


def test_before_the_bundle_is_there_the_page_waits(digits_bundle: Path, clean: list[bytes]) -> None:
    from service.app import create_app

    app = create_app(load_settings(bundle=digits_bundle))
    client = TestClient(app, base_url="http://localhost")  # never started: nothing is loaded
    answer = client.get("/")
    assert answer.status_code == 503
    assert "still loading" in text(answer)
    assert 'http-equiv="refresh"' in answer.text
    assert form(client, clean[0]).status_code == 503


def test_names_from_a_bundle_are_escaped(client: TestClient, clean: list[bytes]) -> None:
    service: Any = client.app.state.service  # type: ignore[attr-defined]
    loaded = service.engine.loaded
    manifest = loaded.bundle.manifest
    hostile = replace(
        loaded,
        bundle=replace_manifest(loaded.bundle, manifest.model_copy(update={"classes": ("<i>", *manifest.classes[1:])})),
    )
    service.engine._loaded = hostile
    try:
        for answer in (client.get("/"), ask(client, clean[0])):
            assert answer.status_code == 200
            assert "<i>" not in answer.text
        assert "&lt;i&gt;" in client.get("/").text
    finally:
        service.engine._loaded = loaded


def replace_manifest(bundle: Any, manifest: Any) -> Any:
    import copy

    other = copy.copy(bundle)
    object.__setattr__(other, "manifest", manifest)
    return other
