"""What was asked and answered, on disk, so that a client that was killed goes on without asking twice.

One line a request, written as soon as its answer is there. An attack that starts again with the same seed asks the
same questions in the same order; as long as the log has their answers, nothing is sent. Requests are numbered as they
are put together, not as they are answered, so several may be under way at once.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from mithridate.errors import InputError
from mithridate.types import Pixels, Scores


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one request of ``R`` queries: ``labels`` int64 ``[R]``, ``scores`` float64 ``[R, C]`` where they
    were asked for, ``abstained`` bool ``[R]``; ``seconds`` it took, ``retries`` before it was taken, and ``company``,
    the requests of others that were answered in the same batch (rounded with them)."""

    labels: torch.Tensor
    scores: Scores | None
    abstained: torch.Tensor
    seconds: float
    retries: int
    company: int


def digest(rows: torch.Tensor, pixels: Pixels, *, about: str) -> str:
    """Names a request by all that decides its answer; ``about``: defence, track, bundle."""
    content = hashlib.sha256(about.encode())
    content.update(rows.numpy().astype("<i8").tobytes())
    content.update(pixels.contiguous().numpy().tobytes())
    return content.hexdigest()[:32]


class QueryLog:
    """The requests of one attack on one defence, by number. One process at a time may have it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, int] = {}  # where each line begins: all that was answered may not fit into memory
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise InputError(f"{path} is in use: another client goes on with the same attack") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._known)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def recall(self, number: int, name: str) -> Reply | None:
        """The answer to request ``number``, if it is here. Raises InputError where another one had that number."""
        place = self._known.get(number)
        if place is None:
            return None
        self._file.seek(place)
        entry = json.loads(self._file.readline())
        if entry["name"] != name:
            raise InputError(
                f"{self._path}: request {number} was another one when this attack was begun (other images, other "
                "settings, another version or machine); start again in a new directory"
            )
        scores = entry["scores"]
        return Reply(
            labels=torch.from_numpy(_unpack(entry["labels"], "<i8")),
            scores=None if scores is None else torch.from_numpy(_unpack(scores, "<f8")).reshape(-1, entry["classes"]),
            abstained=torch.from_numpy(_unpack(entry["abstained"], "?")),
            seconds=entry["seconds"],
            retries=entry["retries"],
            company=entry["company"],
        )

    def keep(self, number: int, name: str, reply: Reply) -> None:
        """Writes an answer down; once this returns, killing the process does not lose it."""
        scores = reply.scores
        entry = {
            "number": number,
            "name": name,
            "labels": _pack(reply.labels, "<i8"),
            "scores": None if scores is None else _pack(scores, "<f8"),
            "classes": None if scores is None else scores.shape[1],
            "abstained": _pack(reply.abstained, "?"),
            "seconds": round(reply.seconds, 6),
            "retries": reply.retries,
            "company": reply.company,
        }
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        """Takes in all whole lines; what a killed client left of its last one is cut off."""
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                number = json.loads(line)["number"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self._path} is damaged at byte {whole}; start again in a new directory") from error
            self._known[number] = whole
            whole += len(line)
        self._file.truncate(whole)


def _pack(values: torch.Tensor, kind: str) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def _unpack(text: str, kind: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype=kind).copy()
