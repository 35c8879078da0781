"""The page of an attack in a real browser: it fits a telephone, a wide screen and paper, and asks for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser_helpers import Browser
from client_helpers import FakeService, listening

from attack_client.black_box import BlackBoxPlan
from attack_client.campaign import run_campaign
from attack_client.plan import CampaignPlan
from attack_client.report import write_html
from attack_client.transfer import load_surrogate
from attack_client.workspace import Workspace
from mithridate.datasets import load_dataset
from mithridate.types import Epsilon

LONG = "prm+rmc:scope=tail,neighbors=64,balanced=true,gate=0.05+tta:shift=1"
PAPER = 703
"""Pixels of 96 to the inch between the margins of A4."""


@pytest.fixture(scope="module")
def page(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of every kind of attack on defences with short and long names that answer at random, and fail now and then."""
    out = tmp_path_factory.mktemp("attack") / "out"
    data = load_dataset("digits[test,:30]")
    workspace = Workspace(out)
    with listening(FakeService(says=1, random=0.3, fails_every=29, defenses=("none", "rmc", LONG))) as url:
        plan = CampaignPlan(
            url=url,
            data=data,
            epsilon=Epsilon(32),
            rate=1000,
            surrogate=load_surrogate(digits_bundle, data),
            attacks=("fgsm",),
            black_box=BlackBoxPlan(attacks=("square", "random-noise"), epsilon=Epsilon(32), queries=6, scorings=10),
            defenses=("rmc", LONG),
            command="mithridate attack " + "--attack square " * 20,
        )
        result = run_campaign(plan, progress=lambda *_: None, workspace=workspace)
    workspace.close()
    write_html(result, out / "report.html")
    return (out / "report.html").as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_fits_the_screen_and_asks_for_nothing(browser: Browser, page: str, width: int, dark: bool) -> None:
    browser.show(page, width=width, dark=dark)
    assert browser.requests() == [page]
    assert browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    lost = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') && e.offsetParent &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map(e => e.outerHTML.slice(0, 90))"""
    assert browser.run(lost) == []
    assert browser.run("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_fits_the_paper(browser: Browser, page: str) -> None:
    browser.show(page, width=PAPER)
    browser.call("Emulation.setEmulatedMedia", media="print")
    lost = """[...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && e.getClientRects().length &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map(e => e.outerHTML.slice(0, 90))"""
    assert browser.run(lost) == []
    browser.call("Emulation.setEmulatedMedia", media="")
