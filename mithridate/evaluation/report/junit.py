"""JUnit XML: what a build server needs to go red."""

from __future__ import annotations

from xml.etree import ElementTree

from mithridate.evaluation.findings import DefenceFindings, Evaluation, Extra
from mithridate.evaluation.wording import entry_text, failed_gates, percent, printable, ruling_in_words, stated_ruling


def junit_xml(evaluation: Evaluation) -> bytes:
    """A suite for each defence: a case for each gate, and one for the ruling. One more for each table beside the matrix
    that defences can fail.

    A gate that failed is a failure, one that does not apply is skipped; ``harmful`` and ``not trustworthy`` are
    failures of the ruling.
    """
    suites = [_suite(found, evaluation) for found in evaluation.defences]
    suites += [_table(extra, evaluation) for extra in evaluation.extras if extra.failed is not None]
    root = ElementTree.Element("testsuites", name="mithridate evaluate")
    for count in ("tests", "failures", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.extend(suites)
    ElementTree.indent(root, " ")
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content


def _suite(found: DefenceFindings, evaluation: Evaluation) -> ElementTree.Element:
    skipped = sum(gate.passed is None for gate in found.gates)
    refused = stated_ruling(found) in ("harmful", "not trustworthy")
    suite = ElementTree.Element(
        "testsuite",
        name=printable(found.name),
        tests=str(len(found.gates) + 1),
        failures=str(len(failed_gates(found)) + refused),
        errors="0",
        skipped=str(skipped),
        timestamp=printable(evaluation.created),
        time=f"{sum(cell.seconds for cell in found.cells):.3f}",
    )
    for gate in found.gates:
        case = _case(suite, found.name, f"{gate.id} {gate.name}")
        if gate.passed is None:
            ElementTree.SubElement(case, "skipped", message=printable(gate.evidence))
        elif not gate.passed:
            _fail(case, f"gate {gate.id} failed", gate.evidence)
        else:
            ElementTree.SubElement(case, "system-out").text = printable(gate.evidence)
    case = _case(suite, found.name, "ruling")
    ruling = stated_ruling(found)
    worst = sum(found.worst) / len(found.worst) if found.worst else float("nan")
    text = "\n".join((f"{ruling_in_words(ruling)}. Worst case: {percent(worst)}", *found.reasons))
    if refused:
        _fail(case, ruling, text)
    else:
        ElementTree.SubElement(case, "system-out").text = printable(text)
    return suite


def _table(extra: Extra, evaluation: Evaluation) -> ElementTree.Element:
    """A case for each of its rows."""
    failed = extra.failed or ()
    suite = ElementTree.Element(
        "testsuite",
        name=printable(extra.title),
        tests=str(len(extra.rows)),
        failures=str(sum(row[0] in failed for row in extra.rows)),
        errors="0",
        skipped="0",
        timestamp=printable(evaluation.created),
    )
    for row in extra.rows:
        case = _case(suite, str(row[0]), extra.kind)
        text = "; ".join(f"{name}: {entry_text(entry)}" for name, entry in zip(extra.columns, row, strict=False))
        if row[0] in failed:
            _fail(case, f"{extra.kind} succeeded", f"{text}\n{extra.note}")
        else:
            ElementTree.SubElement(case, "system-out").text = printable(text)
    return suite


def _case(suite: ElementTree.Element, defence: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=printable(f"mithridate.{defence}"), name=printable(name))


def _fail(case: ElementTree.Element, message: str, text: str) -> None:
    ElementTree.SubElement(case, "failure", message=printable(message), type="evaluation").text = printable(text)
