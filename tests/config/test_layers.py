"""The value of `MoEConfig.layers`: parsed once, without a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

import vimoe
from vimoe.config.layers import Layers
from vimoe.errors import ConfigError, SurgeryError


@dataclass(frozen=True)
class Site:
    name: str
    block: int


SITES = [Site(f"blocks.{block}.{name}", block) for block in range(4) for name in ("a.mlp", "b.mlp")]
FFN = re.compile(r"blocks\.\d+\.mlp")


@pytest.mark.parametrize(
    ("written", "blocks"),
    [
        ("none", []),
        ("all", [0, 1, 2, 3]),
        ("last:3", [1, 2, 3]),
        ("every:2", [1, 3]),
        ((-1, 0), [0, 3]),
        ("blocks.[12].*", [1, 2]),
        ((3, "blocks.1.*"), [1, 3]),
    ],
    ids=str,
)
def test_blocks_are_selected_whole_and_in_order(written: object, blocks: list[int]) -> None:
    assert Layers.parse(written).select(SITES) == [site for site in SITES if site.block in blocks]


def test_one_of_two_ffns_of_a_block_is_selected_by_name() -> None:
    assert Layers.parse("blocks.2.b.mlp").select(SITES) == [Site("blocks.2.b.mlp", 2)]


@pytest.mark.parametrize("written", ["last:5", "every:5", (4,), (-5,), "blocks.4.*"], ids=str)
def test_a_selection_of_nothing_is_refused(written: object) -> None:
    with pytest.raises(SurgeryError, match="layers"):
        Layers.parse(written).select(SITES)


def test_a_model_without_ffns_has_none_to_select() -> None:
    assert Layers.parse("none").select([]) == []
    with pytest.raises(SurgeryError, match="no FFN was found"):
        Layers.parse("all").select([])


@pytest.mark.parametrize("written", ["all", "none", "last:2", "every:3", (0, -1), "blocks.1?.mlp", ("*mlp", 1)])
def test_words_indices_and_wildcards_are_left_to_the_model(written: object) -> None:
    Layers.parse(written).check_names(FFN)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("blocks.1.mpl", "blocks.1.mlp"), ("block.11.mlp", "blocks.11.mlp"), ("blocks.3", "blocks.3.mlp"),
     ("al", "all"), ("last", "last:N")],
)  # fmt: skip
def test_a_misspelt_name_is_refused_with_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"layers={wrong!r} names no FFN: did you mean {right!r}"):
        Layers.parse(["blocks.0.mlp", wrong]).check_names(FFN)


@pytest.mark.parametrize("written", ["all", "last:2", "blocks.1?.mlp", [3, "blocks.4.mlp"]], ids=str)
def test_a_config_keeps_layers_as_they_were_written(written: str | list[int | str]) -> None:
    config = vimoe.MoEConfig(layers=written)
    kept = tuple(written) if isinstance(written, list) else written
    assert config.layers == config.selection.written == kept
    assert config == vimoe.MoEConfig(layers=kept) == vimoe.MoEConfig.from_dict(config.to_dict())
    assert config.selection is config.selection  # parsed once


@pytest.mark.parametrize("written", ["10,11", "blocks.10.mlp, blocks.11.mlp"])
def test_a_list_without_brackets_is_told_before_there_is_a_model(written: str) -> None:
    with pytest.raises(ConfigError, match=rf"names no FFN: write a list: \[{written.replace(',', ', ?')}\]"):
        Layers.parse(written).check_names(FFN, 12)
