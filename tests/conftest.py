"""Settings of every test."""

import gc
import io
from collections.abc import Iterator
from typing import BinaryIO

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

torch.set_num_threads(1)  # the models are tiny: threads only wait for one another, and much where the CPU is shared


def pytest_collection_finish() -> None:
    """Leaves what was imported and collected to itself: garbage collection would look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries complain of what is left when Python ends


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scans are not remembered in the user's cache, not even by the commands that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


DRAWN = ("test_figures.py", "test_report.py", "test_html_page.py", "test_page_in_a_browser.py")


@pytest.fixture(scope="module", autouse=True)
def _blank_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are made and not drawn, which took a quarter of the time of tests of verbs.

    Those of the files in `DRAWN`, which look at the pixels, are drawn as they are.
    """
    white = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(white, "png")

    def blank(figure: Figure, file: BinaryIO, **settings: object) -> None:
        file.write(white.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in DRAWN:
            patch.setattr(Figure, "savefig", blank)
            patch.setattr(Figure, "get_layout_engine", lambda self: None)
        yield
