"""The page on architectures is what its script makes of the findings, and a sample of them is found again."""

from __future__ import annotations

import compatibility
import pytest
import torch
from compatibility import ARCHITECTURES, PAGE, PROBES, SLOW, page, probe, read
from torch import Tensor, nn

from vimoe.errors import SurgeryError

SAMPLE = (
    "timm/vit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/cait_xxs24_224",
    "timm/levit_128s",
    "torchvision/vit_b_16",
    "torchvision/swin_v2_t",
)
ROWS = {each.key: each for each in ARCHITECTURES}


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text("utf-8") == page(read()), "run: python docs/compatibility.py"


def test_there_are_sixty_architectures_of_three_libraries_and_each_has_one_row() -> None:
    assert len(ROWS) == len(ARCHITECTURES) >= 60
    assert {each.library for each in ARCHITECTURES} == {"timm", "torchvision", "transformers"}
    assert set(read()) <= set(ROWS) and all(set(found) <= set(PROBES) for found in read().values())


@pytest.mark.parametrize("key", SAMPLE)
def test_a_sample_is_found_again(key: str) -> None:
    quick = [name for name in PROBES if name not in SLOW]
    known = read()[key]
    assert probe(ROWS[key], quick) == {name: known[name] for name in quick}


class Loose(nn.Module):
    """A probe's model that computes another thing than its parent."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_the_probes_see_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    on = compatibility.Subject(Loose(1.0), Loose(1.01), torch.ones(2, 4), "all")
    for name in ("identity", "bfloat16"):
        with pytest.raises(AssertionError, match="outputs differ by 1"):
            PROBES[name](on if name == "identity" else compatibility.Subject(Loose(1.0), Loose(1.1), on.x, "all"))
    with pytest.raises(AssertionError, match="no gradient reaches an expert"):
        PROBES["backward"](on)

    def refused(_on: object) -> None:
        raise SurgeryError("two lines\nof a reason")

    def broken(_on: object) -> None:
        raise KeyError("x")

    monkeypatch.setitem(PROBES, "identity", refused)
    monkeypatch.setitem(PROBES, "backward", broken)
    found = probe(ROWS["timm/vit_tiny_patch16_224"], ["identity", "backward"])
    assert found == {"identity": "no: two lines", "backward": "unknown: KeyError: 'x'"}


def test_a_failure_of_the_dense_model_too_is_no_failure_of_the_mixture() -> None:
    def fails(_model: nn.Module) -> None:
        raise RuntimeError

    with pytest.raises(compatibility.Refused, match="nor can it be done with the dense model .RuntimeError."):
        compatibility._unless_the_parent_fails(
            fails, compatibility.Subject(Loose(1.0), Loose(1.0), torch.ones(1), "all")
        )
