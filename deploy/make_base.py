"""Makes the base image where no registry is at hand: Debian 12 with its Python 3.11, from debootstrap and buildah.

    deploy/make_base.py [--tag TAG] [--mirror URL]

As root, with Debian's packages debootstrap and buildah. Afterwards name it to a build: ``--build-arg BASE=TAG``
(``deploy/check_image.py --base TAG``). Unlike ``python:3.11-slim`` it has Debian's Python, which security updates of
Debian reach; only what the Dockerfile needs is in it.
"""
# ruff: noqa: S603, T201

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUITE = "bookworm"
# pip is for the stages that install; python-is-python3 gives the name `python`, which the Dockerfile calls.
PACKAGES = ("python3", "python3-venv", "python3-pip", "python-is-python3", "ca-certificates")
SURPLUS = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/man", "usr/share/locale", "tmp")
BUILDAH = ("buildah", "--storage-driver=vfs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="localhost/mithridate-base:bookworm")
    parser.add_argument("--mirror", help="where a folder debian and one debian-security are (default: Debian's own)")
    arguments = parser.parse_args()
    missing = [program for program in ("debootstrap", "buildah") if not shutil.which(program)]
    if missing or os.getuid() != 0:
        sys.exit(f"failed: this needs root and debootstrap and buildah; missing: {', '.join(missing) or 'root'}")
    with tempfile.TemporaryDirectory(prefix="mithridate-base-") as folder:
        root = Path(folder) / "root"
        make_root(root, arguments.mirror)
        commit(root, arguments.tag)
    print(f"made {arguments.tag}")


def make_root(root: Path, mirror: str | None) -> None:
    """Fills an empty directory with the smallest Debian that has Python and today's security updates."""
    source = [] if mirror is None else [f"{mirror}/debian"]
    _do("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), *source)
    sources = root / "etc/apt/sources.list"
    main = sources.read_text().splitlines()[0]  # deb ADDRESS/debian SUITE main
    updates = main.replace(f" {SUITE} ", f" {SUITE}-updates ")
    security = main.replace("/debian ", "/debian-security ").replace(f" {SUITE} ", f" {SUITE}-security ")
    sources.write_text(f"{main}\n{updates}\n{security}\n")
    for step in (("update",), ("upgrade", "--yes")):
        _do("chroot", str(root), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", *step)
    for folder in SURPLUS:
        for path in (root / folder).rglob("*"):
            if path.name != "copyright" and not path.is_dir():  # licences stay
                path.unlink()
    # debootstrap copied these from this machine.
    for name in ("etc/resolv.conf", "etc/hostname"):
        (root / name).write_text("")


def commit(root: Path, tag: str) -> None:
    """Makes an image of one layer out of a directory."""
    container = subprocess.run([*BUILDAH, "from", "scratch"], check=True, capture_output=True, text=True).stdout.strip()
    try:
        _do(*BUILDAH, "add", "--quiet", container, str(root), "/")
        _do(*BUILDAH, "config", "--cmd=python", container)
        _do(*BUILDAH, "commit", "--quiet", "--rm", container, tag)
    except BaseException:
        subprocess.run([*BUILDAH, "rm", container], check=False, capture_output=True)
        raise


def _do(*command: str) -> None:
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
