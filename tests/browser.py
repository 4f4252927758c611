"""A person at the page: Chromium with the network cut, driven by Playwright, and an accessibility checker.

`page` is an empty tab; `open_page` opens HTML from disk in it; `open_served` opens it as if a server gave it, with
answers that the test makes up, and `open_live` from a server that runs. When the test ends, whatever the tab complained
about, and each address that it asked for outside, fails the test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

SERVED = "http://127.0.0.1:8799"
NAMES = ("chromium", "chromium-browser", "google-chrome")
KINDS = {"js": "text/javascript", "css": "text/css", "html": "text/html", "png": "image/png"}

# An answer of the made-up server: status, and what is sent as JSON, or text or bytes as they are.
Reply = tuple[int, Any]


def chromium() -> str:
    """The browser's path; where there is none the test is skipped, aloud."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium on this machine, so nothing is looked at in a browser")
    return path


# a module's, not the session's: while Playwright runs, `asyncio.run` in the same thread is an error
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so no browser can be driven; see the extra 'test'"
    )
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty tab without network. Its errors, and what it asked of a network, must be none at the end.

    ``page.complaints`` holds them; a test that provokes one on purpose clears the list.
    """
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(8000)
    complaints: list[str] = []

    def refuse(route: Any) -> None:
        complaints.append(f"asked the network for {route.request.url}")
        route.abort()

    context.route(re.compile(r"^(https?|wss?):"), refuse)
    tab = context.new_page()
    tab.complaints = complaints
    tab.on("console", lambda said: complaints.append(f"console: {said.text}") if said.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    yield tab
    context.close()
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def open_page(page: Any, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that writes HTML to disk, opens it with the network off, and gives the tab once it is drawn."""

    def opened(html: str, fragment: str = "", *, width: int = 1400, height: int = 900, dark: bool = False) -> Any:
        path = tmp_path / "index.html"
        path.write_text(html, encoding="utf-8")
        page.context.set_offline(True)
        return _drawn(page, path.as_uri() + fragment, width, height, dark)

    return opened


@pytest.fixture
def open_served(page: Any) -> Callable[..., Any]:
    """Return a function that opens HTML as a server would give it; ``answer(method, path, request)`` makes its API.

    Requests are kept in ``page.asked`` as (method, path with query, body as bytes).
    """

    def opened(
        html: str, answer: Callable[[str, str, Any], Reply], fragment: str = "", *, dark: bool = False, **size: int
    ) -> Any:
        page.asked = []

        def give(route: Any) -> None:
            request = route.request
            path = request.url.removeprefix(SERVED)
            if path.split("#")[0] in ("", "/"):
                route.fulfill(body=html, content_type="text/html")
            elif path.startswith("/web/"):
                name = path.removeprefix("/web/").split("?")[0]
                text = (files("viscircuits") / "web" / name).read_text(encoding="utf-8")
                route.fulfill(body=text, content_type=KINDS[name.rpartition(".")[2]])
            else:
                page.asked.append((request.method, path, request.post_data_buffer))
                _reply(route, answer(request.method, path, request))

        page.context.route(f"{SERVED}/**", give)
        return _drawn(page, f"{SERVED}/{fragment}", size.get("width", 1400), size.get("height", 900), dark)

    return opened


@pytest.fixture
def open_live(page: Any) -> Callable[..., Any]:
    """Return a function that opens the address of a server that runs, and lets the tab ask that server alone."""

    def opened(address: str, *, width: int = 1400, height: int = 900, dark: bool = False) -> Any:
        origin = "/".join(address.split("/")[:3])
        page.context.route(f"{origin}/**", lambda route: route.continue_())
        return _drawn(page, address, width, height, dark)

    return opened


def axe(page: Any) -> list[str]:
    """What axe-core calls a serious or critical fault in the page as it stands: rule, and where."""
    runner = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    found = runner.Axe().run(page).response["violations"]
    return [
        f"{each['id']} ({each['impact']}): {node['target']} {node['html'][:120]} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def _reply(route: Any, reply: Reply) -> None:
    status, body = reply
    if isinstance(body, bytes):
        route.fulfill(status=status, body=body, content_type="application/octet-stream")
    elif isinstance(body, str):
        route.fulfill(status=status, body=body, content_type="text/plain; charset=utf-8")
    else:
        route.fulfill(status=status, body=json.dumps(body), content_type="application/json")


def _drawn(page: Any, address: str, width: int, height: int, dark: bool) -> Any:
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if dark else "light", reduced_motion="reduce")
    page.goto(address)
    page.wait_for_selector("html[data-ready], html[data-error]", state="attached")
    error = page.evaluate("document.documentElement.dataset.error")
    assert error is None, error
    return page
