"""The bill of materials is valid, complete, the same twice, and says nothing of the machine it was made on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cyclonedx", reason="writing a bill of materials needs cyclonedx-python-lib")

ROOT = Path(__file__).parents[2]


def _run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, str(ROOT / "deploy/sbom.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ran.returncode == status, ran.stderr
    return ran


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("sbom") / "sbom.cdx.json"
    _run("--out", str(file))
    return file.read_text()


def _components(text: str) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in json.loads(text)["components"]}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_the_schema_accepts_it(written: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(written) is None
    assert validator.validate_str(written.replace('"bomFormat"', '"format"')) is not None, "it can say no"


def test_it_lists_the_pinned_versions_of_what_the_service_needs(written: str) -> None:
    components, pins = _components(written), _pins()
    assert {"torch", "torchvision", "faiss-cpu", "fastapi", "starlette", "pillow", "pydantic-core"} <= set(components)
    assert not {"pytest", "ruff", "mypy", "hypothesis", "foolbox"} & set(components), "tools are not delivered"
    for name, component in components.items():
        if name in pins:
            # A +cpu build of the same version is the same release.
            assert component["version"].partition("+")[0] == pins[name], name
        assert component["purl"].startswith(f"pkg:pypi/{name}@")
    # The same file says: what torch and faiss-gpu bring along follows them.
    unpinned = {name for name in components if name not in pins}
    assert all(re.match("nvidia|cuda|triton|setuptools", name) for name in unpinned), unpinned
    assert all(components[name]["licenses"] for name in ("torch", "fastapi", "pillow", "numpy"))


def test_what_needs_what(written: str) -> None:
    needs = {item["ref"].partition("@")[0]: item.get("dependsOn", []) for item in json.loads(written)["dependencies"]}
    assert any(ref.startswith("pkg:pypi/torchvision@") for ref in needs["pkg:pypi/mithridate"])
    assert any(ref.startswith("pkg:pypi/starlette@") for ref in needs["pkg:pypi/fastapi"])


def test_nothing_of_this_machine_is_in_it(written: str) -> None:
    for path in (ROOT, Path(sys.prefix), Path.home(), Path.cwd()):
        assert str(path) not in written or str(path) == "/"
    assert "file:" not in written
    hosts = set(re.findall(r"https?://([^/\"]+)", written))
    assert hosts == {"cyclonedx.org"}, "the schema's name and no other address"


def test_the_same_packages_give_the_same_bytes(written: str, tmp_path: Path) -> None:
    _run("--out", str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_text() == written


def test_an_image_is_read_from_its_file_system(tmp_path: Path) -> None:
    site = tmp_path / "opt/venv/lib/python3.11/site-packages"
    for name, lines in {
        "mithridate-0.1.0": "License-Expression: Apache-2.0\nRequires-Dist: thing>=1",
        "thing-2.0": "License: A licence of its own\n        with a second line",
        "other-1.0": "Classifier: License :: OSI Approved :: MIT License",
    }.items():
        folder = site / f"{name}.dist-info"
        folder.mkdir(parents=True)
        own, version = name.split("-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {own}\nVersion: {version}\n{lines}\n")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9\nDescription: a\n b\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n"
    )
    (tmp_path / "usr/share/doc/libc6").mkdir(parents=True)
    (tmp_path / "usr/share/doc/libc6/copyright").write_text(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
        "License: LGPL-2.1+\nLicense: GPL-2\n"
    )
    ran = _run("--root", str(tmp_path), "--out", str(tmp_path / "sbom.json"), "--licenses")
    components = _components((tmp_path / "sbom.json").read_text())
    assert components["libc6"]["purl"] == "pkg:deb/debian/libc6@2.36-9"
    assert set(components) == {"thing", "other", "libc6"}
    assert "| libc6 | 2.36-9 | LGPL-2.1+, GPL-2 |" in ran.stdout
    assert "| thing | 2.0 | A licence of its own |" in ran.stdout
    assert "| other | 1.0 | MIT License |" in ran.stdout


def test_what_is_no_image_is_said_in_one_line(tmp_path: Path) -> None:
    ran = _run("--root", str(tmp_path), "--out", str(tmp_path / "sbom.json"), status=1)
    assert "it is not the file system of one of these images" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "sbom.json").exists()
