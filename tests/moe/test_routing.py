"""What a recorder collects: each decision once, of its own model, thread and block, and with its gradient."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.slow import one_in
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import set_reentrant_ckpt
from torch import nn
from torch.utils.checkpoint import checkpoint

import vimoe


@pytest.fixture(params=["image", "token"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Every layer gets all tokens."""
    settings = config(layers="last:2", routing=request.param, top_k=2)
    return vimoe.set_reading(perturb_experts(upcycle(vit(depth=3), settings)), "all")


NAMES = ["blocks.1.mlp", "blocks.2.mlp"]


def names(routings: list[vimoe.Routing]) -> list[str]:
    return [routing.layer for routing in routings]


def test_a_record_says_what_was_routed_where(model: nn.Module) -> None:
    with vimoe.record(model) as routings:
        model(images(model, batch=3))
    assert names(routings) == NAMES
    for layer, routing in zip(layers(model), routings, strict=True):
        tokens = 1 + model.patch_embed.num_patches
        units = 3 if layer.config.routing == "image" else 3 * tokens
        assert routing.batch == (3, tokens)
        assert routing.unit == layer.config.routing
        assert routing.logits.shape == routing.probabilities.shape == (units, 4)
        assert routing.experts.shape == routing.gates.shape == (units, 2)
        assert routing.image.tolist() == [unit * 3 // units for unit in range(units)]


def test_chosen_experts_are_the_best_ones_best_first(model: nn.Module) -> None:
    with vimoe.record(model) as routings:
        model(images(model))
    for routing in routings:
        ranked = routing.probabilities.sort(dim=-1, descending=True)
        assert torch.equal(routing.experts, ranked.indices[:, :2])
        assert torch.equal(routing.gates, ranked.values[:, :2])
        assert routing.load.tolist() == [(routing.experts == expert).sum() for expert in range(4)]


def test_two_forwards_are_two_records_of_every_layer(model: nn.Module) -> None:
    with vimoe.record(model) as routings:
        model(images(model, seed=1))
        model(images(model, seed=2))
    assert names(routings) == 2 * NAMES
    assert not torch.equal(routings[0].logits, routings[2].logits)


def test_nothing_is_recorded_or_kept_outside_of_the_block(model: nn.Module) -> None:
    model(images(model))
    with vimoe.record(model) as routings:
        model(images(model))
    model(images(model))
    assert names(routings) == NAMES
    logits = weakref.ref(routings[0].logits)
    routings.clear()
    gc.collect()
    assert logits() is None


def test_an_error_inside_the_block_ends_the_recording(model: nn.Module) -> None:
    with pytest.raises(KeyError), vimoe.record(model) as routings:
        raise KeyError
    model(images(model))
    assert routings == []


def test_the_innermost_recorder_of_a_model_gets_its_routings(model: nn.Module) -> None:
    with vimoe.record(model) as outer:
        with vimoe.record(model) as inner:
            model(images(model))
        assert names(inner) == NAMES
        assert outer == []
        model(images(model))
    assert names(inner) == names(outer) == NAMES


def test_an_inner_recorder_takes_only_the_layers_that_it_covers(model: nn.Module) -> None:
    with vimoe.record(model) as outer, vimoe.record(model.blocks[2]) as inner:
        model(images(model))
    assert names(outer) == NAMES[:1]
    assert names(inner) == ["mlp"]


def test_threads_that_record_the_same_model_see_their_own_forwards_only(model: nn.Module) -> None:
    both_record = threading.Barrier(2)

    def forward(batch: int) -> list[vimoe.Routing]:
        with vimoe.record(model) as routings:
            both_record.wait(timeout=60)
            model(images(model, batch))
            both_record.wait(timeout=60)
        return routings

    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(forward, [2, 5]))
    assert [names(routings) for routings in records] == [NAMES, NAMES]
    assert [[routing.batch[0] for routing in routings] for routings in records] == [[2, 2], [5, 5]]


def test_a_recorder_sees_nothing_of_another_threads_forward(model: nn.Module) -> None:
    with vimoe.record(model) as routings, ThreadPoolExecutor(1) as pool:
        pool.submit(model, images(model)).result()
    assert routings == []


# ----- gradient checkpointing


def gradients(model: nn.Module, forward=None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Of the task and balance losses, and what was recorded until after the backward pass."""
    model.train().zero_grad()
    with vimoe.record(model) as routings:
        logits = (forward or model)(images(model, batch=5))
        (F.cross_entropy(logits, torch.arange(5)) + vimoe.balance_loss(routings)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, names(routings)


def block_by_block(model: nn.Module, use_reentrant: bool):
    """The model's forward with each block checkpointed by hand."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.forward_head(model.norm(x))

    return forward


def count_block_forwards(model: nn.Module) -> list[int]:
    """Grows by one for each forward of the last block, recomputation included."""
    calls: list[int] = []
    model.blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("by", ["timm", "torch"])
def test_non_reentrant_checkpointing_records_once_and_gives_the_same_gradients(model: nn.Module, by: str) -> None:
    expected, _ = gradients(model)
    calls = count_block_forwards(model)
    if by == "timm":
        model.set_grad_checkpointing(True)
        actual, recorded = gradients(model)
    else:
        actual, recorded = gradients(model, block_by_block(model, use_reentrant=False))
    assert len(calls) == 2
    assert recorded == NAMES
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # looked at by torch.compile itself
@pytest.mark.parametrize("compiled", one_in(2, ["blocks", "model"]))
def test_checkpointing_outside_and_inside_of_torch_compile_records_once(model: nn.Module, compiled: str) -> None:
    torch._dynamo.reset()  # tests before count towards its limit of graphs, after which nothing is compiled
    expected, _ = gradients(model)
    model.set_grad_checkpointing(True)
    for module in model.blocks if compiled == "blocks" else [model]:
        module.compile(backend="aot_eager")
    for _ in range(2):  # compiled now, and as compiled before
        actual, recorded = gradients(model)
        assert recorded == NAMES
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, msg=name)


def test_reentrant_checkpointing_by_timm_is_refused(model: nn.Module) -> None:
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(vimoe.VimoeError, match=r"blocks\.1\.mlp ran without gradient.*use_reentrant=False"):
            gradients(model)
    finally:
        set_reentrant_ckpt(False)


def test_reentrant_checkpointing_by_torch_is_refused(model: nn.Module) -> None:
    with pytest.raises(vimoe.VimoeError, match="use non-reentrant checkpointing"):
        gradients(model, block_by_block(model, use_reentrant=True))


def test_a_recorder_entered_without_gradient_records_without_it(model: nn.Module) -> None:
    with torch.no_grad(), vimoe.record(model) as routings:
        model(images(model))
    assert names(routings) == NAMES
    assert not any(routing.logits.requires_grad for routing in routings)


@pytest.mark.parametrize("unit", ["image", "token"])
def test_an_empty_batch_uses_no_expert(unit: str) -> None:
    empty = torch.empty(0, 2, dtype=torch.int64)
    routing = vimoe.Routing(torch.empty(0, 4), torch.empty(0, 2), empty, unit, (0, 5))
    assert routing.usage.shape == (0, 4) and routing.load.tolist() == [0] * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_are_recorded_where_they_are_asked_for(model: nn.Module, compiled: bool) -> None:
    """Those of each slot's expert, by slot, with gradient; and not kept beyond a step."""
    x, inputs = images(model), []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0]))
    with vimoe.record(model, outputs=True) as routings:
        model(x)
    for layer, routing, tokens in zip(layers(model), routings, inputs, strict=True):
        rows = tokens.reshape(len(routing.experts), routing.tokens_per_unit, -1)
        for r, experts in enumerate(routing.experts.tolist()):
            for k, e in enumerate(experts):
                own = {name: w[e] for name, w in layer.experts.named_parameters()}
                y = F.linear(F.gelu(F.linear(rows[r], own["fc1.weight"], own["fc1.bias"])), own["fc2.weight"])
                torch.testing.assert_close(routing.outputs[r, k], y + own["fc2.bias"], rtol=1e-4, atol=1e-5)
        assert routing.outputs.requires_grad and routing.detach().outputs is None
    with vimoe.record(model) as without:
        model(x)
    assert [routing.outputs for routing in without] == [None, None]
    if compiled:
        torch._dynamo.reset()
        del inputs[:]
        with vimoe.record(model, outputs=True) as again:
            torch.compile(model, backend="aot_eager")(x)
        for ours, theirs in zip(again, routings, strict=True):
            torch.testing.assert_close(ours.outputs, theirs.outputs)
