"""A headless browser, where playwright is installed and Chromium is there; without them tests are skipped.

`pip install playwright`; `chromium` on the path, or `VIMOE_CHROMIUM=FILE`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = os.environ.get("VIMOE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 800)}


@contextmanager
def browser_page(device: str) -> Iterator[Any]:
    """Yield a page of a browser; no error may reach its console, and what it shows may not be wider than it is."""
    if not CHROMIUM:
        pytest.skip("no Chromium: install it, or name it in VIMOE_CHROMIUM")
    width, height = WIDTHS[device]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": width, "height": height}), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # a refused file is a status of 400, which the browser notes too
        assert not [error for error in errors if "status of 400" not in error]
        browser.close()
