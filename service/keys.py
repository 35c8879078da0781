"""API keys: what is stored of them, how one is recognised, and what its owner may do.

A key is 32 random bytes, so nobody can guess one, and its plain SHA-256 is enough to keep: there is no guessing to slow
down. Keys live in a file with one JSON object a line, as ``mithridate keys new`` writes it, or in the settings.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mithridate.errors import OptionError

Scope = Literal["predict", "choose-defense", "explain", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "mth_"
_IMPLIED: dict[Scope, Scope] = {"admin": "metrics"}
_HEAD = "# Keys of a Mithridate service, one JSON object a line: only hashes, the keys themselves are nowhere.\n"


class Key(BaseModel):
    """What is stored of one key. Allowances that are absent are not limited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """What logs and metrics call its owner."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    """Of the whole key, in hexadecimal."""
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    compute_seconds_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def line(self) -> str:
        """It as a line of a file of keys."""
        fields = self.model_dump(exclude_none=True)
        fields["scopes"] = [scope for scope in SCOPES if scope in self.scopes]
        return json.dumps(fields) + "\n"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks: the id of a key, None where the service has no keys, and what they may do."""

    key_id: str | None
    scopes: frozenset[Scope]
    key: Key | None = None
    """What is stored of the key, with its allowances."""

    def may(self, scope: Scope) -> bool:
        """Whether they have ``scope``; ``admin`` includes ``metrics``."""
        return scope in self.scopes or any(_IMPLIED.get(own) == scope for own in self.scopes)


class KeyRing:
    """All keys of a service."""

    def __init__(self, keys: Sequence[Key]) -> None:
        """Raises OptionError where two keys could be taken for each other."""
        for what, seen in (("id", [key.id for key in keys]), ("sha256", [key.sha256 for key in keys])):
            twice = next((key.id for key, value in zip(keys, seen, strict=True) if seen.count(value) > 1), None)
            if twice is not None:
                raise OptionError(f"the {what} of key {twice!r} is there twice; every key needs its own")
        self.keys = tuple(keys)
        self._digests = [bytes.fromhex(key.sha256) for key in keys]

    def find(self, presented: str) -> Key | None:
        """The key that ``presented`` is. However it ends, the same comparisons are made, each in constant time."""
        digest = hash_key(presented)
        found = None
        for key, own in zip(self.keys, self._digests, strict=True):
            if hmac.compare_digest(own, digest):
                found = key
        return found


def new_key() -> str:
    """A key that was never there before."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> bytes:
    """SHA-256 of ``key``, 32 bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; lines that are empty or begin with ``#`` are none. Raises OptionError, which quotes nothing
    of the file: what was put there by mistake could be a key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OptionError(f"cannot read the keys in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"cannot read the keys in {path}: it is not text") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                keys.append(Key.model_validate_json(line))
            except ValidationError as error:
                raise OptionError(f"{path}, line {number}: {_first(error)}") from error
    return keys


def add_key(path: Path, key: Key) -> None:
    """Adds it at the end of a file, which is made where it is not there. Raises OptionError where the id is taken."""
    keys = read_keys(path) if path.exists() else []
    if any(other.id == key.id for other in keys):
        raise OptionError(f"{path} has a key {key.id!r} already; choose another --id, or revoke that one first")
    old = path.read_text(encoding="utf-8") if path.exists() else _HEAD
    _replace(path, [old, "" if old.endswith("\n") else "\n", key.line()])


def remove_key(path: Path, identity: str) -> None:
    """Takes it out of a file. Raises OptionError where it is not there."""
    keys = read_keys(path)
    if all(key.id != identity for key in keys):
        raise OptionError(f"{path} has no key {identity!r}; it has: {', '.join(key.id for key in keys) or 'none'}")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    _replace(path, [line for line in lines if not _is(line, identity)])


def _is(line: str, identity: str) -> bool:
    if not line.strip() or line.lstrip().startswith("#"):
        return False
    return Key.model_validate_json(line).id == identity


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"].partition(":")[0]


def _replace(path: Path, parts: Iterable[str]) -> None:
    """All or nothing, and for the owner's eyes: whoever may write here may let himself in."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    except OSError as error:
        raise OptionError(f"cannot write to {path.parent}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
