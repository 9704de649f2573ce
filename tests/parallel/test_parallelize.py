"""A model over the processes of a mesh trains as one process does: losses, gradients, weights, moments, logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import parallel_work
from helpers.processes import run
from helpers.tiny import config, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.errors import SurgeryError, VimoeError
from vimoe.parallel.parallelize import check, whole

TOKENS: dict[str, Any] = {"routing": "token", "top_k": 2}
IMAGES: dict[str, Any] = {"routing": "image", "top_k": 1}
CHANGES: dict[str, Any] = {"routing": "token", "experts": "lora", "rank": 3, "router": "cosine"}
MERGED: dict[str, Any] = {"routing": "image", "router": "smear"}


@pytest.mark.parametrize(
    ("parallel", "count", "settings"),
    [
        ({"expert": 2}, 2, TOKENS),
        ({"fsdp": 2, "expert": 2}, 4, TOKENS),
        *(
            pytest.param(parallel, count, settings, marks=pytest.mark.slow)
            for parallel, count, settings in [
                ({"expert": 2}, 2, IMAGES),
                ({"fsdp": 2}, 2, MERGED),
                ({"expert": 4}, 4, IMAGES),
                ({"data": 2, "expert": 2}, 4, TOKENS),
                ({"data": 2, "expert": 2}, 4, CHANGES),
                ({"fsdp": 2, "expert": 2}, 4, IMAGES),
                ({"fsdp": 4}, 4, CHANGES),
            ]
        ),
    ],
)
def test_processes_agree_with_one(parallel: dict[str, int], count: int, settings: dict[str, Any]) -> None:
    seen = run(parallel_work.together, count, settings, parallel, timeout=300)[0]
    again = seen.pop("logits of the model folder")
    torch.testing.assert_close(again, seen["logits"], rtol=0, atol=1e-12)
    expected = parallel_work.alone(settings, count)
    assert expected["norms"].max() > 0.5, "nothing was clipped"
    assert_close(seen, expected)


def assert_close(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert_close(seen[name], value)


@pytest.mark.parametrize(
    ("settings", "expert", "message"),
    [
        ({}, 3, "num_experts=4: expected a multiple of expert=3"),
        ({"router": "smear"}, 2, "moe.router='smear' reads the weights of all experts"),
        ({"experts": "lora", "num_shared_experts": 0, "top_k": 2}, 2, "moe.experts='lora' own a base"),
        ({"router_gradient": "default_vectors"}, 1, "moe.router_gradient='default_vectors' keeps means"),
    ],
)
def test_a_layer_that_cannot_be_spread_is_refused_in_one_line(
    settings: dict[str, Any], expert: int, message: str
) -> None:
    model = upcycle(vit(), config(**settings))
    with pytest.raises(SurgeryError, match="blocks.0.mlp cannot be spread over 6 processes") as error:
        check(model, expert, 6)
    assert message in str(error.value) and "\n" not in str(error.value)
    check(model, 1, 1)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(VimoeError, match="expected Module"):
        check("vit", 1, 2)  # type: ignore[arg-type]
    with pytest.raises(VimoeError, match="went through vimoe.optimize"):
        check(vimoe.optimize(vit()), 1, 2)
    with pytest.raises(VimoeError, match="not spread over processes"):
        whole(nn.Linear(2, 2))
