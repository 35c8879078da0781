"""Where an evaluation keeps what its attacks made, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mithridate.errors import InputError, OptionError
from mithridate.evaluation.battery import Sent

_PLAN = "plan.json"
_TENSORS = ("pixels", "stood", "broken_at", "spent")


@dataclass(frozen=True, kw_only=True)
class CellStore:
    """A folder with a file for each attack on each defence. Files are written under another name and renamed: one that
    is there is whole."""

    path: Path

    @classmethod
    def open(cls, path: Path, plan: Mapping[str, Any]) -> CellStore:
        """Goes on with what lies there. Raises OptionError where that was made by another ``plan``."""
        path.mkdir(parents=True, exist_ok=True)
        file, text = path / _PLAN, json.dumps(plan, indent=1, sort_keys=True)
        if file.is_file() and file.read_text() != text:
            known = json.loads(file.read_text())
            changed = sorted(key for key in {*known, *plan} if known.get(key) != plan.get(key))
            raise OptionError(
                f"{path} holds the results of another evaluation ({', '.join(changed)} differ); choose another --out"
            )
        _write(file, text.encode())
        return cls(path=path)

    def get(self, defense: str, attack: str, make: Callable[[], Sent]) -> Sent:
        """What is there, or what ``make`` gives, which is kept. Raises InputError for a file that cannot be read."""
        digest = hashlib.sha256(f"{defense}\n{attack}".encode()).hexdigest()[:20]
        file = self.path / f"{digest}.npz"
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
        with np.load(file, allow_pickle=False) as stored:
            told = json.loads(str(stored["told"]))
            arrays: dict[str, Any] = {name: torch.from_numpy(stored[name]) for name in _TENSORS if name in stored}
            del told["defense"]
            return Sent(**told, **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); remove it, and it is made again") from error


def _write(file: Path, content: bytes) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(file)
