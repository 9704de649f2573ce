"""The page in a browser, served and as a file: each of its functions, at the widths of a desktop and a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import WIDTHS, browser_page, playwright
from helpers.explored import explored, served
from helpers.pictures import picture

from vimoe.cli import main
from vimoe.explore.session import Session

pytest.importorskip("starlette")

DROP_BESIDE = """() => {
  const given = new DataTransfer();
  given.items.add(new File(["x"], "dropped.png"));
  return !document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
}"""
LOADED = "() => [...document.querySelectorAll('.map img, #plain img')].every((each) => each.complete)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explored(tmp_path_factory.mktemp("run"))


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """A function that opens the explorer at an address."""
    with browser_page(request.param) as page:

        def to(address: str) -> Any:
            page.goto(address)
            page.wait_for_selector("#plain .row")
            return page

        yield to


def test_each_function_of_the_served_page(run: Path, tmp_path: Path, opened: Callable[[str], Any]) -> None:
    session, expect = Session(run), playwright.expect
    with served(session) as address:
        page = opened(address)
        first = page.inner_text("#plain")
        page.click('#all [data-image="8"]')
        expect(page.locator("#shown")).to_have_attribute("alt", "validation image 8")
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
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        expect(page.locator("#message")).to_be_in_viewport()
        expect(page.locator("#shown")).to_be_hidden()  # and no sign of a broken image
        assert not page.inner_text("#plain") and not page.query_selector("#nearest img")  # those were of another image
        page.click('#all [data-image="0"]')
        page.wait_for_selector("#plain .row")
        expect(page.locator("#shown")).to_be_visible()
        assert page.evaluate(DROP_BESIDE)  # or the browser would leave the page
        expect(page.locator("#label")).to_have_text("dropped.png")
        page.wait_for_selector("#message.error")
    session.close()


def test_masks_and_maps_over_the_image(tmp_path: Path, opened: Callable[[str], Any]) -> None:
    run = explored(tmp_path, "scenes", yaml="names: ['9', sky, '0']\nignore: 7\n")  # the smallest is first by number
    with closing(Session(run)) as session, served(session) as address:
        check_masks_and_maps(opened(address))
    assert main(["explore", str(run), "--static", str(tmp_path / "site")]) == 0
    check_masks_and_maps(opened((tmp_path / "site/index.html").as_uri()))


def check_masks_and_maps(page: Any) -> None:
    layer = "#layers .layer:nth-child(1)"
    shades = page.eval_on_selector_all("#plain .swatch", "found => found.map((each) => each.style.background)")
    assert len(shades) == page.locator("#plain .row").count() and len(set(shades)) == len(shades)
    shares = [float(each.removesuffix("%")) for each in page.locator("#plain .number").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    page.wait_for_function(LOADED)
    over, below = page.locator(f"{layer} canvas").bounding_box(), page.locator(f"{layer} .map img").bounding_box()
    assert (over["x"], over["y"]) == (below["x"], below["y"])
    assert over["width"] >= below["width"] - 1 and over["height"] >= below["height"] - 1  # patches of padding stand out
    page.select_option(f"{layer} select", "shared expert alone")
    page.wait_for_selector("#overruled img")
    assert page.inner_text(f"{layer} .legend") == "no expert: 100%"


def test_the_page_as_a_file(run: Path, tmp_path: Path, opened: Callable[[str], Any]) -> None:
    assert main(["explore", str(run), "--static", str(tmp_path / "site")]) == 0
    page = opened((tmp_path / "site/index.html").as_uri())
    assert not page.is_visible("#drop")
    page.click('#all [data-image="4"]')
    page.select_option("#layers .layer:nth-child(1) select", "expert 2")
    page.wait_for_selector("#overruled .row")
    page.select_option("#layers .layer:nth-child(2) select", "shared expert alone")
    assert page.input_value("#layers .layer:nth-child(1) select") == "as routed"  # one layer at a time
    assert page.inner_text("#layers .layer:nth-child(2) .chosen") == "no expert"
