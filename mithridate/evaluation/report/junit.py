"""JUnit XML: what a build server needs to go red."""

from __future__ import annotations

from xml.etree import ElementTree

from mithridate.evaluation.findings import DefenceFindings, Evaluation
from mithridate.evaluation.wording import failed_gates, percent, printable, ruling_in_words, stated_ruling


def junit_xml(evaluation: Evaluation) -> bytes:
    """A suite for each defence: a case for each gate, and one for the ruling.

    A gate that failed is a failure, one that does not apply is skipped; ``harmful`` and ``not trustworthy`` are
    failures of the ruling.
    """
    suites = [_suite(found, evaluation) for found in evaluation.defences]
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
        case = _case(suite, found, f"{gate.id} {gate.name}")
        if gate.passed is None:
            ElementTree.SubElement(case, "skipped", message=printable(gate.evidence))
        elif not gate.passed:
            _fail(case, f"gate {gate.id} failed", gate.evidence)
        else:
            ElementTree.SubElement(case, "system-out").text = printable(gate.evidence)
    case = _case(suite, found, "ruling")
    ruling = stated_ruling(found)
    worst = sum(found.worst) / len(found.worst) if found.worst else float("nan")
    text = "\n".join((f"{ruling_in_words(ruling)}. Worst case: {percent(worst)}", *found.reasons))
    if refused:
        _fail(case, ruling, text)
    else:
        ElementTree.SubElement(case, "system-out").text = printable(text)
    return suite


def _case(suite: ElementTree.Element, found: DefenceFindings, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=printable(f"mithridate.{found.name}"), name=printable(name)
    )


def _fail(case: ElementTree.Element, message: str, text: str) -> None:
    ElementTree.SubElement(case, "failure", message=printable(message), type="evaluation").text = printable(text)
