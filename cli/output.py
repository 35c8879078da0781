"""What a person sees: progress on stderr (a bar on a terminal, plain lines otherwise), one short table on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

_LINE_EVERY_SECONDS = 10.0


class Report(Protocol):
    """Called with a phase, how much of it is done, and how much there is."""

    def __call__(self, phase: str, done: int, total: int) -> None: ...


@contextmanager
def progress() -> Iterator[Report]:
    """Shows progress until the block ends."""
    with _bars() if sys.stderr.isatty() else _lines() as report:
        yield report


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


@contextmanager
def _lines() -> Iterator[Report]:
    last: dict[str, float] = {}

    def report(phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase in last and done < total and now - last[phase] < _LINE_EVERY_SECONDS:
            return
        last[phase] = now
        print(f"{phase}: {done}/{total}", file=sys.stderr, flush=True)

    yield report


def note(text: str) -> None:
    """One line for the person, beside the result."""
    print(text, file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    """The result for a program."""
    print(json.dumps(content, indent=1))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The result for a person. The first column is text, the others are set right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, emoji=False)  # of the console, not of print: else [test,:30] in a title is a style
    if not console.is_terminal:
        console.width = 120  # a pipe or a file has no width to fit
    console.print(table)


def percent(share: float) -> str:
    """0.8412 as 84.1 %."""
    return f"{100 * share:.1f} %"


def size(count: int) -> str:
    """Bytes in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
