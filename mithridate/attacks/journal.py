"""A record of every answered query, so that an attack that was killed goes on where it was.

Attacks draw from their seed alone: the same answers lead to the same queries. Run again over the record, an attack gets
the old answers without asking, and asks where the record ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mithridate.attacks.oracle import Answers, Oracle, PartwiseOracle, Track, occurrences
from mithridate.errors import InputError
from mithridate.types import Pixels

_MAGIC = b"mithridate journal 1\n"
_HEAD = struct.Struct("<III")  # length, checksum, queries of a record

About = Mapping[str, str | int]
"""What a journal is of: attack with all its settings, seed, budget, data, defence. JSON strings and numbers."""


class Journal:
    """An oracle that asks ``oracle`` only for what the file at ``path`` does not answer, and appends the answers to it.

    A query is known by its image's row, its running number for that row, and a digest of the pixels. Answers are
    written as they come, part by part where the oracle has parts; a last record that was cut short is dropped.

    Raises InputError where the file is another's: of another ``about``, damaged, in use, or no journal; and from
    ``ask``, where at some place other pixels were asked for.
    """

    def __init__(self, oracle: Oracle, path: Path, *, about: About) -> None:
        self._oracle, self._path = oracle, path
        self._numbers = torch.zeros(0, dtype=torch.int64)
        self.replayed = 0
        """Queries that were answered from the record."""
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"cannot write the journal {path}: {error.strerror or error}") from error
        try:
            _lock(self._file, path)
            self._known = _Known(list(self._read({**about, "track": oracle.track, "classes": oracle.classes})))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    @property
    def track(self) -> Track:
        return self._oracle.track

    @property
    def classes(self) -> int:
        return self._oracle.classes

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        """See ``Oracle``."""
        numbers, counts = self._count(rows)
        asked = _Queries.of(rows, numbers, pixels)
        labels, scores, found = self._known.answers(asked, self._path)
        missing = torch.from_numpy(~found).nonzero()[:, 0]
        self.replayed += len(rows) - len(missing)
        if scores is None and self.track == "scores":
            scores = np.zeros((len(rows), self.classes))
        for places, answers in self._parts(rows[missing], pixels[missing]) if len(missing) else ():
            where = missing[places].numpy()
            labels[where] = answers.labels.numpy()
            if scores is not None and answers.scores is not None:
                scores[where] = answers.scores.numpy()
            self._append(asked.at(where), answers)
        self._numbers = counts
        return Answers(
            labels=torch.from_numpy(labels),
            scores=None if scores is None or self.track == "labels" else torch.from_numpy(scores),
        )

    def _parts(self, rows: torch.Tensor, pixels: Pixels) -> Iterator[tuple[torch.Tensor, Answers]]:
        if isinstance(self._oracle, PartwiseOracle):
            yield from self._oracle.ask_in_parts(rows, pixels)
        else:
            yield torch.arange(len(rows)), self._oracle.ask(rows, pixels)

    def _count(self, rows: torch.Tensor) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Each query's running number for its row, from 1, and how many every row has then had."""
        counts = torch.bincount(rows, minlength=len(self._numbers))
        before = torch.zeros_like(counts)
        before[: len(self._numbers)] = self._numbers
        return (before[rows] + occurrences(rows) + 1).numpy(), before + counts

    def _append(self, asked: _Queries, answers: Answers) -> None:
        payload = _pack(asked, answers)
        self._file.write(_HEAD.pack(len(payload), zlib.crc32(payload), len(asked.rows)) + payload)
        self._file.flush()

    def _read(self, about: About) -> Iterator[_Record]:
        """The records; begins the file where it is new, and drops a torn end."""
        self._file.seek(0)
        content = self._file.read()
        begin = _MAGIC + json.dumps(dict(about), sort_keys=True).encode() + b"\n"
        if content == begin[: len(content)] and len(content) < len(begin):  # new, or killed at its first line
            self._file.truncate(0)
            self._file.write(begin)
            self._file.flush()
            return
        place = self._check_begin(content, about)
        while place < len(content):
            end = place + _HEAD.size
            length, checksum, count = _HEAD.unpack(content[place:end]) if end <= len(content) else (0, 0, 0)
            payload = content[end : end + length]
            if end > len(content) or len(payload) < length:
                self._file.truncate(place)
                return
            if zlib.crc32(payload) != checksum:
                if end + length == len(content):
                    self._file.truncate(place)
                    return
                raise InputError(f"the journal {self._path} is damaged at byte {place}; remove it to start anew")
            yield _unpack(payload, count, self.classes)
            place = end + length

    def _check_begin(self, content: bytes, about: About) -> int:
        """Where the records begin."""
        end = content.find(b"\n", len(_MAGIC))
        if not content.startswith(_MAGIC) or end < 0:
            raise InputError(f"{self._path} is no journal of an attack; choose another name")
        try:
            stated = json.loads(content[len(_MAGIC) : end])
        except ValueError as error:
            raise InputError(f"the journal {self._path} is damaged in its first lines; remove it") from error
        if not isinstance(stated, dict):
            raise InputError(f"the journal {self._path} is damaged in its first lines; remove it")
        other = [key for key in sorted({*stated, *about}) if stated.get(key) != about.get(key)]
        if other:
            differences = "; ".join(f"{key} is {stated.get(key)!r}, wanted {about.get(key)!r}" for key in other)
            raise InputError(f"the journal {self._path} is of another attack: {differences}; choose another name")
        return end + 1


@dataclass(frozen=True)
class _Queries:
    """``R`` of them: ``rows`` int32, ``numbers`` int32 and ``digests`` uint64."""

    rows: NDArray[np.int32]
    numbers: NDArray[np.int32]
    digests: NDArray[np.uint64]

    @classmethod
    def of(cls, rows: torch.Tensor, numbers: NDArray[np.int64], pixels: Pixels) -> _Queries:
        found = b"".join(hashlib.blake2b(point.data, digest_size=8).digest() for point in pixels.contiguous().numpy())
        return cls(rows.numpy().astype(np.int32), numbers.astype(np.int32), np.frombuffer(found, dtype="<u8"))

    def at(self, places: NDArray[np.int64]) -> _Queries:
        return _Queries(self.rows[places], self.numbers[places], self.digests[places])

    @property
    def keys(self) -> NDArray[np.int64]:
        keys: NDArray[np.int64] = (self.rows.astype(np.int64) << 32) | self.numbers
        return keys


@dataclass(frozen=True)
class _Record:
    queries: _Queries
    labels: NDArray[np.int32]
    scores: NDArray[np.floating] | None


class _Known:
    """All that is on record, in the order of row and number."""

    def __init__(self, records: list[_Record]) -> None:
        self._empty = not records
        if self._empty:
            return
        keys = np.concatenate([record.queries.keys for record in records])
        order = np.argsort(keys)
        self._keys = keys[order]
        self._digests = np.concatenate([record.queries.digests for record in records])[order]
        self._labels = np.concatenate([record.labels for record in records])[order]
        scores = [record.scores for record in records if record.scores is not None]
        self._scores = np.concatenate(scores)[order] if scores else None

    def answers(
        self, asked: _Queries, path: Path
    ) -> tuple[NDArray[np.int64], NDArray[np.float64] | None, NDArray[np.bool_]]:
        """Labels ``[R]``, scores ``[R, C]``, and which of them are on record. Raises InputError for other pixels."""
        labels = np.zeros(len(asked.rows), dtype=np.int64)
        if self._empty:
            return labels, None, np.zeros(len(labels), dtype=np.bool_)
        places = np.searchsorted(self._keys, asked.keys).clip(max=len(self._keys) - 1)
        found = self._keys[places] == asked.keys
        other = found & (self._digests[places] != asked.digests)
        if other.any():
            row, number = (int(part[other][0]) for part in (asked.rows, asked.numbers))
            raise InputError(
                f"the journal {path} does not fit: query {number} of image {row} was for other pixels; the attack, its "
                "seed or the images have changed; choose another name"
            )
        labels[found] = self._labels[places[found]]
        if self._scores is None:
            return labels, None, found
        scores = np.zeros((len(labels), self._scores.shape[1]))
        scores[found] = self._scores[places[found]]
        return labels, scores, found


def _pack(asked: _Queries, answers: Answers) -> bytes:
    """Rows, numbers, digests, labels, and the scores as they are or, where that loses nothing, in half the bytes."""
    columns: list[NDArray[Any]] = [asked.rows, asked.numbers, asked.digests, answers.labels.numpy().astype("<i4")]
    if answers.scores is not None:
        scores = answers.scores.numpy()
        narrow = scores.astype("<f4")
        columns.append(narrow if np.array_equal(narrow, scores) else scores.astype("<f8"))
    return b"".join(column.tobytes() for column in columns)


def _unpack(payload: bytes, count: int, classes: int) -> _Record:
    kinds = ("<i4", "<i4", "<u8", "<i4")
    columns, place = [], 0
    for kind in kinds:
        columns.append(np.frombuffer(payload, dtype=kind, count=count, offset=place))
        place += columns[-1].nbytes
    width = (len(payload) - place) // max(1, count * classes)
    scores = np.frombuffer(payload, dtype=f"<f{width}", offset=place).reshape(count, classes) if width else None
    return _Record(_Queries(*columns[:3]), columns[3], scores)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"the journal {path} is in use by another attack; wait for it or choose another name"
        ) from error
