"""What happens at the edges of the command line: other people's files, closed pipes, interruptions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attack_client import Client
from cli.output import print_table
from mithridate.datasets import LabelledImages
from mithridate.errors import InputError
from mithridate.images import encode_png


def rewrite(bundle: Path, copy: Path, change: Callable[[dict], None]) -> Path:
    """A copy of the bundle with another manifest."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["model"].update(std=[0.0]), "model.std"),
        (lambda m: m["model"].update(mean=[], std=[]), "model.mean"),
        (lambda m: m["model"].update(mean=[0.1, 0.2]), "2 means and 1 deviations"),
        (lambda m: m.update(image_shape=[1, 0, 8]), "image_shape"),
        (lambda m: m.update(schema_version=True), "schema version"),
        (lambda m: m["copies"][0].update(base_correct=10**9), "classified correctly"),
        (lambda m: m["classes"].__setitem__(1, m["classes"][0]), "one name"),
        (lambda m: (m["dataset"].update(images=10**11), m.update(shard_size=1)), "does not list"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_at_once(
    mithridate: Callable, digits_bundle: Path, tmp_path: Path, change: Callable[[dict], None], says: str
) -> None:
    bundle = rewrite(digits_bundle, tmp_path / "b", change)
    result = mithridate("verify", bundle)
    assert result.code == 2
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_resume_of_a_finished_bundle_refuses_another_plan(mithridate: Callable, tmp_path: Path) -> None:
    build = ("build", "--dataset", "digits[train,:64]", "--attack", "pgd1", "--out", tmp_path / "b", "--resume")
    assert mithridate(*build, "--epsilon", "8/255").code == 0
    assert mithridate(*build, "--epsilon", "8/255").code == 0
    other = mithridate(*build, "--epsilon", "16/255")
    assert other.code == 2
    assert "epsilon was '8/255', now '16/255'" in other.err


def test_classes_must_have_names_of_their_own(mithridate: Callable, tmp_path: Path) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "d.npz", images=images, labels=labels, classes=np.array(["a", "a"]))
    result = mithridate("build", "--dataset", f"npz:{tmp_path / 'd.npz'}", "--out", tmp_path / "b")
    assert result.code == 2
    assert "two classes are called 'a'" in result.err


@pytest.mark.parametrize("option", [("--std", "0"), ("--std", "nan"), ("--device", "meta"), ("--index", "Flat,")])
def test_what_cannot_work_is_said_before_the_work(mithridate: Callable, tmp_path: Path, option: tuple) -> None:
    data = ("--dataset", "digits[:64]", "--attack", "pgd1")
    result = mithridate("build", *data, *option, "--out", tmp_path / "b")
    assert result.code == 2
    assert "train" not in result.err.replace("no --model given: training", "")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_trained_on_this_is_one_line(mithridate: Callable, tmp_path: Path) -> None:
    one = ("train", "--dataset", "digits[train,:1]", "--arch", "resnet18", "--epochs", "1")
    result = mithridate(*one, "--out", tmp_path / "m.safetensors")
    assert result.code == 2
    assert "resnet18 cannot be trained on digits[train,:1]" in result.err.splitlines()[-1]


def test_a_file_where_a_directory_should_be_is_one_line(mithridate: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (
        ("verify", tmp_path / "file" / "bundle"),
        ("build", "--dataset", "digits[:8]", "--attack", "pgd1", "--out", tmp_path / "file" / "b"),
        ("demo", "--out", tmp_path / "file"),
    ):
        result = mithridate(*arguments)
        assert result.code == 2, arguments
        assert result.err.splitlines()[-1].startswith("error: "), arguments
        assert "Traceback" not in result.err


def test_a_reader_that_leaves_is_no_failure() -> None:
    script = f"{sys.executable} -m cli build --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_a_full_output_is_one_line(digits_bundle: Path) -> None:
    command = [sys.executable, "-m", "cli", "verify", str(digits_bundle)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_interrupted_attack_keeps_what_it_measured(
    digits_bundle: Path, digits_test: LabelledImages, tmp_path: Path
) -> None:
    port = free_port()
    serve = [sys.executable, "-m", "cli", "serve", str(digits_bundle), "--port", str(port), "--log-level", "error"]
    url, out = f"http://127.0.0.1:{port}", tmp_path / "report"
    with subprocess.Popen(serve) as service:
        try:
            with Client(url) as client:
                client.wait_until_ready(60)
                assert client.predict(encode_png(digits_test.images[0])).defense == "rmc"
            attack = [sys.executable, "-m", "cli", "attack", url, "--dataset", "digits[test,:100]"]
            attack += ["--bundle", str(digits_bundle), "--attack", "pgd1", "--rate", "20", "--out", str(out)]
            with subprocess.Popen(attack, stderr=subprocess.PIPE, text=True) as process:
                give_up = time.monotonic() + 60
                while not (out / "outcomes.jsonl").exists() and time.monotonic() < give_up:
                    assert process.poll() is None
                    time.sleep(0.02)
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=60)
            assert process.returncode == 130
            assert "outcomes.jsonl" in errors
            lines = (out / "outcomes.jsonl").read_text().splitlines()
            assert 1 <= len(lines) < 400
            assert all("truth" in json.loads(line) for line in lines)
        finally:
            service.send_signal(signal.SIGTERM)
    assert service.returncode == 0


def test_an_engine_that_dies_is_no_unusable_input(digits_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    serve = [sys.executable, "-m", "cli", "serve", str(digits_bundle), "--port", "0", "--defense", "none"]
    with log.open("w") as sink, subprocess.Popen([*serve, "--offer", "none"], stderr=sink) as service:
        try:
            give_up = time.monotonic() + 60
            while (
                not (found := re.search(r"engine process (\d+) for", log.read_text())) or "ready" not in log.read_text()
            ):
                assert service.poll() is None, log.read_text()
                assert time.monotonic() < give_up
                time.sleep(0.05)
            os.kill(int(found[1]), signal.SIGKILL)
            assert service.wait(30) == 1
        finally:
            service.kill()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: the engine has stopped: ")
    assert "was killed by SIGKILL" in last


def free_port() -> int:
    """A port that nobody listens at just now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_foreign_server_is_recognised() -> None:
    page = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]
    with subprocess.Popen(page, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("port ")[1].split()[0])
            with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(InputError, match="HTTP 404"):
                client.wait_until_ready(20)
        finally:
            server.terminate()


def test_a_table_shows_its_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A data set's split looks like a style to rich, a class may be called like an emoji."""
    print_table("digits[test,:30]", ["[bold]"], [["[red]5[/red] :cat:"]])
    out = capsys.readouterr().out
    assert all(text in out for text in ("digits[test,:30]", "[bold]", "[red]5[/red] :cat:"))


def test_without_anything_it_shows_its_help(mithridate: Callable) -> None:
    result = mithridate()
    assert result.code == 2
    assert "\nCommands:\n" in result.err
    assert "error:" not in result.err
