"""The oracle over HTTP: the very answers of the defence behind it, each query counted once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from client_helpers import answer, closed_port, listening

from attack_client import RetryPolicy
from attack_client.oracle import HttpOracle, Session, UnansweredError
from attack_client.query_log import QueryLog
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import PartwiseOracle, Track
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence
from mithridate.errors import InputError, OptionError

ROWS = torch.arange(50)
QUICK = RetryPolicy(base_seconds=0.001, cap_seconds=0.001)


@pytest.fixture(scope="module")
def pixels(digits_test: LabelledImages) -> torch.Tensor:
    return torch.from_numpy(digits_test.images[:50])


class Counting:
    """Says 0 of every image, with a score for each of ten classes; ``moods`` is asked first what to do instead."""

    def __init__(self, *moods: str) -> None:
        self.moods = list(moods)
        self.images = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        mood = self.moods.pop(0) if self.moods else ""
        status, content, headers = 200, self.answer(json.loads(body)), [(b"content-type", b"application/json")]
        if mood == "vanish":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            raise ConnectionResetError  # the connection is closed in the middle of the answer
        if mood == "busy":
            status, content = 429, {"detail": "busy"}
            headers.append((b"retry-after", b"0"))
        elif mood == "fail":
            status, content = 500, {"detail": "a bad day"}
        elif mood == "short":
            content["predictions"] = content["predictions"][1:]
        elif mood == "other bundle":
            content["bundle"]["digest"] = "sha256:1"
        elif mood == "few scores":
            content["predictions"][0]["top"] = content["predictions"][0]["top"][1:]
        else:
            self.images += len(content["predictions"])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    @staticmethod
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        top = [{"label": str(c), "class_index": c, "confidence": 0.1} for c in range(asked["top_k"])]
        one = {**answer()["predictions"][0], "top": top, "abstained": True}
        return {**answer(), "predictions": [one] * len(asked["images"])}


def oracle(session: Session, *, track: Track = "scores", **options: Any) -> HttpOracle:
    return HttpOracle(session, **{"defense": "none", "classes": 10, "images": 50, **options}, track=track)


@pytest.mark.parametrize("defense", ["none", "rmc", "webnn"])
@pytest.mark.parametrize("track", ["scores", "labels"])
def test_answers_are_those_of_the_defence_bit_for_bit(
    served: str, resources: Resources, pixels: torch.Tensor, defense: str, track: Track
) -> None:
    """Where the batches are the same: one request at a time, as many images a request as the other takes a call."""
    inside = InProcessOracle(build_defence(defense, resources), classes=10, track=track, images_a_call=16)
    with Session(served) as session:
        outside = oracle(session, defense=defense, track=track, images_a_request=16)
        assert isinstance(outside, PartwiseOracle)
        seen, expected = outside.ask(ROWS, pixels), inside.ask(ROWS, pixels)
    assert torch.equal(seen.labels, expected.labels)
    assert outside.traffic.requests == 4
    assert outside.traffic.merged == 0
    if track == "labels":
        assert seen.scores is expected.scores is None
    else:
        assert seen.scores is not None
        assert seen.scores.dtype == torch.float64
        assert expected.scores is not None
        assert torch.equal(seen.scores, expected.scores)


def test_each_query_is_its_images(pixels: torch.Tensor) -> None:
    rows = torch.tensor([3, 3, 7, 0, 3])
    with listening(Counting()) as url, Session(url) as session:
        asked = oracle(session, images=8, images_a_request=2)
        asked.ask(rows, pixels[rows])
        asked.ask(torch.zeros(0, dtype=torch.int64), pixels[:0])
    assert asked.asked.tolist() == asked.sent.tolist() == asked.abstained.tolist() == [1, 0, 0, 3, 0, 0, 0, 1]
    assert asked.traffic.requests == len(asked.traffic.seconds) == 3
    assert asked.image_seconds.sum() == pytest.approx(sum(asked.traffic.seconds))
    assert asked.image_seconds[1] == 0


def test_what_is_sent_again_counts_once(pixels: torch.Tensor) -> None:
    service = Counting("", "busy", "busy")
    with listening(service) as url, Session(url, retry=QUICK) as session:
        asked = oracle(session, images_a_request=20)
        asked.ask(ROWS, pixels)
    assert asked.asked.tolist() == [1] * 50
    assert service.images == 50
    assert asked.traffic.retries == 2
    assert asked.retried.tolist() == [0] * 20 + [1] * 20 + [0] * 10


@pytest.mark.parametrize("mood", ["vanish", "fail", "short", "other bundle", "few scores"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_lost_answer_is_neither_invented_nor_asked_for_again(
    pixels: torch.Tensor, tmp_path: Path, mood: str, concurrency: int
) -> None:
    service = Counting("", mood)
    with listening(service) as url, Session(url, retry=QUICK) as session:
        options = {"images_a_request": 15, "concurrency": concurrency, "bundle": "sha256:0"}
        with QueryLog(tmp_path / "log") as log:
            first = oracle(session, log=log, **options)
            with pytest.raises(UnansweredError, match=rf"{30 if concurrency == 1 else 15} of 45 queries") as caught:
                first.ask(ROWS[:45], pixels[:45])
        assert int(first.asked.sum()) == service.images == 45 - caught.value.queries
        with QueryLog(tmp_path / "log") as log:
            again = oracle(session, log=log, **options)
            again.ask(ROWS[:45], pixels[:45])
    assert service.images == 45, "asked only for what had no answer"
    assert again.asked.tolist() == [1] * 45 + [0] * 5
    assert int(again.sent.sum()) == caught.value.queries


def test_nobody_there(pixels: torch.Tensor) -> None:
    told = pytest.raises(UnansweredError, match=r"50 of 50 queries have no answer: .*does not answer")
    with Session(f"http://127.0.0.1:{closed_port()}", retry=QUICK) as session, told:
        oracle(session).ask(ROWS, pixels)


def test_requests_go_out_together_up_to_the_ceiling(pixels: torch.Tensor) -> None:
    class Slow(Counting):
        now = most = 0

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.02)
            await super().__call__(scope, receive, send)
            self.now -= 1

    for ceiling in (1, 3):
        service = Slow()
        with listening(service) as url, Session(url) as session:
            oracle(session, images_a_request=5, concurrency=ceiling).ask(ROWS, pixels)
        assert service.most == ceiling


def test_the_log_gives_back_what_was_kept(served: str, pixels: torch.Tensor, tmp_path: Path) -> None:
    options = {"defense": "rmc", "images_a_request": 16}
    with Session(served) as session:
        with QueryLog(tmp_path / "log") as log:
            first = oracle(session, log=log, **options)
            seen = first.ask(ROWS, pixels)
            with pytest.raises(InputError, match="in use"):
                QueryLog(tmp_path / "log")
        whole = (tmp_path / "log").read_bytes()
        (tmp_path / "log").write_bytes(whole[:-30])  # as a killed client leaves it
        with QueryLog(tmp_path / "log") as log:
            assert len(log) == 3
            again = oracle(session, log=log, **options)
            recalled = again.ask(ROWS, pixels)
    assert torch.equal(recalled.labels, seen.labels)
    assert recalled.scores is not None
    assert seen.scores is not None
    assert torch.equal(recalled.scores, seen.scores)
    assert torch.equal(again.asked, first.asked)
    assert (again.traffic.requests, again.traffic.recalled, int(again.sent.sum())) == (4, 3, 2)
    assert again.image_seconds[:48].tolist() == pytest.approx(first.image_seconds[:48].tolist(), abs=1e-6)


def test_a_log_of_something_else(pixels: torch.Tensor, tmp_path: Path) -> None:
    with listening(Counting()) as url, Session(url) as session:
        with QueryLog(tmp_path / "log") as log:
            oracle(session, log=log).ask(ROWS, pixels)
        for options, sent in (({}, 255 - pixels), ({"defense": "rmc"}, pixels), ({"track": "labels"}, pixels)):
            told = pytest.raises(UnansweredError, match="was another one when this attack was begun")
            with QueryLog(tmp_path / "log") as log, told:
                oracle(session, log=log, **options).ask(ROWS, sent)
    (tmp_path / "log").write_text("not a log\n")
    with pytest.raises(InputError, match="damaged at byte 0"):
        QueryLog(tmp_path / "log")


def test_what_cannot_be_asked(pixels: torch.Tensor) -> None:
    with Session("http://127.0.0.1:1") as session:
        with pytest.raises(OptionError, match="at most 1000 classes, this bundle has 1001: attack its labels"):
            oracle(session, classes=1001)
        with pytest.raises(OptionError, match="allowed: from 1"):
            oracle(session, concurrency=0)
        with pytest.raises(ValueError, match="49 rows"):
            oracle(session).ask(ROWS[:49], pixels)
