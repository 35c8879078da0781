"""``mithridate inspect pixels``: what it writes, and that it writes all of it or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mithridate.evaluation import pixel_figures

DATA = ("--dataset", "digits[test,:30]")
QUICK = ("--attack", "pgd2", "--lambdas", "0,0.5,1", "--shares", "0,25,100", "--threads", "2")
ALONE = ("--attack", "pgd2", "--threads", "2")
PNG = b"\x89PNG\r\n"


def test_writes_pictures_and_numbers(mithridate: Callable, manipulated_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "pixels"
    result = mithridate("inspect", "pixels", manipulated_bundle, *DATA, *QUICK, "--out", out, "--json")
    assert result.code == 0, result.err
    content = json.loads((out / "pixels.json").read_text())
    assert json.loads(result.out) == content
    assert sorted(path.name for path in out.iterdir()) == sorted(["pixels.json", *content["pictures"]])
    for name in ("gradients.png", "lambda.png", "masked-pgd.png"):
        assert (out / name).read_bytes().startswith(PNG)
        assert (out / name).stat().st_size < 200_000
    assert content["command"].startswith("mithridate inspect pixels ")
    assert (content["images"], content["attack"], content["epsilon"]) == (30, "pgd2", "32/255")
    rows = {row["lambda"]: row for row in content["gradients"]}
    assert list(rows) == [None, 0, 0.5, 1]
    assert rows[1]["iou"] == 1
    assert rows[1]["off_lattice"] == 0
    assert rows[0]["correct"] == rows[None]["correct"]
    assert {(row["pixels"], row["share"]) for row in content["masked"]} == {
        (order, share) for order in ("top", "random", "bottom") for share in (0, 0.25, 1)
    }
    assert list(out.parent.iterdir()) == [out]


def test_the_table_says_what_the_file_says(mithridate: Callable, manipulated_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = mithridate(
        "inspect", "pixels", manipulated_bundle, *DATA, *QUICK, "--attacked", 20, "--out", tmp_path / "empty"
    )
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "empty" / "pixels.json").read_text())
    assert "digits[test,:30], n = 30" in result.out
    assert "pgd2 at 32/255, n = 20" in result.out
    for row in content["gradients"]:
        (line,) = [text for text in result.out.splitlines() if text.split()[:1] == [row["defense"]] and "e-" in text]
        assert f"{100 * row['accuracy']:.1f} % [" in line
        assert line.split()[-1] == f"{row['iou']:.3f}"
    assert f"pictures and pixels.json: {tmp_path / 'empty'}" in result.err


def test_without_a_prm_it_says_what_is_left(mithridate: Callable, digits_bundle: Path, tmp_path: Path) -> None:
    result = mithridate("inspect", "pixels", digits_bundle, *DATA, *ALONE, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "the bundle has no PRM (build --prm FILE): only the base model's gradient was measured" in result.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gradients.png", "pixels.json"]
    assert json.loads((tmp_path / "out" / "pixels.json").read_text())["masked"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", *DATA, "--out", "OUT"), "nowhere"),
        (("BUNDLE", "--dataset", "digitz", "--out", "OUT"), "digits"),
        (("BUNDLE", "--dataset", "npz:other.npz", "--out", "OUT"), "other.npz"),
        (("BUNDLE", *DATA, "--out", "full"), "full exists already and is no empty directory"),
        (("BUNDLE", *DATA, "--out", "full/file"), "full/file exists already"),
        (("BUNDLE", *DATA, "--out", "full/file/out"), "cannot write to full/file/out: Not a directory"),
        (("BUNDLE", *DATA, "--out", "OUT", "--module", "1"), "module=1 is not there; the bundle has 1"),
        (("BUNDLE", *DATA, "--out", "OUT", "--lambdas", "0,one"), "--lambdas '0,one' is not numbers"),
        (("BUNDLE", *DATA, "--out", "OUT", "--lambdas", "2"), "lambda 2 is out of range"),
        (
            ("BUNDLE", *DATA, "--out", "OUT", "--shares", "0,101"),
            "--shares 101 is out of range; allowed: 0 to 100 percent",
        ),
        (("BUNDLE", *DATA, "--out", "OUT", "--attack", "pdg20"), "unknown attack 'pdg20'"),
        (("BUNDLE", *DATA, "--out", "OUT", "--epsilon", "0.03"), "k/255"),
        (("BUNDLE", *DATA, "--out", "OUT", "--attacked", "0"), "attacked"),
        (("BUNDLE", *DATA), "--out"),
        (("BUNDLE", *DATA, "--out", "."), ". is where you are, and would be replaced"),
        (("BUNDLE", *DATA, "--image-size", "16", "--out", "OUT"), "(1, 16, 16)"),
        (("BUNDLE", *DATA, "--device", "cuda:99", "--out", "OUT"), "cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    mithridate: Callable,
    manipulated_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    result = mithridate("inspect", "pixels", *(str(manipulated_bundle) if a == "BUNDLE" else a for a in arguments))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert says in result.err
    assert result.out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_what_fails_at_the_end_leaves_nothing(
    mithridate: Callable, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: object, directory: Path, *, title: str) -> None:
        (directory / "gradients.png").write_bytes(PNG)
        raise OSError(28, "No space left on device", str(directory / "lambda.png"))

    monkeypatch.setattr(pixel_figures, "draw", full)
    result = mithridate("inspect", "pixels", digits_bundle, *DATA, *ALONE, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "No space left on device" in result.err
    assert list(tmp_path.iterdir()) == []
    assert "none" in result.out  # what was measured is not lost


def test_options_about_a_prm_are_refused_where_there_is_none(
    mithridate: Callable, digits_bundle: Path, tmp_path: Path
) -> None:
    result = mithridate("inspect", "pixels", digits_bundle, *DATA, "--module", 7, "--out", tmp_path / "out")
    assert result.code == 2
    assert "has no PRM, which --module, --lambdas, --shares and --attacked are about" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_said_before_the_work(
    mithridate: Callable, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = mithridate("inspect", "pixels", digits_bundle, *DATA, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err == "error: pictures need matplotlib; install it: pip install 'mithridate[report]'\n"
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy(mithridate: Callable) -> None:
    code = (
        "import sys; from cli.main import run; sys.argv[1:] = ['inspect', 'pixels', '--help']\n"
        "try: run()\n"
        "except SystemExit as e: assert not e.code\n"
        "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--lambdas" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert mithridate("inspect").code == 2
    assert "pixels" in mithridate("inspect", "--help").out
