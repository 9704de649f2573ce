"""The page on architectures is what its script makes of the findings, and a sample of them is found again."""

from __future__ import annotations

import json
from pathlib import Path

import compatibility
import pytest
import torch
from compatibility import COLUMNS, PAGE, holding, main, page, read
from compatibility_probes import PROBES, Refused, Subject, probe, subject, unless_the_parent_fails
from compatibility_rows import ARCHITECTURES
from helpers.slow import one_in
from torch import Tensor, nn

from vimoe.errors import SurgeryError

SAMPLE = (
    "timm/swin_tiny_patch4_window7_224",
    "timm/cait_xxs24_224",
    "timm/levit_128s",
    "torchvision/swin_v2_t",
)
COMPILED = ("timm/vit_tiny_patch16_224", "torchvision/vit_b_16")
ROWS = {each.key: each for each in ARCHITECTURES}


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text("utf-8") == page(read()), "run: python docs/compatibility.py"


def test_each_of_the_architectures_has_one_row_and_sixty_hold_what_matters() -> None:
    assert len(ROWS) == len(ARCHITECTURES) and {each.library for each in ARCHITECTURES} == {
        "timm",
        "torchvision",
        "transformers",
    }
    assert set(read()) == set(ROWS) and all(set(found) <= set(PROBES) for found in read().values())
    assert len(holding(read())) >= 60
    unexplained = [key for key, found in read().items() if any(each.startswith("unknown") for each in found.values())]
    assert not unexplained


@pytest.mark.parametrize("key", one_in(2, [*SAMPLE, *COMPILED]))
def test_a_sample_is_found_again(key: str) -> None:
    wanted = [name for name in COLUMNS if key in COMPILED or name not in ("compile", "export")]
    known = read()[key]
    assert probe(ROWS[key], wanted) == {name: known[name] for name in wanted}


def test_findings_are_written_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses one row, and what is known is not probed again."""
    rows, probed = ARCHITECTURES[:3], []

    def once(row: object, wanted: list[str]) -> dict[str, str]:
        if len(probed) == 2:
            raise KeyboardInterrupt
        probed.append(row)
        return dict.fromkeys(wanted, "yes")

    monkeypatch.setattr(compatibility, "ARCHITECTURES", rows)
    monkeypatch.setattr(compatibility, "FOUND", tmp_path / "found.json")
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(compatibility, "probe", once)
    with pytest.raises(KeyboardInterrupt):
        main([])
    assert list(json.loads((tmp_path / "found.json").read_text())) == [each.key for each in rows[:2]]
    monkeypatch.setattr(compatibility, "probe", lambda row, wanted: dict.fromkeys(wanted, "no: why"))
    main(["--quick"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [set(found[each.key].values()) for each in rows] == [{"yes"}, {"yes"}, {"no: why"}]
    assert f"- **{rows[2].name}**, all columns: no: why." in (tmp_path / "page.md").read_text()


class Loose(nn.Module):
    """A probe's model that computes another thing than its parent."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_the_probes_see_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, factor in (("identity", 1.01), ("bfloat16", 1.1)):
        with pytest.raises(AssertionError, match="outputs differ by 1"):
            PROBES[name](Subject(Loose(1.0), Loose(factor), (torch.ones(2, 4),)))
    on = subject(ROWS["timm/vit_tiny_patch16_224"])
    PROBES["backward"](on)
    on.model.blocks[1].mlp.experts.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"no gradient reaches the experts of blocks\.1\.mlp"):
        PROBES["backward"](on)
    on.model.blocks[0].attn.qkv.register_forward_hook(lambda _module, _args, y: y.detach())
    with pytest.raises(AssertionError, match="the gradient of .* differs"):
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

    with pytest.raises(Refused, match="nor can it be done with the dense model .RuntimeError."):
        unless_the_parent_fails(fails, Subject(Loose(1.0), Loose(1.0), (torch.ones(1),)))
