"""The directory a build works in: locked, written atomically, resumable, renamed at the end.

A build for ``OUT`` works in ``.OUT.building`` beside it. A file there is either whole or not there at all: each is
written under a temporary name, flushed to the disk, and renamed. So whatever a kill leaves behind can be trusted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from mithridate.errors import BuildError

_PLAN = "plan.json"
_TEMPORARY = ".partial"

_BEFORE_THERE_WAS: dict[str, Any] = {"metric": "l2", "tail_layer": None, "prm": []}
"""What a plan that does not mention it meant."""


@dataclass(frozen=True)
class Workspace:
    """An exclusively held working directory. Make one with ``open_workspace``."""

    out: Path
    path: Path

    def has(self, name: str) -> bool:
        """Whether the file is there, and therefore whole."""
        return (self.path / name).is_file()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Gives a temporary path; what is written there becomes ``name`` if the block ends well, and vanishes if not.

        Raises BuildError where the disk refuses.
        """
        final = self.path / name
        temporary = final.with_name(final.name + _TEMPORARY)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(final)
        except (OSError, SafetensorError, RuntimeError) as error:  # FAISS says RuntimeError where a write fails
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise BuildError(
                f"cannot write {final}: {error}. Nothing is lost: make room and build again with --resume"
            ) from error

    def write_array(self, name: str, array: NDArray[Any]) -> None:
        """A ``.npy`` file."""
        with self.writing(name) as path, path.open("wb") as file:
            # The bytes that np.save writes; but np.save does not notice where the last of them do not fit.
            array = np.ascontiguousarray(array)
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)

    def join_arrays(self, name: str, parts: Sequence[str]) -> None:
        """A ``.npy`` file of the rows of ``parts``, in that order. Holds one part at a time, memory-mapped.

        Written as a stream, not through a map of the whole: where the disk is full, that would end the process.
        """
        first = self._mapped(parts[0])
        header = np.lib.format.header_data_from_array_1_0(first)
        header["shape"] = (sum(len(self._mapped(part)) for part in parts), *first.shape[1:])
        with self.writing(name) as path, path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(self._mapped(part).data)

    def _mapped(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        return array

    def write_bytes(self, name: str, content: bytes) -> None:
        """A file of exactly these bytes."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def discard(self, name: str) -> None:
        """Removes a directory of intermediate results."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def publish(self) -> None:
        """Gives the finished bundle its name, in one step."""
        (self.path / _PLAN).unlink(missing_ok=True)
        try:
            self.path.rename(self.out)
            parent = os.open(self.out.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise BuildError(f"cannot rename {self.path} to {self.out}: {error}") from error


def working_path(out: Path) -> Path:
    """Where a build for ``out`` works."""
    return out.parent / f".{out.name}.building"


@contextmanager
def open_workspace(out: Path, plan: dict[str, Any], *, resume: bool, needed_bytes: int) -> Iterator[Workspace]:
    """Takes the working directory for ``out``; holds a lock on it until the block ends, however it ends.

    Raises BuildError where ``out`` is taken, another build runs, leftovers are not to be resumed or are of another
    plan, or the disk is too small.
    """
    path = working_path(out)
    if out.exists() or out.is_symlink():
        raise BuildError(f"{out} exists already; choose another name or remove it first")
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BuildError(f"cannot build in {out.parent}: {error}") from error
    locked = False
    try:
        _lock(handle, path, out)
        locked = True
        _check_leftovers(path, out, plan, resume=resume)
        _check_space(path, needed_bytes)
        workspace = Workspace(out, path)
        if not workspace.has(_PLAN):
            workspace.write_bytes(_PLAN, _encode(plan))
        yield workspace
    finally:
        if locked:
            _discard_if_nothing_was_made(path)
        os.close(handle)  # gives the lock back


def _discard_if_nothing_was_made(path: Path) -> None:
    """So that a command that was refused at once can be given again, corrected."""
    with suppress(OSError):  # it may have become the bundle
        if [file.name for file in path.iterdir()] == [_PLAN]:
            (path / _PLAN).unlink()
        path.rmdir()  # succeeds only where it is empty


def _lock(handle: int, path: Path, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BuildError(f"another build to {out} is running; wait for it or choose another name") from error
    renamed = not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino
    if renamed or out.exists():
        raise BuildError(f"another build has just finished {out}")


def _check_leftovers(path: Path, out: Path, plan: dict[str, Any], *, resume: bool) -> None:
    for partial in path.rglob(f"*{_TEMPORARY}"):
        partial.unlink()
    if not (path / _PLAN).is_file():
        if any(path.iterdir()):
            _resume_published(path, out, resume=resume)
        return
    if not resume:
        raise BuildError(
            f"an interrupted build of {out} lies in {path}; go on with --resume, or remove it to start anew"
        )
    try:
        before = json.loads((path / _PLAN).read_bytes())
    except ValueError as error:
        raise BuildError(f"{path / _PLAN} is not readable ({error}); remove {path} to start anew") from error
    seen = plan_changes(before, plan)
    if seen:
        raise BuildError(f"the interrupted build in {path} had another plan ({seen}); remove it or build as before")


def plan_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is not as it was, in words; empty where nothing is."""
    before = {**_BEFORE_THERE_WAS, **before}
    changed = [key for key in now if before.get(key) != now[key]]
    return "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in changed)


def _resume_published(path: Path, out: Path, *, resume: bool) -> None:
    """The plan is removed just before the rename: without one, only a finished bundle may be here."""
    if not (path / "manifest.json").is_file():
        raise BuildError(f"{path} is in the way and is not an interrupted build of {out}; remove it")
    if not resume:
        raise BuildError(
            f"an interrupted build of {out} lies in {path}; go on with --resume, or remove it to start anew"
        )


def _check_space(path: Path, needed: int) -> None:
    present = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(path).free
    if needed > present + free:
        raise BuildError(
            f"not enough space in {path.parent}: the build needs at least {(needed - present) / 1e6:.1f} MB more;"
            f" {free / 1e6:.1f} MB are free"
        )


def _encode(plan: dict[str, Any]) -> bytes:
    return (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode()
