"""The page in a real browser: somebody chooses an image, reads the answer, and attacks it in the lab."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from browser_helpers import Browser
from page_helpers import Visitor
from service_helpers import ServerProcess, wait_ready

from mithridate.images import encode_png


@pytest.fixture(scope="module")
def url(browser: Browser, tmp_path_factory: pytest.TempPathFactory, digits_bundle: Path) -> Iterator[str]:
    server = ServerProcess(tmp_path_factory.mktemp("page") / "log", bundle=digits_bundle, lab=True)
    try:
        wait_ready(server.client)
        yield server.url
    finally:
        server.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, clean: list[bytes]) -> Path:
    path = tmp_path_factory.mktemp("images") / "digit.png"
    path.write_bytes(clean[0])
    return path


def check_kept_to_itself(visitor: Visitor, url: str) -> None:
    asked = [address for address in visitor.browser.requests() if not address.startswith("blob:")]
    assert [address for address in asked if not address.startswith(url + "/")] == []
    assert visitor.browser.complaints() == []


def test_an_image_its_answer_and_the_lab(browser: Browser, url: str, file: Path) -> None:
    visitor = Visitor(browser, url)
    visitor.upload(file)
    assert visitor.verdict() == "agrees"
    said = visitor.text(".said.base .label")
    assert said == visitor.text(".said.mine .label") != ""
    assert browser.run("document.querySelectorAll('.group.clean .thumbs img').length") > 3
    assert browser.run("[...document.querySelectorAll('.thumbs img')].every(i => i.complete && i.naturalWidth == 8)")
    assert "before" in visitor.text("#adaptation")
    assert "adapting" in visitor.text("#timings")
    assert browser.run("document.querySelector('.stack .phase-adapt').getBoundingClientRect().width") > 1
    clean_id = visitor.answer_id()

    assert visitor.attack(32) == "repaired"
    assert visitor.text(".sides tbody tr:nth-child(1) .fell") != ""
    assert visitor.text(".sides tbody tr:nth-child(2) .fell") == ""
    assert browser.run("[...document.querySelectorAll('.three img')].every(i => i.complete && i.naturalWidth == 8)")
    browser.run("document.getElementById('use').click()")
    assert visitor.verdict(after=clean_id) == "suspicious"
    assert visitor.text(".said.mine .label") == said != visitor.text(".said.base .label")
    assert browser.run("document.querySelectorAll('.group.poisoned .thumbs img').length") > 3
    assert visitor.unnamed() == []
    check_kept_to_itself(visitor, url)


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (768, False), (1440, False)])
def test_fits_the_screen_and_has_contrast(browser: Browser, url: str, file: Path, width: int, dark: bool) -> None:
    visitor = Visitor(browser, url, width=width, dark=dark)
    assert visitor.too_wide() == []
    visitor.upload(file)
    visitor.verdict()
    visitor.attack(32)
    browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert visitor.too_wide() == []
    assert visitor.faint() == []


def test_by_keyboard_alone(browser: Browser, url: str, file: Path) -> None:
    visitor = Visitor(browser, url)
    seen = [visitor.tab() for _ in range(8)]
    assert seen[0] == "A", "the way past the header comes first"
    order = [seen.index(name) for name in ("file", "defense", "go")]
    assert order == sorted(order)
    visitor.tab()
    assert browser.run("document.activeElement.matches('.samples button')")
    visitor.press("Enter", code=13, text="\r")
    assert visitor.verdict() in ("agrees", "suspicious")
    assert visitor.focused() in ("agrees", "suspicious"), "the answer has the focus, so it is read out"
    browser.run("document.getElementById('epsilon').focus()")
    visitor.press("ArrowRight", code=39)
    assert visitor.text("#epsilon-said") == "9/255"


def test_another_size_is_refused_until_it_is_scaled_in_the_browser(browser: Browser, url: str, tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    digit = np.zeros((1, 20, 32), np.uint8)
    digit[:, 4:16, 14:18] = 255
    big.write_bytes(encode_png(digit))
    visitor = Visitor(browser, url)
    visitor.upload(big)
    visitor.wait("!document.getElementById('scaling').hidden")
    assert "exactly 8\u202f\u00d7\u202f8" in visitor.text("#scaling")
    browser.run("document.getElementById('scale').click()")
    visitor.verdict()
    assert "Scaled in this browser from 32\u202f\u00d7\u202f20" in visitor.text("#scaling")


def test_what_is_no_image_says_so(browser: Browser, url: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not an image")
    visitor = Visitor(browser, url)
    visitor.upload(tmp_path / "x.png")
    visitor.wait("!!document.querySelector('#result [role=alert]')")
    assert "not" in visitor.text("#result [role=alert]")
    assert "(415)" in visitor.text("#result [role=alert]")


def test_without_a_script_the_form_is_enough(browser: Browser, url: str, file: Path) -> None:
    browser.show("about:blank", width=1280)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=url)
        page = wait_for_html(browser, 'id="go"')
        assert "data-verdict" not in page
        browser.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node(browser, "#file"))
        browser.call("DOM.focus", nodeId=node(browser, "#go"))
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
        page = wait_for_html(browser, "data-verdict")
        assert 'data-verdict="agrees"' in page
        assert page.count('src="data:image/png') > 3
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def node(browser: Browser, selector: str) -> int:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    found: int = browser.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    return found


def wait_for_html(browser: Browser, text: str) -> str:
    """Where no script runs, the page is read from outside."""
    deadline = time.monotonic() + 20
    while True:
        page = ""
        with suppress(AssertionError):  # a document that has just been left
            root = browser.call("DOM.getDocument")["root"]["nodeId"]
            page = browser.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
        if text in page:
            return page
        assert time.monotonic() < deadline, page
        time.sleep(0.05)


def test_the_interface_is_described_without_anybody_else(browser: Browser, url: str) -> None:
    """Swagger UI's files come from the service, and its policy lets nothing else run."""
    browser.show(f"{url}/docs", width=1280)
    deadline = time.monotonic() + 20
    while browser.run("document.querySelectorAll('.opblock').length") < 10:
        assert time.monotonic() < deadline, browser.run("document.body.innerText")
        time.sleep(0.05)
    assert "/v1/predict" in browser.run("document.body.innerText")
    asked = browser.requests()
    assert f"{url}/docs/swagger-ui-bundle.js" in asked
    assert [address for address in asked if not address.startswith((f"{url}/", "data:"))] == []
    assert browser.complaints() == []
