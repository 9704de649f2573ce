"""The last block, computed for the tokens that the head reads: the same outputs and gradients, with less work."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import timm
import torch
from helpers.flops import macs
from helpers.reading import IN_FLOAT64, assert_same, descend, inputs, pair
from helpers.segmenters import segmenter
from helpers.slow import one_in
from helpers.tiny import FAMILIES, config, images, perturb_experts, randomise, upcycle, vit
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import vimoe
from vimoe.errors import ConfigError
from vimoe.models.interface import find_backbone
from vimoe.models.reading import ignoring_hooks, tokens_read
from vimoe.moe.layer import moe_layers

READ = {  # families whose head reads no patches, and how many tokens it reads
    "vit": 1, "deit": 1, "deit, distilled": 2, "deit3, LayerScale": 1, "dinov2": 1, "dinov2, registers": 1,
    "dinov2, packed SwiGLU": 1, "parallel FFNs": 1,
}  # fmt: skip
VARIANTS = {  # further blocks and attentions of timm
    "query and key norms": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "inner norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "projections without biases": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "gated attention": ("vit_tiny_patch16_224", {}),
    "differential attention": ("vit_tiny_patch16_224", {"attn_layer": "diff"}),
    "norms at the end": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock, "init_values": 0.5}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "eva02": ("eva02_base_patch16_clip_224", {}),
    "eva02, one projection": ("eva02_tiny_patch14_224", {"global_pool": "token", "img_size": 28}),
    "eva, norms at the end": ("eva02_enormous_patch14_clip_224", {"img_size": 28, "mlp_ratio": 2}),
    "dinov3 on the class token": ("vit_small_patch16_dinov3", {"global_pool": "token"}),
    "rotary positions of each block": ("vit_small_patch16_rope_mixed_224", {}),
    "grouped queries": ("vit_base_patch16_sapiens2", {"num_kv_heads": (2, 1)}),
    "registers and rotary positions": ("vit_small_patch16_lingbot", {}),
}


def variant(name: str) -> nn.Module:
    """A tiny dense model in eval mode, all of whose weights matter."""
    if name in FAMILIES:
        return vit(name)
    architecture, arguments = VARIANTS[name]
    given = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, **arguments}
    model = timm.create_model(architecture, **given)
    if name == "gated attention":  # timm has it for its own blocks' attention, and no ViT that asks for it
        for block in model.blocks:
            block.attn = Attention(24, 2, qkv_bias=True, gated=True)
    return randomise(model).eval()


def vimoes(name: str, routing: str = "image", **settings: object) -> tuple[nn.Module, nn.Module]:
    return pair(perturb_experts(upcycle(variant(name), config(routing=routing, **settings))))


# ---- the same, with less


@pytest.mark.parametrize("name", [*READ, *VARIANTS])
def test_a_dense_model_gives_the_same_with_less_work(name: str) -> None:
    whole, narrow = pair(variant(name))
    x = inputs(whole)
    assert tokens_read(whole) is None and tokens_read(narrow) == READ.get(name, 1)
    assert_same(whole.train(), narrow.train(), x)
    assert macs(narrow, x) < 0.9 * macs(whole, x)  # half of the two blocks, but for keys and values


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("name", [*READ, *VARIANTS])
def test_a_vimoe_gives_the_same(name: str, routing: str) -> None:
    whole, narrow = vimoes(name, routing, top_k=2)
    assert_same(whole, narrow, inputs(whole))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in READ])
def test_a_head_that_reads_patches_is_left_alone(name: str) -> None:
    dense, model = variant(name), upcycle(variant(name), config())
    vimoe.set_reading(dense)
    assert tokens_read(dense) is tokens_read(model) is None
    assert [type(m) for m in dense.modules()] == [type(m) for m in variant(name).modules()]
    assert not dense._forward_pre_hooks


def test_only_the_tokens_that_are_read_are_computed() -> None:
    """By hand: keys and values of all tokens, one query, one projection, one token through the FFN."""
    whole, narrow = pair(vit(depth=1))
    x, tokens, dim = inputs(whole, 1), 5, 24
    attention = 2 * tokens * tokens * dim
    saved = (tokens - 1) * (2 * dim * dim + 8 * dim * dim) + attention - attention // tokens
    assert macs(whole, x) - macs(narrow, x) == saved


def test_stochastic_depth_and_dropout_act_as_before() -> None:
    """Depth is dropped by image, so the same images are dropped; dropout of tokens draws other numbers."""
    whole, narrow = pair(vit(drop_path_rate=0.5))
    assert_same(whole.train(), narrow.train(), inputs(whole, 8))
    _, narrow = pair(vit(attn_drop_rate=0.5, proj_drop_rate=0.5))
    first, again = (descend(narrow.train(), inputs(narrow, 8), seed)[0] for seed in (0, 1))
    assert (first - again).abs().max() > 1e-3
    assert (first - narrow.eval()(inputs(narrow, 8))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit", "eva02", "parallel FFNs"])
def test_activation_checkpointing_computes_the_same_tokens_again(name: str) -> None:
    whole, narrow = vimoes(name)
    narrow.set_grad_checkpointing()
    x = inputs(whole)
    assert_same(whole.train(), narrow.train(), x)
    narrow.zero_grad()
    narrow(x).sum()  # computed and forgotten
    tokens = narrow.forward_features(x)
    tokens.sum().backward()
    whole.zero_grad()
    whole.forward_features(x).sum().backward()
    for ours, theirs in zip(narrow.parameters(), whole.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **IN_FLOAT64)


class Around(nn.Module):
    """A module that calls a ViT."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inside(x)


@pytest.mark.parametrize(
    ("compiled", "tokens"),
    one_in(
        3,
        [
            ("by torch.compile", 2),
            ("in place", 2),
            ("inside of another", 2),
            ("checkpointed", 6),
            ("block by block", 2),
        ],
    ),
)
@torch.no_grad()
def test_compiled_models_give_the_same(compiled: str, tokens: int) -> None:
    """However it is compiled, in one graph; a block that is compiled by itself and checkpointed computes all tokens."""
    torch._dynamo.reset()
    whole, narrow = vimoes("deit, distilled")
    x, computed = inputs(whole), []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        norms = [node for node in graph.graph.nodes if "layer_norm" in str(node.target)]
        computed.append(norms[-1].meta["example_value"].shape[1])
        return graph.forward

    if compiled == "by torch.compile":
        model = torch.compile(narrow, backend=backend, fullgraph=True)
    elif compiled == "inside of another":
        model = torch.compile(Around(narrow), backend=backend, fullgraph=True)
    else:
        model = narrow
        model.set_grad_checkpointing(compiled == "checkpointed")
        for module in [narrow] if compiled == "in place" else narrow.blocks:
            module.compile(backend=backend, fullgraph=True)
    scale = 2 if compiled == "inside of another" else 1
    features = torch.compile(narrow.forward_features, backend=backend, fullgraph=True)
    for _ in range(2):  # and as compiled before
        torch.testing.assert_close(model(x), scale * whole(x), **IN_FLOAT64)
        torch.testing.assert_close(narrow.forward_features(x), whole.forward_features(x), **IN_FLOAT64)
        torch.testing.assert_close(features(x), whole.forward_features(x), **IN_FLOAT64)
    assert computed[1 if compiled in ("block by block", "checkpointed") else 0] == tokens


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # looked at by torch.compile itself
@pytest.mark.parametrize("checkpointing", [True, False])
def test_blocks_that_are_compiled_one_by_one_learn_the_same(checkpointing: bool) -> None:
    torch._dynamo.reset()
    whole, narrow = vimoes("vit")
    narrow.set_grad_checkpointing(checkpointing)
    for block in narrow.blocks:
        block.compile(backend="aot_eager")
    for _ in range(2):
        assert_same(whole.train(), narrow.train(), inputs(whole))


@pytest.mark.parametrize("name", ["vit", "deit, distilled", "eva02", "parallel FFNs"])
def test_an_exported_model_gives_the_same(name: str) -> None:
    whole, narrow = vimoes(name)
    x = inputs(whole)
    exported = torch.export.export(narrow, (x,)).module()
    torch.testing.assert_close(exported(x), whole(x), **IN_FLOAT64)
    assert macs(exported, x) < macs(whole, x)


def test_an_adapted_projection_is_called_as_a_whole() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum(dim=-1, keepdim=True)

    model = vit()
    for block in model.blocks:
        block.attn.qkv.__class__ = Adapted
    whole, narrow = pair(model)
    assert_same(whole, narrow, inputs(whole))


class Beside(nn.Module):
    """A linear map with an adapter beside it, as peft's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False).double()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("name", ["vit", "eva02, one projection"])
def test_an_adapter_counts_where_timm_calls_it_and_nowhere_else(name: str) -> None:
    """EVA's attention reads the matrix of its projection, and does not call it."""
    model = variant(name)
    model.blocks[-1].attn.qkv = Beside(model.blocks[-1].attn.qkv)
    whole, narrow = pair(model)
    assert_same(whole, narrow, inputs(whole))
    assert macs(narrow, inputs(whole)) < macs(whole, inputs(whole))


class Quantised(Tensor):
    """A matrix of which only products are known, as torchao's."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, held, _, __, ___):  # type: ignore[no-untyped-def]
        return cls(held["held"])

    @classmethod
    def __torch_dispatch__(cls, function, _types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*tree_map(lambda x: x.held if isinstance(x, cls) else x, args), **(kwargs or {}))
        if function in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
            return cls(found)
        assert "mm" in str(function), function
        return found


@torch.no_grad()
def test_a_quantised_projection_is_not_taken_apart() -> None:
    whole, narrow = pair(vit())
    x, expected = inputs(whole), whole(inputs(whole))
    qkv = narrow.blocks[1].attn.qkv
    qkv.weight = nn.Parameter(Quantised(qkv.weight.detach()), requires_grad=False)
    torch.testing.assert_close(narrow(x), expected, **IN_FLOAT64)


@pytest.mark.filterwarnings("ignore")  # torch would have others quantise
def test_activations_that_are_quantised_together_stay_together() -> None:
    """The step of torch's dynamic quantisation is that of all tokens."""
    whole, narrow = (torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}) for model in pair(vit()))
    assert torch.equal(narrow(images(vit())), whole(images(vit())))


def test_unfused_attention_stays_unfused() -> None:
    """It has second derivatives, which the fused one has not."""
    whole, narrow = pair(vit())
    found = []
    for model in (whole, narrow):
        model.blocks[0].attn.fused_attn = model.blocks[1].attn.fused_attn = False
        x = inputs(model).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # torch would have others trace, and sees timm compare sizes
def test_a_traced_model_gives_the_same() -> None:
    whole, narrow = pair(vit())
    traced = torch.jit.trace(narrow, inputs(whole))
    x = images(whole, 5).double()
    torch.testing.assert_close(traced(x), whole(x), **IN_FLOAT64)


def test_an_optimized_model_gives_the_same() -> None:
    model, x = perturb_experts(upcycle(vit(), config())), images(vit())
    with torch.inference_mode():
        expected = vimoe.set_reading(copy.deepcopy(model), "all")(x)
        torch.testing.assert_close(vimoe.optimize(copy.deepcopy(model))(x), expected, rtol=1e-4, atol=1e-5)


# ---- who asks for all tokens gets them


ASKING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, indices=1, norm=True)[0],
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, n=1)[0],
    "a mask": lambda model, x: model(x, attn_mask=torch.ones(5, 5).double().tril() - 1),
    "a causal mask": lambda model, x: model(x, is_causal=True),
    "forward": lambda model, x: model.forward(x),
    "blocks one by one": lambda model, x: nn.Sequential(*model.blocks)(model.forward_features(x)),
}


@pytest.mark.parametrize("way", ASKING)
def test_another_way_to_call_the_model_gives_what_it_gave(way: str) -> None:
    whole, narrow = vimoes("vit")
    x = inputs(whole)
    narrow(x)
    expected, found = (ASKING[way](model, x) for model in (whole, narrow))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, **IN_FLOAT64)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    "place", ["blocks.1", "blocks", "norm", "blocks.1.mlp", "blocks.1.mlp.shared.fc1", "blocks.1.attn.proj"]
)
def test_a_hook_sees_all_tokens(place: str, kind: str) -> None:
    whole, narrow = vimoes("vit")
    x, seen = inputs(whole), []
    for model in (whole, narrow):
        hooked = model.get_submodule(place)
        handle = getattr(hooked, kind)(lambda _module, args, *_: seen.append(args[0].detach()))
        model(x)
        handle.remove()
    torch.testing.assert_close(*seen, **IN_FLOAT64)
    assert seen[1].shape[1] == 5
    with ignoring_hooks():
        handle = narrow.blocks[1].mlp.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
        narrow(x)
    assert seen[-1].shape[1] == 1 and tokens_read(narrow) is None
    handle.remove()
    assert tokens_read(narrow) == 1


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("place", ["blocks.1", "blocks", "norm", "blocks.1.mlp", "blocks.1.norm2"])
def test_a_backward_hook_sees_all_tokens(place: str, kind: str) -> None:
    whole, narrow = vimoes("vit")
    seen: list[Tensor] = []
    for model in (whole, narrow):
        getattr(model.get_submodule(place), kind)(lambda _module, *gradients: seen.append(gradients[-1][0]))
        model(inputs(model)).sum().backward()
    torch.testing.assert_close(*seen, **IN_FLOAT64)
    assert seen[1].shape[1] == 5


def test_an_extractor_of_features_sees_all_tokens() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    whole, narrow = pair(Around(vit()))
    x = inputs(whole.inside)
    found = [create_feature_extractor(model, ["inside.blocks.1"])(x)["inside.blocks.1"] for model in (whole, narrow)]
    torch.testing.assert_close(*found, **IN_FLOAT64)
    assert found[1].shape[1] == 5


def test_a_patched_forward_is_called_as_before() -> None:
    whole, narrow = pair(vit())
    x, shapes = inputs(whole), []
    inside = narrow.blocks[1].attn.forward
    narrow.blocks[1].attn.forward = lambda x, attn_mask=None, is_causal=False: shapes.append(x.shape) or inside(x)
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)
    assert shapes == [(3, 5, 24)]


def shapes_in_the_last_ffn(model: nn.Module) -> list[torch.Size]:
    """Return a list to which each forward adds the shape that the last block's FFN gets."""
    shapes: list[torch.Size] = []
    model.blocks[-1].mlp.register_forward_hook(lambda _module, args, _output: shapes.append(args[0].shape))
    return shapes


def by_prepare(model: nn.Module) -> nn.Module:
    """Accelerate's own way, which leaves a note on the model."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # a process keeps one precision, and a test before may be it
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def by_hand(model: nn.Module) -> nn.Module:
    """The wrapper alone, around a bound method, as the training loop puts it around the model that it scores."""
    from accelerate.utils import convert_outputs_to_fp32

    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    return model


@pytest.mark.parametrize("wrap", [by_prepare, by_hand])
def test_what_accelerate_wraps_around_a_forward_changes_nothing(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = vit()
    prepared = wrap(vimoe.set_reading(model))
    assert "forward" in vars(prepared) and tokens_read(prepared) == 1
    shapes = shapes_in_the_last_ffn(model)
    with ignoring_hooks():
        prepared(images(model))
    assert shapes == [(3, 1, 24)]


def test_what_others_wrap_around_a_forward_may_read_all_tokens() -> None:
    model = vimoe.set_reading(vit())
    model.forward = functools.wraps(model.forward)(lambda x: model.forward_features(x)[:, 1:].mean(1))
    assert tokens_read(model) is None and model(images(model)).shape == (3, 24)


def test_threads_do_not_mix() -> None:
    whole, narrow = pair(vit())
    x, meet, found = inputs(whole), threading.Barrier(2, timeout=20), []
    narrow.blocks[0].register_forward_hook(lambda *_: (meet.wait(), None)[1])  # both are under way

    def features() -> None:
        found.append(narrow.forward_features(x))

    other = threading.Thread(target=features)
    other.start()
    logits = narrow(x)
    other.join()
    torch.testing.assert_close(logits, whole(x), **IN_FLOAT64)
    torch.testing.assert_close(found[0], whole.forward_features(x), **IN_FLOAT64)


def test_after_an_error_all_is_as_before() -> None:
    whole, narrow = pair(vit())
    x = inputs(whole)
    handle = narrow.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        narrow(x)
    handle.remove()
    torch.testing.assert_close(narrow.forward_features(x), whole.forward_features(x), **IN_FLOAT64)
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)


def test_after_an_interrupt_the_next_forward_puts_it_right() -> None:
    """torch calls no hook after a KeyboardInterrupt."""
    whole, narrow = pair(vit())
    x = inputs(whole)
    handle = narrow.blocks[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        narrow(x)
    handle.remove()
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)
    torch.testing.assert_close(narrow.forward_features(x), whole.forward_features(x), **IN_FLOAT64)


def test_after_an_export_that_failed_all_is_as_before() -> None:
    whole, narrow = pair(vit())
    x = inputs(whole)
    handle = narrow.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torch.export.export(narrow, (x,), strict=False)
    handle.remove()
    torch.testing.assert_close(narrow.forward_features(x), whole.forward_features(x), **IN_FLOAT64)


# ---- what changes later is noticed, and what is not known is left alone


def test_a_head_that_is_changed_later_reads_what_it_needs() -> None:
    whole, narrow = pair(vit())
    x = inputs(whole)
    for model in (whole, narrow):
        torch.manual_seed(0)
        model.reset_classifier(7, "avg")
        model.double()
    assert tokens_read(narrow) is None
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)
    narrow.reset_classifier(7, "token")
    assert tokens_read(narrow) == 1


@torch.no_grad()
def test_a_compiled_model_notices_that_its_head_has_changed() -> None:
    torch._dynamo.reset()
    whole, narrow = pair(vit())
    x, compiled = inputs(whole), torch.compile(narrow, backend="eager")
    for pool in ("token", "avg", "token"):
        whole.global_pool = narrow.global_pool = pool
        torch.testing.assert_close(compiled(x), whole(x), **IN_FLOAT64)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_compiled_copy_reads_what_its_own_head_does(copied: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    whole, narrow = pair(vit())
    x, other = inputs(whole), copied(narrow)
    torch.testing.assert_close(torch.compile(narrow, backend="eager")(x), whole(x), **IN_FLOAT64)
    whole.global_pool = other.global_pool = "avg"
    torch.testing.assert_close(torch.compile(other, backend="eager")(x), whole(x), **IN_FLOAT64)


@torch.no_grad()
def test_what_is_compiled_for_one_model_is_not_for_another() -> None:
    """Their weights differ, and here a hook, which torch.compile does not look at."""
    torch._dynamo.reset()
    whole, narrow = pair(vit())
    x, seen = inputs(whole), []
    watched = copy.deepcopy(narrow)
    watched.blocks[1].norm2.register_forward_hook(lambda _norm, _args, y: seen.append(y.shape[1]))
    torch.compile(narrow, backend="eager")(x)
    torch.compile(watched, backend="eager")(x)
    assert seen == [5]


def test_a_model_that_is_dropped_leaves_memory_at_once() -> None:
    """No cycle of references keeps its weights."""
    narrow = pair(vit())[1]
    weight = weakref.ref(narrow.head.weight)
    gc.disable()
    try:
        del narrow
        assert weight() is None
    finally:
        gc.enable()


BLOCKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fewer": lambda model: model.blocks[:1],
    "one more": lambda model: nn.Sequential(*model.blocks, copy.deepcopy(model.blocks[0])),
    "the same thrice": lambda model: nn.Sequential(*[model.blocks[1]] * 3),
    "the first once more": lambda model: nn.Sequential(*model.blocks, model.blocks[0]),
    "none": lambda model: nn.Sequential(),
}


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("change", BLOCKS)
def test_blocks_that_are_changed_later_are_noticed(change: str, again: bool) -> None:
    whole, narrow = pair(vit())
    for model in (whole, narrow):
        model.blocks = BLOCKS[change](model)
    x = inputs(whole)
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)
    if again:
        vimoe.set_reading(narrow)
        torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)
        assert tokens_read(narrow) == (1 if change in ("fewer", "one more") else None)


@pytest.mark.parametrize("patched", [Attention, Block])
def test_a_class_that_is_patched_later_is_noticed(patched: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, narrow = pair(vit())
    before, x = patched.forward, inputs(whole)
    monkeypatch.setattr(patched, "forward", lambda self, x, **given: 2 * before(self, x, **given))
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"router": "expert_choice", "routing": "token"}, None),
        ({"router": "soft", "routing": "token"}, None),
        ({"router": "smear"}, 1),
        ({"router": "hash", "routing": "token"}, 1),
        ({"router": "cosine", "experts": "lora"}, 1),
    ],
)
def test_a_router_that_needs_the_patches_gets_them(settings: dict[str, object], read: int | None) -> None:
    whole, narrow = pair(perturb_experts(upcycle(vit(), config(**settings))))
    assert tokens_read(narrow) == read
    assert_same(whole, narrow, inputs(whole))
    assert vimoe.densify(narrow) is narrow and tokens_read(narrow) == 1


def test_without_class_token_an_image_is_routed_by_its_patches() -> None:
    assert upcycle(vit("registers without class token"), config()).blocks[1].mlp.router.needs_patches
    assert not upcycle(vit(), config()).blocks[1].mlp.router.needs_patches


class Mixing(nn.Module):
    """A part of nobody's class, in which tokens see one another."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts(x)
        return y.cumsum(dim=1) + x.mean(dim=1, keepdim=True)


MIXING = ("mlp", "norm1", "norm2", "ls1", "mlp.norm", "attn.norm", "attn.proj")


@pytest.mark.parametrize("part", [*MIXING, "drop_path2", "attns.0", "ffns.0", "ffns.0.ls", "norm"])
def test_a_part_that_is_not_known_gets_all_tokens(part: str) -> None:
    model = vit("parallel FFNs" if "s." in part else "vit")
    inside = model if part == "norm" else model.blocks[1]
    inside.set_submodule(part, Mixing(inside.get_submodule(part)))
    whole, narrow = pair(model)
    assert_same(whole, narrow, inputs(whole))


def test_statistics_of_a_batch_are_of_all_tokens() -> None:
    class Norm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mT).mT

    model = vit()
    model.blocks[1].norm2 = Norm(24)
    whole, narrow = pair(model)
    assert_same(whole.train(), narrow.train(), inputs(whole))


def test_an_attention_of_ones_own_is_called_as_timm_calls_it() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
            assert attn_mask is None and not is_causal
            return x.cumsum(dim=1).flip(1)

    model = vit()
    model.blocks[1].attn = Own()
    whole, narrow = pair(model)
    assert_same(whole, narrow, inputs(whole))
    assert macs(narrow, inputs(whole)) < macs(whole, inputs(whole))


def test_what_is_not_known_is_left_alone() -> None:
    class Own(VisionTransformer):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return self.head(x.mean(dim=1))

    class Features(VisionTransformer):
        def forward_features(self, x: Tensor, **given: object) -> Tensor:
            return super().forward_features(x, **given).cumsum(dim=1).flip(1)

    own, features, patched, wrapped = vit(), vit(), vit(), vit()
    own.__class__, features.__class__ = Own, Features
    patched.forward_head = lambda x: x.mean(dim=1)
    mean = functools.wraps(VisionTransformer.forward)(lambda self, x: self.head(self.forward_features(x).mean(1)))
    for model in (own, features, patched, wrapped):
        whole, narrow = pair(model)
        if model is wrapped:
            whole.forward, narrow.forward = mean.__get__(whole), mean.__get__(narrow)
        torch.testing.assert_close(narrow(inputs(vit())), whole(inputs(vit())), **IN_FLOAT64)
    assert tokens_read(vimoe.set_reading(segmenter(decoder="linear"))) is None


def test_a_module_around_a_vit_computes_what_is_read() -> None:
    whole, narrow = pair(Around(vit()))
    x = inputs(vit())
    torch.testing.assert_close(narrow(x), whole(x), **IN_FLOAT64)
    assert tokens_read(narrow) == 1 and macs(narrow, x) < macs(whole, x)


# ---- it is no part of the model


def test_names_stay_and_copies_read_as_the_model_does(tmp_path: object) -> None:
    whole, narrow = vimoes("vit")
    x = inputs(whole)
    assert [*whole.state_dict()] == [*narrow.state_dict()]
    assert isinstance(narrow.blocks[1], type(vit().blocks[1]))
    for copied in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert tokens_read(copied) == 1
        assert torch.equal(copied(x), narrow(x))
        assert torch.equal(copied.forward_features(x), narrow.forward_features(x))
    vimoe.set_reading(narrow)  # twice is once
    assert len(narrow._forward_pre_hooks) == len(narrow._forward_hooks) == 1
    vimoe.set_reading(narrow, "all")
    assert not narrow._forward_pre_hooks and not narrow._forward_hooks
    assert [type(m) for m in narrow.modules()] == [type(m) for m in whole.modules()]


@pytest.mark.parametrize("read", ["auto", "all"])
def test_upcycle_and_load_read_what_they_are_told(read: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = vimoe.upcycle(vit(), config(), read=read)
    expected = {"auto": 1, "all": None}[read]
    assert tokens_read(model) == expected
    assert tokens_read(vimoe.load(vimoe.save(model, tmp_path / "model"), read=read)) == expected
    assert (vimoe.plan(vit(), config(), read=read).moe.computed_macs < vimoe.plan(vit(), config()).moe.macs) == (
        read == "auto"
    )


def test_an_unknown_reading_is_refused() -> None:
    with pytest.raises(ConfigError, match="read='some': expected 'auto' or 'all'"):
        vimoe.set_reading(vit(), "some")


@pytest.mark.parametrize("read", ["auto", "all"])
def test_an_upcycling_that_fails_leaves_the_reading_as_it_was(read: str) -> None:
    model = vimoe.set_reading(vit(), read)
    before = [type(m) for m in model.modules()], tokens_read(model)
    with pytest.raises(vimoe.VimoeError, match="expected at most"):
        vimoe.upcycle(model, config(layers="last:9"), read="all" if read == "auto" else "auto")
    assert ([type(m) for m in model.modules()], tokens_read(model)) == before


# ---- what is routed


def test_records_and_losses_are_of_the_tokens_that_are_read() -> None:
    whole, narrow = vimoes("deit, distilled", "token")
    x = inputs(whole)
    for model, tokens in ((whole, 6), (narrow, 2)):
        with vimoe.record(model) as routings:
            model(x)
        assert [routing.batch for routing in routings] == [(3, 6), (3, tokens)]
        last = routings[1]
    layer = moe_layers(narrow)["blocks.1.mlp"]
    assert last.logits.shape == (6, layer.config.num_experts)
    assert find_backbone(narrow).read_tokens == 2
