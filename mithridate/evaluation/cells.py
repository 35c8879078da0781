"""Where an evaluation keeps what its attacks made, so that an interrupted one goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mithridate.errors import InputError, OptionError
from mithridate.evaluation.battery import Sent

_PLAN, _LOCK = "plan.json", "lock"
_TENSORS = ("pixels", "stood", "broken_at", "spent")


class Lock:
    """Keeps others from a folder until it is released, or the process ends. Raises OptionError where one is at it."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise OptionError(f"another evaluation is at {path}; let it end, or choose another --out") from error


@dataclass(frozen=True, kw_only=True)
class CellStore:
    """A folder with a file for each attack on each defence. Files are written under another name and renamed: one that
    is there is whole."""

    path: Path
    lock: Lock

    def close(self) -> None:
        """Leaves the folder to others."""
        self.lock.release()

    @classmethod
    def open(cls, path: Path, plan: Mapping[str, Any]) -> CellStore:
        """Goes on with what lies there. Raises OptionError where that was made by another ``plan``, or by nobody knows
        which, or where another process is at it."""
        path.mkdir(parents=True, exist_ok=True)
        file, text = path / _PLAN, json.dumps(plan, indent=1, sort_keys=True)
        asked = json.loads(text)
        known = _told(file) if file.is_file() else asked
        if not file.is_file() and any(path.glob("*.npz")):
            raise OptionError(f"{path} holds results and no {_PLAN} that says of what; choose another --out")
        if known != asked:
            changed = sorted(key for key in {*known, *asked} if known.get(key) != asked.get(key))
            raise OptionError(
                f"{path} holds the results of another evaluation ({', '.join(changed)} differ); choose another --out"
            )
        store = cls(path=path, lock=Lock(path))
        _write(file, text.encode())
        return store

    def remember(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was measured when this was first asked for: the effort of all that lies here was fitted to it."""
        file = self.path / f"{_digest(name)}.json"
        if not file.is_file():
            _write(file, json.dumps(measure()).encode())
        return _told(file)

    def get(self, defense: str, attack: str, make: Callable[[], Sent]) -> Sent:
        """What is there, or what ``make`` gives, which is kept. Raises InputError for a file that cannot be read."""
        file = self.path / f"{_digest(defense, attack)}.npz"
        if file.is_file():
            return _read(file)
        sent = make()
        told: dict[str, Any] = {"attack": sent.attack, "kind": sent.kind, "config": sent.config}
        told |= {"seconds": sent.seconds, "steps": sent.steps, "defense": defense}
        arrays = {name: getattr(sent, name).cpu().numpy() for name in _TENSORS if getattr(sent, name) is not None}
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as stream:
            np.savez_compressed(stream, told=np.array(json.dumps(told)), **arrays)
        part.replace(file)
        return sent


def _read(file: Path) -> Sent:
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            told = json.loads(str(stored["told"]))
            arrays: dict[str, Any] = {name: torch.from_numpy(stored[name]) for name in _TENSORS if name in stored}
            del told["defense"]
            return Sent(**told, **arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({error}); remove it, and it is made again") from error


def _told(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); choose another --out") from error
    if not isinstance(told, dict):
        raise InputError(f"{file} holds a {type(told).__name__}, not an object; choose another --out")
    return told


def _digest(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:20]


def _write(file: Path, content: bytes) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(file)
