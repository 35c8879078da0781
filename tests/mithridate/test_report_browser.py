"""The report in a real browser: it fits a telephone, a wide screen and a sheet of paper, and asks for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from browser_helpers import Browser
from evaluation_helpers import synthetic, ugly
from extras_helpers import APART, COST, MADE, STANDS

from mithridate.evaluation.report import write_report

PAPER = 703
"""Pixels of 96 to the inch between the margins of A4."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of a fair and an ugly report."""
    out = tmp_path_factory.mktemp("reports")
    extras = (COST, APART, STANDS, MADE)
    for name, evaluation in (("fair", synthetic(extras=extras)), ("ugly", replace(ugly(), extras=extras))):
        write_report(evaluation, out / name)
    return {name: (out / name / "report.html").as_uri() for name in ("fair", "ugly")}


@pytest.mark.parametrize("name", ["fair", "ugly"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_fits_the_screen_and_asks_for_nothing(browser: Browser, pages: dict[str, str], name: str, width: int) -> None:
    browser.show(pages[name], width=width)
    assert browser.requests() == [pages[name]]
    assert browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # What is wider than the screen lies in a box that scrolls, and nothing is cut off elsewhere.
    lost = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') && e.offsetParent &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"""
    assert browser.run(lost) == 0
    if (name, width) == ("ugly", 360):
        box = "document.querySelector('#matrix .scroll')"
        assert browser.run(f"{box}.scrollWidth > {box}.clientWidth")


@pytest.mark.parametrize("name", ["fair", "ugly"])
def test_fits_the_paper(browser: Browser, pages: dict[str, str], name: str) -> None:
    browser.show(pages[name], width=PAPER)
    browser.call("Emulation.setEmulatedMedia", media="print")
    lost = """[...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && e.getClientRects().length &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map(e => e.className + ' ' + e.textContent.slice(0, 40))"""
    assert browser.run(lost) == []
    browser.call("Emulation.setEmulatedMedia", media="")


def test_names_beside_lines_stay_on_the_plot(browser: Browser, pages: dict[str, str]) -> None:
    for width in (360, 1440):
        browser.show(pages["fair"], width=width)
        cut = """[...document.querySelectorAll('.plot .direct')].filter(text =>
            text.getBoundingClientRect().right > text.closest('svg').getBoundingClientRect().right).length"""
        assert browser.run(cut) == 0
