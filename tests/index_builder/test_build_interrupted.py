"""Builds that are killed, run out of disk, or meet each other: resumed, they end with the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from index_builder.build import BuildPlan, build_bundle
from index_builder.training import TrainingPlan
from index_builder.workspace import working_path
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages, load_dataset
from mithridate.errors import BuildError, OptionError
from mithridate.types import Epsilon

SPEC = "digits[train,:128]"
OPTIONS: dict[str, Any] = {"attacks": ("pgd3", "fgsm"), "index": "HNSW8", "shard_size": 32, "batch_size": 16}


def make_plan(out: Path, data: LabelledImages | None = None, **more: Any) -> BuildPlan:
    data = data or load_dataset(SPEC)
    return BuildPlan(data=data, out=out, epsilon=Epsilon(16), training=TrainingPlan(epochs=3), **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def few() -> LabelledImages:
    return load_dataset(SPEC)


@pytest.fixture
def plan(few: LabelledImages, tmp_path: Path) -> BuildPlan:
    return make_plan(tmp_path / "bundle", few)


@pytest.fixture(scope="module")
def whole(few: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What an uninterrupted build makes."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    build_bundle(make_plan(out, few))
    return Bundle.open(out)


class Interrupted(KeyboardInterrupt):
    """Stands for Ctrl-C."""


def stop_at(phase: str, call: int) -> Any:
    """A progress that interrupts the build the ``call``-th time it hears of ``phase``."""
    left = [call]

    def progress(seen: str, done: int, total: int) -> None:
        left[0] -= seen == phase
        if left[0] < 0:
            raise Interrupted

    return progress


def is_finished(plan: BuildPlan, whole: Bundle) -> None:
    """The same bundle as without interruption, verified, and nothing beside it."""
    assert Bundle.open(plan.out).digest == whole.digest
    assert sorted(path.name for path in plan.out.parent.iterdir()) == [plan.out.name]


# Another process, which may be killed. It forks for each attempt: importing torch takes longer than the build.

_DRIVER = """
import json, os, resource, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import test_build_interrupted as tests
from index_builder.build import build_bundle
from index_builder.workspace import working_path
from mithridate.errors import BuildError
from mithridate.neighbors import set_search_threads

few = tests.load_dataset(tests.SPEC)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_the_middle_of_a_file(working, number):
    seen = set()
    while len(seen) < number:
        seen |= {path.name for path in working.rglob("*.partial")}
    die()

def attempt(out, kind, value):
    threads = int(os.environ["TEST_THREADS"])  # as many as the tests themselves: other numbers round differently
    torch.set_num_threads(threads)
    set_search_threads(threads)
    calls = [0]
    def progress(phase, done, total):
        calls[0] += 1
        if (kind == "call" and calls[0] == value) or (kind == "phase" and phase == value):
            die()
    if kind == "time":
        threading.Timer(value, die).start()
    if kind == "file":
        threading.Thread(target=die_in_the_middle_of_a_file, args=(working_path(out), value), daemon=True).start()
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, resource.RLIM_INFINITY))
    try:
        build_bundle(tests.make_plan(out, few, **json.loads(sys.argv[3])), resume=True, progress=progress)
        return 0, ""
    except BuildError as error:
        return 3, str(error)

for jobs in json.loads(sys.argv[2]):
    children = []
    for out, kind, value in jobs:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            code, message = attempt(Path(out), kind, value)
            os.write(writer, message.encode())
            os._exit(code)
        os.close(writer)
        children.append((child, reader))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
    said = [os.read(reader, 9999).decode() for _, reader in children]
    print(json.dumps(list(zip(codes, said))), flush=True)
"""

Job = tuple[Path, str, Any]


def drive(rounds: list[list[Job]], **more: Any) -> list[list[tuple[int, str]]]:
    """Builds in other processes, those of a round at the same time: exit codes, and what they say where it is 3.

    ``more`` options go to their plans.
    """
    jobs = json.dumps([[(str(out), kind, value) for out, kind, value in jobs] for jobs in rounds])
    command = [sys.executable, "-c", _DRIVER, str(Path(__file__).parent), jobs, json.dumps(more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [[(code, message) for code, message in json.loads(line)] for line in done.stdout.splitlines()]


def test_killed_at_random_it_resumes_to_the_same_bytes(plan: BuildPlan, whole: Bundle) -> None:
    """With SIGKILL: between two steps, in the middle of writing a file, and on a clock."""
    rng = random.Random(20)
    steps, clock, race = (plan.out.parent / name / "bundle" for name in ("steps", "clock", "race"))
    surely: list[tuple[str, Any]] = [
        ("call", rng.randint(1, 3)),  # while training: a model half trained is not kept
        ("call", rng.randint(4, 8)),
        ("call", rng.randint(9, 12)),
        ("phase", "attack fgsm"),
        ("phase", "index"),
    ]
    perhaps: list[tuple[str, Any]] = [  # it may have finished before
        ("file", rng.randint(1, 3)),  # surely
        ("time", rng.uniform(0, 0.2)),
        ("time", rng.uniform(0, 0.2)),
        ("file", rng.randint(2, 9)),
        ("file", rng.randint(2, 9)),
    ]
    rounds = [[(steps, *one), (clock, *other)] for one, other in zip(surely, perhaps, strict=True)]
    fates = drive([*rounds, [(race, "none", 0)] * 4])
    assert [first for first, _ in fates[:-1]] == [(-9, "")] * 5
    assert fates[0][1] == (-9, "")
    assert all(code in (-9, 0) or "exists already" in said for _, (code, said) in fates[:-1]), fates
    # Four processes that build the same at the same time: one does it, the others are told.
    assert sorted(code for code, _ in fates[-1]) == [0, 3, 3, 3], fates
    assert all("running" in m or "finished" in m or "exists already" in m for code, m in fates[-1] if code)
    for out in (steps, clock, race):
        if not out.exists():
            build_bundle(replace(plan, out=out), resume=True)
        is_finished(replace(plan, out=out), whole)


def test_killed_while_it_gives_the_bundle_its_name(plan: BuildPlan, whole: Bundle) -> None:
    """The parts are removed and the plan too; only the last rename is missing."""
    with pytest.raises(Interrupted):
        build_bundle(plan, progress=stop_at("index", 0))
    working = working_path(plan.out)
    build_bundle(plan, resume=True)
    plan.out.rename(working)
    with pytest.raises(BuildError, match="is finished, with index 'HNSW8'"):
        build_bundle(replace(plan, index="Flat"), resume=True)
    with pytest.raises(BuildError, match="--resume"):
        build_bundle(plan)
    build_bundle(plan, resume=True)
    is_finished(plan, whole)


def test_files_that_do_not_fit_stop_the_build_and_lose_nothing(plan: BuildPlan, whole: Bundle) -> None:
    """The last few bytes of a file are the hard ones: np.save and FAISS do not notice that they are missing."""
    files = whole.manifest.files
    cases = [  # where it is killed first, the largest file that the disk then takes, the files that may be named
        (None, files["model.safetensors"].bytes - 10, ["model.safetensors"]),
        ("embed", files["exemplars/clean-00000.npy"].bytes - 5, ["-embeddings.npy", "clean-00001.npy"]),
        ("index", files["embeddings.npy"].bytes - 3, ["embeddings.npy"]),
        ("index", files["index.faiss"].bytes - 3, ["index.faiss"]),
    ]
    outs = [plan.out.parent / str(number) / "bundle" for number in range(len(cases))]
    first = [[(out, "phase", phase)] for out, (phase, _, _) in zip(outs, cases, strict=True) if phase]
    limited = [[(out, "limit", limit)] for out, (_, limit, _) in zip(outs, cases, strict=True)]
    fates = drive([*first, *limited])
    assert [fate for (fate,) in fates[: len(first)]] == [(-9, "")] * len(first)
    for out, (_, limit, names), ((code, message),) in zip(outs, cases, fates[len(first) :], strict=True):
        assert code == 3, (limit, message)
        assert "cannot write" in message
        assert "--resume" in message
        assert any(name in message for name in names), message
        assert list(out.parent.rglob("*.partial")) == []
        again = replace(plan, out=out)
        build_bundle(again, resume=True)
        is_finished(again, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_stops_the_build_and_loses_nothing(small_disk: Path, plan: BuildPlan, whole: Bundle) -> None:
    """Whatever it is that does not fit any more: the model, an exemplar, the index or the manifest."""
    plan, needed = replace(plan, out=small_disk / "bundle"), sum(e.bytes for e in whole.manifest.files.values())
    for share in (0.2, 0.6, 0.8, 1.0):  # while building it needs more than the bundle: the parts
        size = f"{int(share * needed) // 1024}k"
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
        with pytest.raises(BuildError, match=r"cannot write .*No space left on device.*--resume"):
            build_bundle(plan, resume=True)
        assert list(small_disk.rglob("*.partial")) == []
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    build_bundle(plan, resume=True)
    is_finished(plan, whole)


def test_a_disk_too_small_for_the_pixels_is_said_at_once(small_disk: Path, plan: BuildPlan) -> None:
    subprocess.run(["mount", "-o", "remount,size=16k", small_disk], check=True)
    with pytest.raises(BuildError, match=r"not enough space in .* at least 0.0 MB more; 0.0 MB are free"):
        build_bundle(replace(plan, out=small_disk / "bundle"))
    assert list(small_disk.iterdir()) == []


# Another plan, leftovers, and each other


@pytest.fixture
def interrupted(plan: BuildPlan) -> BuildPlan:
    with pytest.raises(Interrupted):
        build_bundle(plan, progress=stop_at("attack pgd3", 2))
    return plan


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"seed": 1}, ["seed was 0, now 1"]),
        ({"epsilon": Epsilon(8)}, ["epsilon was '16/255', now '8/255'"]),
        ({"attacks": ("pgd3",)}, ["attacks was ['pgd3', 'fgsm'], now ['pgd3']"]),
        ({"shard_size": 16}, ["shard_size was 32, now 16"]),
        ({"batch_size": 8}, ["batch_size was 16, now 8"]),
        ({"embedding_layer": "stage1"}, ["embedding_layer was 'auto', now 'stage1'"]),
        ({"training": TrainingPlan(epochs=4)}, ["model was", "epochs=3", "epochs=4"]),
        ({"arch": "small-cnn", "name": "x"}, ["arch was None, now 'small-cnn'; name was None, now 'x'"]),
        ({"mean": (0.5,)}, ["normalisation was [None, None], now [[0.5], None]"]),
        ({"resize": "center-crop"}, ["resize was 'exact', now 'center-crop'"]),
    ],
)
def test_another_plan_does_not_go_on_with_it(interrupted: BuildPlan, change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(BuildError) as caught:
        build_bundle(replace(interrupted, **change), resume=True)
    assert [part for part in ["had another plan", *parts] if part not in str(caught.value)] == [], str(caught.value)


def test_other_data_or_another_model_do_not_go_on_with_it(
    interrupted: BuildPlan, whole: Bundle, few: LabelledImages
) -> None:
    images = few.images.copy()
    images[7, 0, 3, 3] ^= 1
    other = LabelledImages(images=images, labels=few.labels, classes=few.classes, spec=few.spec)
    with pytest.raises(BuildError, match="dataset was 'sha256:"):
        build_bundle(replace(interrupted, data=other), resume=True)
    with pytest.raises(BuildError, match="model was"):
        build_bundle(replace(interrupted, model=whole.path / "model.safetensors"), resume=True)
    build_bundle(interrupted, resume=True)  # as before
    is_finished(interrupted, whole)


def test_another_index_may_go_on_with_it(interrupted: BuildPlan, tmp_path: Path) -> None:
    """It is made last, and a mistake in it should not cost the rest."""
    assert build_bundle(replace(interrupted, index="Flat"), resume=True).digest == (
        build_bundle(replace(interrupted, index="Flat", out=tmp_path / "anew")).digest
    )


def test_leftovers_are_neither_taken_nor_removed_without_being_told(interrupted: BuildPlan, whole: Bundle) -> None:
    with pytest.raises(BuildError, match=r"an interrupted build of .*bundle lies in .*; go on with --resume"):
        build_bundle(interrupted)
    build_bundle(interrupted, resume=True)
    is_finished(interrupted, whole)


def test_resuming_what_was_never_begun_builds_it(plan: BuildPlan, whole: Bundle) -> None:
    build_bundle(plan, resume=True)
    is_finished(plan, whole)


def test_what_is_in_the_way_stays(plan: BuildPlan) -> None:
    working = working_path(plan.out)
    working.mkdir()
    (working / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(BuildError, match="is not an interrupted build"):
            build_bundle(plan, resume=resume)
    (working / "plan.json").write_text("{")
    with pytest.raises(BuildError, match=r"plan.json is not readable"):
        build_bundle(plan, resume=True)
    assert (working / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_is_there_already_is_not_replaced(plan: BuildPlan, kind: str) -> None:
    if kind == "directory":
        plan.out.mkdir()
    elif kind == "file":
        plan.out.write_text("mine")
    else:
        plan.out.symlink_to("nowhere")
    for resume in (False, True):
        with pytest.raises(BuildError, match="exists already"):
            build_bundle(plan, resume=resume)
    assert [path.name for path in plan.out.parent.iterdir()] == [plan.out.name]


def test_a_place_that_cannot_be_is_refused(plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot build in"):
        build_bundle(replace(plan, out=tmp_path / "file" / "bundle"))


def test_a_build_that_is_refused_leaves_nothing_in_the_way(plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(OptionError) as caught:
        replace(plan, attacks=("cw",))
    assert "cw" in str(caught.value)
    with pytest.raises(Interrupted):
        build_bundle(plan, progress=stop_at("train", 1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_builds_at_once(plan: BuildPlan, whole: Bundle) -> None:
    """The second is refused, at once and whatever it asks; the first finishes."""
    begun, go_on = threading.Event(), threading.Event()

    def progress(phase: str, done: int, total: int) -> None:
        begun.set()
        assert go_on.wait(60)

    def build() -> None:
        torch.set_num_threads(int(os.environ["TEST_THREADS"]))  # a thread begins with a number of its own
        build_bundle(plan, progress=progress)

    first = threading.Thread(target=build)
    first.start()
    assert begun.wait(60)
    for resume in (False, True):
        with pytest.raises(BuildError, match=r"another build to .*bundle is running"):
            build_bundle(plan, resume=resume)
    go_on.set()
    first.join(120)
    is_finished(plan, whole)
