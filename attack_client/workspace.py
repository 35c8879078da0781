"""The directory of an attack: what makes it possible to go on after the client was killed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from attack_client.load import Outcome
from attack_client.query_log import QueryLog
from mithridate.errors import InputError, OptionError

OUTCOMES = "outcomes.jsonl"
PLAN = "plan.json"
LOGS = "queries"
EXAMPLES = "examples"


class Workspace:
    """``out``, made where it is not there. Raises OptionError where it is, unless ``resume``.

    ``plan.json`` says what the attack is; ``outcomes.jsonl`` has a line for every single image that was answered,
    ``queries/`` a log for every black-box attack. All are written as the answers come.
    """

    def __init__(self, out: Path, *, resume: bool = False) -> None:
        if out.exists() and not resume:
            raise OptionError(f"{out} exists already; choose another name, remove it first, or go on with --resume")
        self._made = not out.exists()
        self._planned = False
        try:
            out.mkdir(parents=True, exist_ok=resume)
        except OSError as error:
            raise OptionError(f"cannot write to {out}: {error.strerror}") from error
        self.out = out
        self._outcomes: TextIO | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not any((self.out / name).exists() for name in (OUTCOMES, LOGS))

    def begin(self, identity: Mapping[str, Any]) -> list[Outcome]:
        """What was measured before. ``identity``, as JSON: all that decides what is asked.

        Raises OptionError where ``out`` holds another attack, or something else.
        """
        begun = self.out / PLAN
        if begun.exists():
            before = self._plan()
            for key in identity:
                if before.get(key) != identity.get(key):
                    raise OptionError(
                        f"{self.out} was begun with another {key}: {before.get(key)}; seen: {identity.get(key)}. Give "
                        "the same options, or another --out"
                    )
            return self._read_outcomes()
        if not all(path.name == f"{PLAN}.part" for path in self.out.iterdir()):
            raise OptionError(f"{self.out} holds something else than an attack that was begun; choose another --out")
        self._write_plan(identity)
        self._planned = True
        return []

    def settle(self, key: str, value: Any) -> None:
        """Adds to the plan what was only known later, as JSON. Raises OptionError where it was another before."""
        plan = self._plan()
        if plan.setdefault(key, value) != value:
            raise OptionError(
                f"{self.out} was begun with another {key}: {plan[key]}; seen: {value}. Give the same model on the "
                "same machine with as many threads, or another --out"
            )
        self._write_plan(plan)

    def record(self, outcome: Outcome, truth: int) -> None:
        """Writes down what came of one image."""
        if self._outcomes is None:  # not before there is something to keep
            self._outcomes = (self.out / OUTCOMES).open("a", buffering=1)
        self._outcomes.write(json.dumps({**asdict(outcome), "truth": truth}) + "\n")

    def log(self, *name: str) -> QueryLog:
        """The log of the attack of that name."""
        return QueryLog(self.out / LOGS / f"{file_name(*name)}.jsonl")

    def examples(self, *name: str) -> Path:
        """Where the examples of the attack of that name are, as PNG."""
        directory = self.out / EXAMPLES / file_name(*name)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def discard_if_empty(self) -> bool:
        """Whether nothing was measured. Then it is left as it was found: what was there before belongs to somebody."""
        if not self.empty:
            return False
        if self._planned:
            for name in (PLAN, f"{PLAN}.part"):
                (self.out / name).unlink(missing_ok=True)
        if self._made:
            with suppress(OSError):  # somebody else has put something there meanwhile
                self.out.rmdir()
        return True

    def close(self) -> None:
        """Lets go of the files."""
        if self._outcomes is not None:
            self._outcomes.close()
            self._outcomes = None

    def _plan(self) -> dict[str, Any]:
        path = self.out / PLAN
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged; start again in a new directory") from error
        if not isinstance(plan, dict):
            raise InputError(f"{path} is damaged; start again in a new directory")
        return plan

    def _write_plan(self, plan: Mapping[str, Any]) -> None:
        part = self.out / f"{PLAN}.part"
        part.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        part.rename(self.out / PLAN)

    def _read_outcomes(self) -> list[Outcome]:
        """All whole lines; what a killed client left of its last one is cut off. Failures are tried again."""
        path = self.out / OUTCOMES
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        names = {field.name for field in fields(Outcome)}
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            outcomes = [Outcome(**{name: line[name] for name in names.intersection(line)}) for line in lines]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged; start again in a new directory") from error
        return [outcome for outcome in outcomes if outcome.error is None]


def file_name(*parts: str) -> str:
    """Names with colons and slashes in them as one that every file system takes.

    >>> file_name("rmc:scope=all", "square")
    'rmc-scope-all.square'
    """
    return ".".join(re.sub(r"[^A-Za-z0-9_+]+", "-", part) for part in parts)
