"""What a release is made from agrees with itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import mithridate

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_where_it_is_written() -> None:
    assert PROJECT["version"] == mithridate.__version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert any(heading.split()[0] in ("Unreleased", PROJECT["version"]) for heading in headings)


def test_every_direct_dependency_has_a_pin_that_it_allows() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    wanted = [
        *PROJECT["dependencies"],
        *(text for texts in PROJECT["optional-dependencies"].values() for text in texts),
    ]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_what_an_image_is_built_from_may_enter_the_build() -> None:
    """A file that .dockerignore keeps out fails the build only where there is an engine to build with."""
    admitted = {line[1:].strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = re.findall(r"^COPY (?!--from)(.+) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {file for line in copied for file in line.split()} <= admitted
    assert {*packages, PROJECT["readme"], *PROJECT["license-files"]} <= admitted
