"""What is written, and that all of it is written or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mithridate.errors import InputError, OptionError
from mithridate.evaluation.findings import Cell, DefenceFindings, Evaluation
from mithridate.evaluation.reader import to_json_text
from mithridate.evaluation.report.junit import junit_xml
from mithridate.evaluation.report.page import render

JSON, SAMPLES, JUNIT, HTML = "evaluation.json", "samples.jsonl", "junit.xml", "report.html"


def write_report(evaluation: Evaluation, out: Path) -> tuple[Path, ...]:
    """Writes the four files into the folder ``out``, which is made where there is none, and returns their paths.

    Raises InputError for findings that cannot be shown, OptionError where the folder cannot be written.
    """
    if not any(found.ruling == "base" for found in evaluation.defences):
        raise InputError("an evaluation without the base model cannot be reported: there is nothing to compare with")
    # All of it is made before anything is written: what cannot be shown leaves no file.
    contents = {
        JSON: to_json_text(evaluation).encode(),
        SAMPLES: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples(evaluation)).encode(),
        JUNIT: junit_xml(evaluation),
        HTML: render(evaluation).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_all(contents, out)
    except OSError as error:
        raise OptionError(f"the report cannot be written into {out}: {error.strerror or error}") from error
    return tuple(out / name for name in contents)


def _write_all(contents: dict[str, bytes], out: Path) -> None:
    parts = {name: out / f".{name}.{os.getpid()}" for name in contents}
    try:
        for name, content in contents.items():
            parts[name].write_bytes(content)
        for name, part in parts.items():
            part.replace(out / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def samples(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One line for each image, defence and attack; the attacks ``clean`` and ``worst case`` are among them."""
    for found in evaluation.defences:
        for image, right in enumerate(found.clean):
            yield {**_who(evaluation, found, image), "attack": "clean", "kind": "clean", "right": right}
        for cell in found.cells:
            for image, right in enumerate(cell.right):
                yield {**_who(evaluation, found, image), **_what(cell, image), "right": right}
        for image, right in enumerate(found.worst):
            yield {**_who(evaluation, found, image), "attack": "worst case", "kind": "worst case", "right": right}


def _who(evaluation: Evaluation, found: DefenceFindings, image: int) -> dict[str, Any]:
    label = evaluation.labels[image] if image < len(evaluation.labels) else None
    known = label is not None and 0 <= label < len(evaluation.classes)
    truth = evaluation.classes[label] if known and label is not None else None
    return {"image": image, "label": label, "truth": truth, "defense": found.name}


def _what(cell: Cell, image: int) -> dict[str, Any]:
    """``median_queries`` and ``steps`` are the attack's; all else is the image's, as far as the findings have it."""
    found = {"attack": cell.attack, "kind": cell.kind, "median_queries": cell.queries, "steps": cell.steps}
    of_each = {"queries": cell.asked, "broken_at": cell.broken_at, "linf": cell.linf, "l2": cell.l2}
    return {**found, **{name: values[image] for name, values in of_each.items() if values}}
