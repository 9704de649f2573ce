"""Every combination of gate, start, router, experts and routed unit trains a step, or is refused in one line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.slow import one_in
from timm.models import VisionTransformer

import vimoe
from vimoe.config.moe import EXPERTS, GATES, ROUTERS, STARTS
from vimoe.errors import VimoeError
from vimoe.moe.layer import moe_layers

BUILT_IN = {
    kinds.setting: [name for name, entry in kinds.items() if "vimoe" in str(entry)]
    for kinds in (ROUTERS, EXPERTS, GATES, STARTS)
}
TOKENS_ONLY, IMAGES_ONLY = {"expert_choice", "hash", "soft"}, {"smear", "superclass"}
MIXES = {"soft", "smear"}  # they choose no experts, so that there is no gate
OWN_ROWS = {"cosine", "hash", "random", "centroids", "superclass"}  # a start cannot set the rows of these
CLASSES = 8


def allowed(router: str, experts: str, gate: str, init: str, routing: str) -> bool:
    """The combinations that make sense, as the documents say it."""
    return not (
        (routing == "image" and router in TOKENS_ONLY)
        or (routing == "token" and router in IMAGES_ONLY)
        or (gate != "probability" and router in MIXES)
        or (init != "copy" and experts != "ffn")
        or (init in ("split", "cluster") and router in OWN_ROWS)
        or (init == "split" and router == "smear")  # whose experts would be unlike parts of one FFN
    )


def combinations(router: str, experts: str) -> Iterator[dict[str, Any]]:
    for gate, init, routing in itertools.product(BUILT_IN["moe.gate"], BUILT_IN["moe.init"], ("image", "token")):
        yield {"router": router, "experts": experts, "gate": gate, "init": init, "routing": routing}


def parent() -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(in_chans=3, num_classes=CLASSES, **sizes).eval()


@pytest.mark.parametrize(
    ("router", "experts"), one_in(5, itertools.product(BUILT_IN["moe.router"], BUILT_IN["moe.experts"]))
)
def test_a_combination_trains_or_is_refused(router: str, experts: str) -> None:
    images, labels = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % CLASSES
    before = parent()(images)
    for kinds in combinations(router, experts):
        alone = kinds["init"] == "split"  # which goes without a shared expert
        config = {"layers": "last:1", "num_experts": 4, "num_shared_experts": int(not alone), "rank": 2, **kinds}
        config |= {"top_k": 2} if alone else {}  # a gate that is always 1 would train no router
        if experts not in ("lora", "adapter"):
            del config["rank"]
        model = parent()
        try:
            vimoe.upcycle(model, vimoe.MoEConfig(**config), images=[(images, labels)])
        except VimoeError as refused:
            assert not allowed(**kinds), (kinds, refused)
            assert "\n" not in str(refused) and "expected" in str(refused), refused
            assert not moe_layers(model)  # all or nothing
            continue
        assert allowed(**kinds), kinds
        (layer,) = moe_layers(model).values()
        if kinds["init"] == "copy":
            torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5, msg=str(kinds))
        step(model, images, labels)
        after = model.eval()(images)
        assert after.isfinite().all() and not torch.equal(after, before), kinds
        assert any(p.grad is not None and p.grad.any() for p in layer.experts.parameters()), kinds


def step(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with vimoe.record(model.train()) as routings:
        logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.01 * vimoe.balance_loss(routings)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
