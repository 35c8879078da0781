"""Writes what is delivered as a CycloneDX bill of materials: every package, its version, its licence, what it needs.

    deploy/sbom.py [--extra cpu|gpu] [--out FILE] [--licenses]      of this environment: what `mithridate[EXTRA]` needs
    deploy/sbom.py --root FOLDER [--out FILE] [--licenses]          of an image whose file system is at FOLDER

Of an image it lists all Python packages and all Debian ones; of an environment only what the service needs, not the
tools of developers. Licences are those that packages declare about themselves. Nothing of this machine is in it: no
path, no host, no index. With SOURCE_DATE_EPOCH set, which is then its time, the same packages give the same bytes.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
UNKNOWN = "not declared"
SHORT = 80  # some packages declare a whole licence text as its name

_LICENSES = LicenseFactory()
_DEBIAN_LICENSE = re.compile(r"^License:[ \t]*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package as it is installed."""

    name: str
    version: str
    kind: str  # pypi or deb: the type of its package URL
    license: str
    needs: tuple[str, ...] = field(default=())

    @property
    def url(self) -> PackageURL:
        """What identifies it (https://github.com/package-url/purl-spec)."""
        return PackageURL(
            type=self.kind, namespace="debian" if self.kind == "deb" else None, name=self.name, version=self.version
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--root", type=Path, help="an image's file system")
    parser.add_argument("--out", type=Path, default=Path("sbom.cdx.json"))
    parser.add_argument("--licenses", action="store_true", help="print a table of packages and licences too")
    arguments = parser.parse_args()
    packages = read_environment(arguments.extra) if arguments.root is None else read_image(arguments.root)
    arguments.out.write_text(write_bom(packages), encoding="utf-8")
    if arguments.licenses:
        print("\n".join(license_table(packages)))
    print(f"{len(packages)} packages in {arguments.out}", file=sys.stderr)


def read_environment(extra: str) -> list[Package]:
    """What this environment's ``mithridate[extra]`` needs, itself included, by name."""
    found = {str(canonicalize_name(item.name)): item for item in distributions()}
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted, needed = _names([*project["dependencies"], *project["optional-dependencies"][extra]], ()), {}
    own = Package(
        name=project["name"],
        version=project["version"],
        kind="pypi",
        license=project["license"],
        needs=tuple(sorted(wanted)),
    )
    while wanted:
        name, extras = wanted.popitem()
        if name not in found:
            sys.exit(f"failed: {name} is not installed here; install the project with its extra {extra} first")
        if name not in needed:
            needed[name] = _python_package(found[name], extras)
            wanted |= _names(found[name].requires or (), extras)
    return [own, *sorted(needed.values(), key=lambda package: package.name)]


def read_image(root: Path) -> list[Package]:
    """All Python packages of the image's environment, then all its Debian packages."""
    sites = sorted((root / "opt/venv/lib").glob("python*/site-packages"))
    if not sites:
        sys.exit(f"failed: {root} has no opt/venv: it is not the file system of one of these images")
    found = distributions(path=[str(site) for site in sites])
    python = sorted((_python_package(item, ()) for item in found), key=lambda package: package.name)
    own = [package for package in python if package.name == "mithridate"]
    return [*own, *(package for package in python if package not in own), *_debian_packages(root)]


def write_bom(packages: Sequence[Package]) -> str:
    """CycloneDX 1.6 as JSON; the first package is what the others are for."""
    components = {(package.kind, package.name): _component(package) for package in packages}
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(str(package.url) for package in packages)))
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        bom.metadata.timestamp = datetime.fromtimestamp(int(epoch), tz=UTC)
    bom.metadata.component, *rest = components.values()
    bom.metadata.component.type = ComponentType.APPLICATION
    for component in rest:
        bom.components.add(component)
    for package in packages:
        needs = [components[package.kind, name] for name in package.needs if (package.kind, name) in components]
        bom.register_dependency(components[package.kind, package.name], needs)
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def license_table(packages: Iterable[Package]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| package | version | licence |"
    yield "| --- | --- | --- |"
    for package in packages:
        yield f"| {package.name} | {package.version} | {package.license.replace('|', '/')} |"


def _component(package: Package) -> Component:
    component = Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        purl=package.url,
        bom_ref=str(package.url),
    )
    if package.license != UNKNOWN:
        # SPDX's own name or an expression of them; what is neither is kept as it was said.
        component.licenses.add(_LICENSES.make_from_string(package.license))
    return component


def _python_package(found: Distribution, extras: Iterable[str]) -> Package:
    needs = tuple(sorted(_names(found.requires or (), extras)))
    return Package(
        name=canonicalize_name(found.name), version=found.version, kind="pypi", license=_declared(found), needs=needs
    )


def _declared(found: Distribution) -> str:
    """The SPDX expression, else the classifiers, else the first line of what the field License says."""
    expression, *_ = found.metadata.get_all("License-Expression") or [""]
    if expression:
        return str(expression)
    said = [text.split(" :: ") for text in found.metadata.get_all("Classifier") or ()]
    names = [parts[-1] for parts in said if parts[0] == "License" and parts[-1] != "OSI Approved"]
    if names:
        return " AND ".join(names)
    text, *_ = found.metadata.get_all("License") or [""]
    return next(iter(text.strip().splitlines()), UNKNOWN)[:SHORT]


def _names(requirements: Iterable[str], extras: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What these requirements need here, each with the extras that are asked of it."""
    needed = {}
    for text in requirements:
        requirement = Requirement(text)
        wanted = ("", *extras)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            needed[str(canonicalize_name(requirement.name))] = tuple(requirement.extras)
    return needed


def _debian_packages(root: Path) -> list[Package]:
    status = root / "var/lib/dpkg/status"
    paragraphs = status.read_text(encoding="utf-8").split("\n\n") if status.exists() else []
    records = [HeaderParser().parsestr(paragraph) for paragraph in paragraphs if paragraph.strip()]
    return sorted(
        (
            Package(
                name=record["Package"],
                version=record["Version"],
                kind="deb",
                license=_debian_license(root, record["Package"]),
            )
            for record in records
            if record["Status"] == "install ok installed"
        ),
        key=lambda package: package.name,
    )


def _debian_license(root: Path, name: str) -> str:
    """The licences that the machine-readable kind of copyright file names; others are prose, which is for people."""
    file = root / "usr/share/doc" / name / "copyright"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if "packaging-manuals/copyright-format" not in text[:500]:
        return f"see usr/share/doc/{name}/copyright" if text else UNKNOWN
    return ", ".join(dict.fromkeys(match.strip() for match in _DEBIAN_LICENSE.findall(text))) or UNKNOWN


if __name__ == "__main__":
    main()
