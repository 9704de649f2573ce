"""The page on scaling is what its script makes of the footprints, and a footprint is counted again."""

from __future__ import annotations

import numpy as np
from scaling import EXPERTS, MODELS, PAGE, cell, count, kept_footprints, key, page, read

from vimoe.config.parallel import ParallelConfig
from vimoe.training.layouts import plan_size


def test_the_page_is_what_the_script_writes() -> None:
    kept = kept_footprints()
    assert list(kept) == [key(model, experts) for model in MODELS for experts in EXPERTS]
    assert PAGE.read_text("utf-8") == page(kept), "run: python docs/scaling.py"


def test_a_footprint_is_counted_again() -> None:
    """A few percent of room: another version of torch may keep other tensors."""
    kept, again = read(kept_footprints()[key("ViT-S", 8)]), read(count("ViT-S", 8))
    assert (again.weights, again.optimizer, again.exchanges) == (kept.weights, kept.optimizer, kept.exchanges)
    np.testing.assert_allclose([again.peak, again.activations], [kept.peak, kept.activations], rtol=0.03)


def test_more_devices_never_need_more_memory_and_what_does_not_fit_is_said() -> None:
    giant = read(kept_footprints()[key("ViT-g", 128)])
    assert cell(giant, 1).startswith("does not fit: ")
    totals = [plan_size(giant, ParallelConfig(), n, 1, "bf16").shown.total for n in (8, 64, 512)]
    assert totals == sorted(totals, reverse=True)
