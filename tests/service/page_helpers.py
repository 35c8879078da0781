"""Somebody at the page: chooses files, presses keys, and waits for what appears."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from browser_helpers import Browser


class Visitor:
    """The page at ``url``, in a browser."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1280, dark: bool = False) -> None:
        self.browser = browser
        browser.show(url, width=width, dark=dark)
        browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.wait("document.documentElement.classList.contains('js')")

    def wait(self, condition: str, *, seconds: float = 20) -> Any:
        """Until a JavaScript expression is true; gives its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.browser.run(condition)):
            assert time.monotonic() < deadline, f"{condition}: never; the page says {self.text('main')!r}"
            time.sleep(0.03)
        return value

    def upload(self, path: Path) -> None:
        """Chooses a file in the real input."""
        found = self.browser.call("Runtime.evaluate", expression="document.getElementById('file')")
        self.browser.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

    def verdict(self, *, after: str = "") -> str:
        """What kind the answer is, once it is there and nothing is under way; ``after``: an answer with another id."""
        there = "document.querySelector('#result [data-verdict]')?.dataset.verdict"
        idle = "document.querySelector('#result:not([aria-busy])')"
        other = f"document.querySelector('#result .id')?.textContent != {json.dumps(after)}"
        found: str = self.wait(f"{idle} && {other} && {there}")
        return found

    def answer_id(self) -> str:
        return self.text("#result .id")

    def attack(self, epsilon: int, kind: str = "static") -> str:
        """Presses the lab's button; gives the kind of outcome."""
        self.browser.run(
            f"""document.getElementById('lab-result').replaceChildren();
            const slider = document.getElementById('epsilon'); slider.value = {epsilon};
            slider.dispatchEvent(new Event('input'));
            document.querySelector('[name=attack][value={kind}]').click();
            document.getElementById('attack-go').click()"""
        )
        there = "document.querySelector('#lab-result:not([aria-busy]) [data-outcome]')?.dataset.outcome"
        outcome: str = self.wait(there)
        return outcome

    def text(self, selector: str) -> str:
        found: str = self.browser.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return found

    def press(self, key: str, *, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.browser.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )  # fmt: skip

    def tab(self) -> str:
        """To the next control; gives its name."""
        self.press("Tab", code=9)
        return self.focused()

    def focused(self) -> str:
        """The name of what has the focus: its id, or what it is."""
        found: str = self.browser.run(
            "((e) => e.id || e.dataset.exemplar || e.dataset.verdict || e.tagName)(document.activeElement)"
        )
        return found

    def too_wide(self) -> list[str]:
        """What reaches beyond the window."""
        found: list[str] = self.browser.run(
            """[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && !e.closest('svg')
            && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map(e => e.tagName + ' ' + e.className)"""
        )
        wider = self.browser.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return [*found, *(["the page"] if wider else [])]

    def unnamed(self) -> list[str]:
        """Roles of controls and pictures that a screen reader could not name."""
        self.browser.call("Accessibility.enable")
        nodes = self.browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "link", "textbox", "combobox", "radio", "slider", "image", "DisclosureTriangle", "heading")
        named = [node for node in nodes if not node.get("ignored") and node.get("role", {}).get("value") in roles]
        assert len(named) > 5, "the tree is empty"
        return [
            f"{node['role']['value']} {node.get('backendDOMNodeId')}"
            for node in named
            if not node.get("name", {}).get("value", "").strip()
        ]

    def faint(self) -> list[str]:
        """Texts whose contrast with what is behind them is under WCAG's AA: 4.5, and 3 for large ones."""
        found: list[str] = self.browser.run(_FAINT)
        return found


_FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!text || !e.getClientRects().length || e.closest('.visually-hidden, .skip, option, noscript')) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const [one, other] = [luminance(rgba(style.color)), luminance(behind(e))].sort((a, b) => b - a);
    const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const ratio = (one + 0.05) / (other + 0.05);
    const said = e.textContent.trim().slice(0, 30);
    if (ratio < least) faint.push(`${e.tagName}.${e.className} ${said}: ${ratio.toFixed(2)}`);
  }
  return faint;
})()"""
