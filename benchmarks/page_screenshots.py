"""The pictures of the page in docs/images/, from a real service in a real browser.

    python -m benchmarks.page_screenshots BUNDLE [--dataset SPEC] [--out docs/images]

Serves BUNDLE with the lab, chooses an image (the first of SPEC, else a training image), attacks it at 32/255, lets the
page classify the attacked one, and photographs the page: wide, narrow, dark, and the lab. Needs Chromium, looks best
where the font Inter is installed.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mithridate.datasets import load_dataset
from mithridate.images import encode_png

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "service")]  # the browser is driven as the tests drive it

from browser_helpers import Browser, find_browser  # noqa: E402  found only now
from page_helpers import Visitor  # noqa: E402
from service_helpers import ServerProcess, wait_ready  # noqa: E402

EPSILON = 32


def main(
    bundle: Path,
    dataset: Annotated[str | None, typer.Option(help="Its first image is attacked, as digits[test,:1]")] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go")] = Path("docs/images"),
) -> None:
    """Takes the pictures."""
    binary = find_browser()
    if binary is None:
        raise typer.BadParameter("there is no Chromium on this machine; install one, or name it in CHROMIUM")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        image = _first(dataset, Path(directory) / "image.png") if dataset else None
        server = ServerProcess(Path(directory) / "log", bundle=bundle, lab=True)
        try:
            wait_ready(server.client)
            with Browser(binary, Path(directory) / "profile") as browser:
                for name, width, dark in (("wide", 1280, False), ("narrow", 390, False), ("dark", 1280, True)):
                    visitor = Visitor(browser, server.url, width=width, dark=dark)
                    _look(visitor, image)
                    if name == "wide":
                        _photograph(browser, out / "page-lab.png", "#lab")
                    browser.run("document.getElementById('lab').hidden = true; scrollTo({top: 0, behavior: 'instant'})")
                    browser.run("document.activeElement.blur()")
                    browser.screenshot(out / f"page-{name}.png")
        finally:
            server.close()
    for picture in sorted(out.glob("page-*.png")):
        print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


def _first(spec: str, path: Path) -> Path:
    path.write_bytes(encode_png(load_dataset(spec).images[0]))
    return path


def _look(visitor: Visitor, image: Path | None) -> None:
    visitor.wait("[...document.querySelectorAll('.samples img')].every(i => i.complete && i.naturalWidth)")
    if image is None:
        visitor.browser.run("document.querySelectorAll('[data-exemplar]')[7].click()")
    else:
        visitor.upload(image)
    visitor.verdict()
    before = visitor.answer_id()
    visitor.attack(EPSILON)
    visitor.browser.run("document.getElementById('use').click()")
    visitor.verdict(after=before)


def _photograph(browser: Browser, path: Path, selector: str) -> None:
    """One part of the page, with a little of what is around it."""
    box = browser.run(
        f"""(() => {{ const b = document.querySelector('{selector}').getBoundingClientRect();
        return {{x: b.x - 16, y: b.y + scrollY - 16, width: b.width + 32, height: b.height + 32, scale: 1}} }})()"""
    )
    shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=box)["data"]
    path.write_bytes(base64.b64decode(shot))


if __name__ == "__main__":
    typer.run(main)
