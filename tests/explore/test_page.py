"""The page in a browser, served and as a file: each of its functions, at the widths of a desktop and a phone.

They run where playwright is installed and Chromium is there (`pip install playwright`; `chromium` on the path, or
`VIMOE_CHROMIUM=FILE`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.explored import explored, served
from helpers.pictures import picture

from vimoe.cli import main
from vimoe.explore.session import Session

pytest.importorskip("starlette")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = os.environ.get("VIMOE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install it, or name it in VIMOE_CHROMIUM")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 800)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explored(tmp_path_factory.mktemp("run"))


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """A function that opens an address; no error may reach the console, and no width may be exceeded."""
    width, height = WIDTHS[request.param]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": width, "height": height}), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))

        def to(address: str) -> Any:
            page.goto(address)
            page.wait_for_selector("#plain .row")
            return page

        yield to
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # a refused file is a status of 400, which the browser notes too
        assert not [error for error in errors if "status of 400" not in error]
        browser.close()


def test_each_function_of_the_served_page(run: Path, tmp_path: Path, opened: Callable[[str], Any]) -> None:
    session, expect = Session(run), playwright.expect
    with served(session) as address:
        page = opened(address)
        first = page.inner_text("#plain")
        page.click('#all [data-image="8"]')
        expect(page.locator("#shown")).to_have_attribute("src", "thumbnail/8")
        expect(page.locator("#message")).to_have_text("")
        assert page.inner_text("#label").startswith("Class: ")
        page.focus("#layers select")
        page.keyboard.press("End")  # by keyboard alone
        page.wait_for_selector("#overruled .row")
        assert "expert 3" in page.inner_text("#layers .layer:first-child .chosen")
        page.click("#reset")
        page.wait_for_selector("#overruled .none")
        page.select_option("#gallery-expert", "1")
        assert page.inner_text("#gallery") is not None
        good, bad = tmp_path / "<img src=x onerror=alert(1)>.png", tmp_path / "bad.png"
        picture((10, 200, 10), 1).save(good)
        bad.write_bytes(b"hello")
        page.set_input_files("#file", good)
        expect(page.locator("#label")).to_have_text(good.name)  # as text, not as markup
        expect(page.locator("#message")).to_have_text("")
        assert page.inner_text("#plain") and not page.query_selector("#label img") and first
        page.set_input_files("#file", bad)
        page.wait_for_selector("#message.error")
        assert page.inner_text("#message").startswith("this file cannot be read")
    session.close()


def test_the_page_as_a_file(run: Path, tmp_path: Path, opened: Callable[[str], Any]) -> None:
    assert main(["explore", str(run), "--static", str(tmp_path / "site")]) == 0
    page = opened((tmp_path / "site/index.html").as_uri())
    assert not page.is_visible("#drop")
    page.click('#all [data-image="4"]')
    page.select_option("#layers .layer:nth-child(1) select", "expert 2")
    page.wait_for_selector("#overruled .row")
    page.select_option("#layers .layer:nth-child(2) select", "shared expert alone")
    assert page.input_value("#layers .layer:nth-child(1) select") == "as routed"  # one layer at a time
    assert "gate 0.00" in page.inner_text("#layers .layer:nth-child(2) .chosen")
