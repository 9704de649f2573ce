"""Where a model can be cut in two, and what is said of one that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.tiny import config, randomise, upcycle
from torch import nn

from vimoe.errors import ConfigError
from vimoe.models.frozen_trunk import cut_before
from vimoe.models.interface import find_backbone

PLAIN: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
TWINS: dict[str, Any] = {"img_size": 64, "depths": (1, 1, 1, 2), "embed_dims": (16, 32, 32, 64)}


def sparse(name: str, **arguments: Any) -> nn.Module:
    return upcycle(
        randomise(timm.create_model(name, num_classes=5, **arguments), scale=0.3).eval(), config(routing="token")
    )


@pytest.mark.parametrize("trained", ["blocks.1.mlp", "blocks.0.mlp"])
def test_a_model_is_cut_before_the_first_trained_block(trained: str) -> None:
    model = sparse("vit_tiny_patch16_224", **PLAIN)
    if trained == "blocks.0.mlp":
        with pytest.raises(ConfigError, match=r"blocks\.0\.mlp is in the first block and trained"):
            cut_before(model, [trained], (3, 32, 32))
    else:
        assert cut_before(model, [trained], (3, 32, 32)).before == "blocks.1"


@pytest.mark.parametrize(
    ("name", "arguments", "trained", "message"),
    [
        (
            "cait_xxs24_224",
            PLAIN,
            "blocks_token_only.0.mlp",
            "is in none of the 2 blocks that follow one another in Cait",
        ),
        ("coat_lite_tiny", {"img_size": 64}, "serial_blocks4.0.mlp", "is in none of the 0 blocks"),
        ("twins_svt_small", TWINS, "blocks.3.1.mlp", "does not compute the same from what blocks.3.1 gets"),
    ],
)
def test_a_model_that_cannot_be_cut_there_says_so(
    name: str, arguments: dict[str, Any], trained: str, message: str
) -> None:
    model = sparse(name, **arguments)
    with pytest.raises(ConfigError, match=message) as error:
        cut_before(model, [trained], find_backbone(model).input_size)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_list_of_blocks_that_is_never_called_is_no_block() -> None:
    model, called = sparse("twins_svt_small", **TWINS), []
    blocks = find_backbone(model).blocks
    assert blocks == ("blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.3.0", "blocks.3.1")
    for name in blocks:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.randn(2, 3, 64, 64))
    assert called == list(blocks)
    assert {find_backbone(model).block_of(f"{name}.mlp") for name in blocks} == set(blocks)
