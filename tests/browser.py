"""A headless Chromium of the machine, driven by Playwright; tests without one are skipped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


_PATIENCE = 120_000  # milliseconds: a loaded machine is not a fault


@contextmanager
def opened(address, width=1200, height=900, scheme="light", **context) -> Iterator:
    """A page at an address, which fails the test if it throws, or asks for anything but files and loopback."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **context
        ).new_page()
        page.set_default_timeout(_PATIENCE)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if _ours(request.url) else faults.append(request.url))
        page.goto(address)
        yield page
        browser.close()
    assert not faults


def _ours(url: str) -> bool:
    return url.startswith(("file://", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1"))
