"""Settings of every test."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads only wait for one another, and much where the CPU is shared


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scans are not remembered in the user's cache, not even by the commands that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
