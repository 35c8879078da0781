"""A client that is killed, at any moment, and goes on: nothing is asked twice but what was under way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest
from client_helpers import FakeService, listening

from attack_client import Client
from attack_client.black_box import BlackBoxPlan
from attack_client.campaign import run_campaign
from attack_client.plan import CampaignPlan
from attack_client.results import CampaignResult, image_lines, write_results
from attack_client.transfer import load_surrogate
from attack_client.workspace import Workspace, file_name
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.errors import InputError, OptionError
from mithridate.types import Epsilon
from service.app import create_app
from service.settings import load_settings

A_REQUEST = 8
AT_ONCE = 2
SENDERS = 32
"""Single images that may be under way at once."""

_CLIENT = """
import sys, test_resume
test_resume.attack(sys.argv[1], test_resume.Path(sys.argv[2]), test_resume.Path(sys.argv[3]), resume=True)
"""


@pytest.fixture(scope="module")
def data() -> LabelledImages:
    return load_dataset("digits[test,:10]")


def attack(
    url: str, bundle: Path | None, out: Path, *, resume: bool = False, seed: int = 0, **options: Any
) -> CampaignResult:
    data = load_dataset("digits[test,:10]")
    asked = {"attacks": ("rays",), "epsilon": Epsilon(40), "queries": 20, **options}
    plan = CampaignPlan(
        url=url,
        data=data,
        surrogate=None if bundle is None else load_surrogate(bundle, data),
        attacks=("pgd1",) if bundle else (),
        black_box=BlackBoxPlan(**asked, images_a_request=A_REQUEST, concurrency=AT_ONCE),
        epsilon=Epsilon(40),
        rate=200,
        defenses=("webnn",),
        seed=seed,
    )
    workspace = Workspace(out, resume=resume)
    try:
        result = run_campaign(plan, progress=lambda *_: None, workspace=workspace)
        write_results(result, out)
        return result
    finally:
        workspace.close()


class Killer:
    """An application before which clients are killed: as a request comes, or with its answer on the way."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.victim: int | None = None
        self.after = 0
        self.answered = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        due = False
        if scope["type"] == "http" and scope["path"] == "/v1/predict" and self.victim is not None:
            self.after -= 1
            due = self.after == 0
        now, later = due and not self.answered, due and self.answered
        if now:
            self.kill()
        await self.app(scope, receive, send)
        if later:
            self.kill()

    def kill(self) -> None:
        assert self.victim is not None
        os.kill(self.victim, signal.SIGKILL)


@pytest.fixture(scope="module")
def killer(digits_bundle: Path) -> Iterator[tuple[Killer, str]]:
    app = Killer(create_app(load_settings(bundle=digits_bundle, seed=7)))
    with listening(app, lifespan="on") as url:
        with Client(url) as client:
            client.wait_until_ready()
        yield app, url


def images_answered(url: str) -> int:
    text = httpx2.get(f"{url}/metrics").text
    return sum(int(float(value)) for value in re.findall(r"^mithridate_images_total\S* (\S+)$", text, re.MULTILINE))


def lines_of(result: CampaignResult) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in image_lines(result)]


def test_killed_clients_end_where_one_that_lived_does(
    killer: tuple[Killer, str], digits_bundle: Path, tmp_path: Path
) -> None:
    app, url = killer
    whole = attack(url, digits_bundle, tmp_path / "whole")
    distinct = images_answered(url)
    draws, under_way = Random(3), 0
    # Of 40 single images first, then of the black-box attacks: a request of theirs is half a step.
    for number, after in enumerate((draws.randrange(15, 35), draws.randrange(50, 65))):
        command = [sys.executable, "-c", _CLIENT, url, str(digits_bundle), str(tmp_path / "killed")]
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
        app.victim = None
        client = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        app.after, app.answered, app.victim = after, number % 2 == 1, client.pid
        _, errors = client.communicate(timeout=120)
        app.victim = None
        assert client.returncode == -signal.SIGKILL, errors.decode()
        under_way += max(SENDERS, AT_ONCE * A_REQUEST)
    result = attack(url, digits_bundle, tmp_path / "killed", resume=True)
    assert sum(case.traffic.recalled for case in result.cases) > 0, "the second was killed in a black-box attack"
    again = images_answered(url) - distinct
    assert distinct <= again <= distinct + under_way
    assert sorted(map(str, lines_of(result))) == sorted(map(str, lines_of(whole)))

    finished = images_answered(url)
    once_more = attack(url, digits_bundle, tmp_path / "killed", resume=True)
    assert images_answered(url) == finished, "nothing is left to ask"
    assert sum(case.sent for case in once_more.cases) == 0
    assert sorted(map(str, lines_of(once_more))) == sorted(map(str, lines_of(whole)))


def test_an_uninterrupted_run_asks_for_what_it_says(
    killer: tuple[Killer, str], data: LabelledImages, tmp_path: Path
) -> None:
    _, url = killer
    before = images_answered(url)
    result = attack(url, None, tmp_path / "out")
    logged = 0
    for log in (tmp_path / "out" / "queries").iterdir():
        logged += sum(len(json.loads(line)["labels"]) * 3 // 4 // 8 for line in log.read_text().splitlines())
    assert images_answered(url) - before == len(result.outcomes) + logged
    assert sum(image.queries for case in result.cases for image in case.images) < logged, "and probes and final answers"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"queries": 13}, r"begun with another queries: 20; seen: 13"),
        ({"attacks": ("square",)}, r"another black_box: \['rays'\]; seen: \['square'\]"),
        ({"seed": 1}, "another seed"),
        ({"epsilon": Epsilon(41)}, "another black_box_epsilon"),
    ],
)
def test_another_attack_does_not_go_on(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with listening(FakeService(defenses=("none", "webnn"))) as url:
        attack(url, None, tmp_path / "out")
        with pytest.raises(OptionError, match=told):
            attack(url, None, tmp_path / "out", resume=True, **options)


def test_a_failure_is_tried_again(tmp_path: Path) -> None:
    service = FakeService(defenses=("none", "webnn"), fails_every=7)
    with listening(service) as url:
        failed = attack(url, None, tmp_path / "out")
        assert any(row.errors for row in failed.rows)
        assert any(case.error for case in failed.cases)
        service._fails_every = 0
        result = attack(url, None, tmp_path / "out", resume=True)
        answered = service.images
        attack(url, None, tmp_path / "out", resume=True)
        assert service.images == answered
    assert not any(row.errors for row in result.rows)
    assert not any(case.error for case in result.cases)


def test_what_is_no_attack_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with listening(FakeService(defenses=("none", "webnn"))) as url:
        with pytest.raises(OptionError, match="exists already"):
            attack(url, None, other)
        with pytest.raises(OptionError, match="something else"):
            attack(url, None, other, resume=True)
        assert [path.name for path in other.iterdir()] == ["thesis.tex"]
        (tmp_path / "empty").mkdir()
        attack(url, None, tmp_path / "empty", resume=True)
        (tmp_path / "empty" / "outcomes.jsonl").write_text("{}\n")
        with pytest.raises(InputError, match="damaged"):
            attack(url, None, tmp_path / "empty", resume=True)


def test_where_nothing_was_measured_all_is_as_it_was(tmp_path: Path) -> None:
    """A directory that was there is the user's, empty or not, and so is an attack that was begun before."""
    empty, begun, ours = tmp_path / "empty", tmp_path / "begun", tmp_path / "ours"
    empty.mkdir()
    Workspace(begun).begin({"seed": 0})
    for out in (empty, begun):
        workspace = Workspace(out, resume=True)
        workspace.begin({"seed": 0})
        assert workspace.discard_if_empty()
    assert list(empty.iterdir()) == []
    assert [path.name for path in begun.iterdir()] == ["plan.json"]
    (empty / "thesis.tex").write_text("x")
    workspace = Workspace(empty, resume=True)
    with pytest.raises(OptionError, match="something else"):
        workspace.begin({"seed": 0})
    assert workspace.discard_if_empty(), "there is nothing to go on with"
    assert [path.name for path in empty.iterdir()] == ["thesis.tex"]
    workspace = Workspace(ours, resume=True)
    workspace.begin({"seed": 0})
    assert workspace.discard_if_empty()
    assert not ours.exists()


@pytest.mark.parametrize("plan", ["[]", "7", "{", "\N{SNOWMAN}"])
def test_a_damaged_plan_is_said_in_one_line(tmp_path: Path, plan: str) -> None:
    with listening(FakeService(defenses=("none", "webnn"))) as url:
        attack(url, None, tmp_path / "out")
        (tmp_path / "out" / "plan.json").write_text(plan, encoding="utf-16")
        with pytest.raises(InputError, match="damaged"):
            attack(url, None, tmp_path / "out", resume=True)
        (tmp_path / "out" / "plan.json").write_text(plan, encoding="utf-8")
        with pytest.raises(InputError, match="damaged"):
            attack(url, None, tmp_path / "out", resume=True)


def test_other_examples_are_not_mixed_with_those_that_were_sent(tmp_path: Path) -> None:
    """The same name of a model file, or more threads, may make other pixels: half of each would be nobody's result."""
    workspace = Workspace(tmp_path / "out")
    workspace.begin({"seed": 0})
    workspace.settle("examples of pgd1", "sha256:1")
    again = Workspace(tmp_path / "out", resume=True)
    again.begin({"seed": 0})
    again.settle("examples of pgd1", "sha256:1")
    with pytest.raises(OptionError, match="another examples of pgd1: sha256:1; seen: sha256:2"):
        again.settle("examples of pgd1", "sha256:2")


def test_names_make_files() -> None:
    assert file_name("rmc:scope=all", "square") == "rmc-scope-all.square"
    assert "/" not in file_name("../../etc", "x")
