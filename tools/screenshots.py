"""Take the pictures of the page that stand in the README and in docs/, in headless Chromium.

1. ``page.png``: the page of a result folder (``viscircuits demo`` makes one).
2. ``page-googlenet.png``: a circuit of GoogLeNet with random weights, for its size: branches side by side.
3. ``page-surgery.png``: the folder served, the strongest units of its last layer removed, and what is answered then.

    python tools/screenshots.py demo/
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from viscircuits import Bundle, discover, load_model
from viscircuits.discovery import model_of
from viscircuits.server import serving

IMG = Path(__file__).resolve().parent.parent / "docs" / "img"
N_REMOVED = 12
SIZE = {"width": 1440, "height": 900}


def main(folder: Path) -> None:
    """Take all three."""
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        static = Path(scratch) / "demo.html"
        static.write_text(Bundle.load(folder).page(), encoding="utf-8")
        shoot(browser, static.as_uri(), "page.png")
        large = Path(scratch) / "googlenet"
        googlenet(large)
        shoot(browser, (large / "index.html").as_uri(), "page-googlenet.png")
        operate(browser, folder)


def googlenet(out: Path) -> None:
    """A circuit in all layers of GoogLeNet, random weights, of rendered circles."""
    model = load_model("torchvision:googlenet", weights="none")
    discover(
        model, "render:circle,n=4", out, reference="render:text,n=4", units=0.04, labels=None, bootstrap=0, draws=1,
        edge_fractions=(), n_pictures=1, title="circle", command="tools/screenshots.py",
    )  # fmt: skip


def operate(browser: Any, folder: Path) -> None:
    """Serve the folder, remove the strongest units of the last layer, and take what the network answers then."""
    bundle = Bundle.load(folder)
    last = bundle.circuit.layers[-1]
    ranked = sorted(zip(bundle.circuit.scores[last], bundle.circuit.units[last], strict=True), reverse=True)
    cut = [("cut", f"{last}:{unit}") for _, unit in ranked[:N_REMOVED]]
    with serving(folder, model_of(bundle.circuit)) as address:
        page = opened(browser, address)
        page.evaluate("hash => { location.hash = hash }", urlencode([*cut, ("probe", "kept:0"), ("panel", "surgery")]))
        page.wait_for_timeout(8000)
        page.screenshot(path=str(IMG / "page-surgery.png"))
        page.close()


def shoot(browser: Any, address: str, name: str) -> None:
    """One page as it opens."""
    page = opened(browser, address)
    page.screenshot(path=str(IMG / name))
    page.close()


def opened(browser: Any, address: str) -> Any:
    """The page, drawn."""
    page = browser.new_page(viewport=SIZE)
    page.goto(address, timeout=120_000)
    page.wait_for_selector("html[data-ready='1']")
    page.wait_for_timeout(1500)
    return page


@contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium, the machine's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
