"""The lab over the API: what it makes stays in the ball, and what it says is what the API says."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from service_helpers import SLOW, Serving, check_problem, post, post_multipart
from starlette.testclient import TestClient
from test_service_describe import read_metrics

from mithridate.images import decode_image
from service.lab_defence import LabDefence, read_lab


@pytest.fixture(scope="module")
def lab(serving: Serving) -> Iterator[TestClient]:
    with serving(offer=["none", "webnn", SLOW], lab=True) as client:
        yield client


def attack(client: TestClient, image: bytes, **params: Any) -> httpx2.Response:
    return client.post("/v1/lab/attack", content=image, headers={"Content-Type": "image/png"}, params=params)


def found(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("kind", ["static", "adaptive"])
@pytest.mark.parametrize("defense", ["none", "rmc", "webnn"])
def test_it_stays_in_the_ball_and_says_what_the_api_says(
    lab: TestClient, clean: list[bytes], kind: str, defense: str
) -> None:
    body = found(attack(lab, clean[0], attack=kind, epsilon="9/255", defense=defense))
    before, after = (
        decode_image(base64.b64decode(body[f"{which}_png"]), channels=1) for which in ("clean", "adversarial")
    )
    change = np.abs(after.astype(int) - before.astype(int)).max()
    assert 0 < change == body["largest_change"] <= 9
    assert (before == decode_image(clean[0], channels=1)).all()
    assert body["defense"] == defense
    assert body["label"]["label"] == body["clean"]["undefended"]["label"]
    again = post(lab, base64.b64decode(body["adversarial_png"]), defense=defense).json()["predictions"][0]
    assert again["undefended"]["confidence"] == pytest.approx(body["adversarial"]["undefended"]["confidence"], abs=1e-4)
    assert again["confidence"] == pytest.approx(body["adversarial"]["confidence"], abs=1e-4)


def test_a_large_epsilon_fools_the_base_model_and_not_always_the_defence(lab: TestClient, clean: list[bytes]) -> None:
    bodies = [found(attack(lab, image, epsilon="32/255")) for image in clean[:6]]
    fooled = [body for body in bodies if body["adversarial"]["undefended"]["label"] != body["label"]["label"]]
    repaired = [body for body in fooled if body["adversarial"]["label"] == body["label"]["label"]]
    assert len(fooled) >= 5
    assert len(repaired) >= len(fooled) / 2
    assert all(body["adversarial"]["suspicious"] for body in repaired)


def test_adaptive_is_made_for_the_defence(lab: TestClient, clean: list[bytes]) -> None:
    def left(kind: str) -> float:
        """Of the defence's confidence in what was right."""
        total = 0.0
        for image in clean[:2]:
            body = found(attack(lab, image, attack=kind, epsilon="32/255", defense="rmc", top_k=10))
            total += sum(s["confidence"] for s in body["adversarial"]["top"] if s["label"] == body["label"]["label"])
        return total

    assert left("adaptive") < left("static") - 0.3


def test_a_stated_label_is_attacked(lab: TestClient, clean: list[bytes]) -> None:
    wrong = next(str(n) for n in range(10) if str(n) != post(lab, clean[0]).json()["predictions"][0]["label"])
    body = found(attack(lab, clean[0], label=wrong, epsilon="4/255"))
    assert body["label"]["label"] == wrong
    assert body["adversarial"]["undefended"]["label"] != wrong


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"epsilon": "0/255"}, "1/255 to 64/255"),
        ({"epsilon": "65/255"}, "1/255 to 64/255"),
        ({"epsilon": "0.03"}, "k/255"),
        ({"label": "cat"}, "not a class"),
        ({"attack": "square"}, "attack"),
        ({"defense": "lab:static,8,,rmc"}, "cannot read"),
        ({"steps": "9999"}, "steps"),
    ],
)
def test_bad_options_are_one_clear_error(
    lab: TestClient, clean: list[bytes], params: dict[str, str], said: str
) -> None:
    check_problem(attack(lab, clean[0], **params), 422, said)


def test_bad_images_are_one_clear_error(lab: TestClient, clean: list[bytes]) -> None:
    check_problem(attack(lab, b"no image"), 415)
    files = [("images", ("x.png", image, "image/png")) for image in clean[:2]]
    check_problem(lab.post("/v1/lab/attack", files=files), 422, "one image")
    check_problem(lab.post("/v1/lab/attack", json={"images": [base64.b64encode(clean[0]).decode()]}), 422, "raw body")
    assert lab.post("/v1/lab/attack", files=files[:1]).status_code == 200


def test_the_lab_is_no_defence_to_ask_for(lab: TestClient, clean: list[bytes]) -> None:
    check_problem(post(lab, clean[0], defense="lab:static,8,,rmc"), 422, "cannot read")
    assert post_multipart(lab, clean[:1]).status_code == 200


def test_it_keeps_the_deadline(lab: TestClient, clean: list[bytes]) -> None:
    check_problem(attack(lab, clean[0], attack="adaptive", defense=SLOW, deadline_ms=150), 504, "deadline")
    assert attack(lab, clean[0]).status_code == 200, "and the engine is free again"


def test_it_is_no_sign_of_an_attacker(lab: TestClient, clean: list[bytes]) -> None:
    """Else an operator's own experiments ring the alerts that are there for somebody else's."""

    def signs() -> tuple[dict[tuple[str, ...], float], float]:
        lab.app.state.service.watching.telemetry.flush()  # type: ignore[attr-defined]
        metrics = read_metrics(lab)
        watched = ("suspicious", "adaptation", "compared", "near_duplicate", "not_compared", "abstained")
        return {name: value for name, value in metrics.items() if name[0].startswith(watched)}, metrics[
            "images_total", "lab"
        ]

    found(attack(lab, clean[0]))
    before, images = signs()
    for image in clean[:3]:
        found(attack(lab, image, epsilon="32/255", defense="rmc"))
    assert signs() == (before, images + 6)


def test_each_attack_has_a_price_of_its_own(lab: TestClient, clean: list[bytes]) -> None:
    """What is known of a slow one would else turn quick ones away, and the other way round."""
    for options in ({"attack": "static"}, {"attack": "adaptive"}, {"attack": "static", "epsilon": "2/255"}):
        for defense in ("none", "webnn"):
            found(attack(lab, clean[0], defense=defense, **options))
    known = lab.app.state.service.admission.costs._known  # type: ignore[attr-defined]
    priced = {f"lab:{kind}:{name}" for kind in ("static", "adaptive") for name in ("none", "webnn")}
    assert priced <= set(known)
    assert all(name.count(":") >= 2 for name in known if name.startswith("lab"))


def test_its_name_says_all(lab: TestClient, clean: list[bytes]) -> None:
    loaded: Any = lab.app.state.service.engine.loaded  # type: ignore[attr-defined]
    from mithridate.types import Epsilon

    for label in (None, 3):
        made = LabDefence(
            inner=loaded.defences[loaded.defence(SLOW).name], attack="adaptive", epsilon=Epsilon(8), label=label
        )
        assert read_lab(made.name, loaded) == made
    assert read_lab("rmc", loaded) is None
    assert 'defense="lab"' in lab.get("/metrics").text
    assert "lab:" not in lab.get("/metrics").text
