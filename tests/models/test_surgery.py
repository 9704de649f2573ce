"""Where surgery cuts: the layers that are named, all or none of them, and never what it cannot convert."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.tiny import config, images, layers, randomise, upcycle, vit
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

import vimoe
from vimoe.errors import SurgeryError
from vimoe.models.interface import find_backbone


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, vimoe.MoE)]


def mlps(*blocks: int) -> list[str]:
    return [f"blocks.{block}.mlp" for block in blocks]


# ----- which layers


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("none", []),
        ("all", mlps(0, 1, 2, 3, 4, 5)),
        ("last:1", mlps(5)),
        ("last:2", mlps(4, 5)),
        ("last:6", mlps(0, 1, 2, 3, 4, 5)),
        ("every:1", mlps(0, 1, 2, 3, 4, 5)),
        ("every:2", mlps(1, 3, 5)),
        ("every:4", mlps(3)),
        ([0, -1], mlps(0, 5)),
        ([-1, 0, 5], mlps(0, 5)),
        ([-6], mlps(0)),
        ("blocks.[24].mlp", mlps(2, 4)),
        ("blocks.3.mlp", mlps(3)),
        ([1, "blocks.[45].*"], mlps(1, 4, 5)),
    ],
    ids=str,
)
def test_layers_are_named_by_word_index_or_pattern(named: str | list, expected: list[str]) -> None:
    model = upcycle(vit(depth=6), config(layers=named))
    assert converted(model) == expected


def test_none_is_the_parent() -> None:
    parent = vit()
    model = upcycle(copy.deepcopy(parent), config(layers="none", num_experts=1))  # and there is nothing to warn of
    assert torch.equal(vimoe.set_reading(model, "all")(images(model)), parent(images(parent)))


def test_a_block_with_two_ffns_counts_once() -> None:
    model = upcycle(vit("parallel FFNs", depth=3), config(layers="last:1"))
    assert converted(model) == ["blocks.2.ffns.0.mlp", "blocks.2.ffns.1.mlp"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("last:3", "layers='last:3': expected at most 2"),
        ("every:3", "layers='every:3': expected at most 2"),
        ([2], "no block 2: expected -2 to 1"),
        ([-3], "no block -3: expected -2 to 1"),
        ("al", "layers='al' names no FFN: did you mean 'all'"),
        ("lasst", "names no FFN: did you mean 'last:N'"),
        ("0,1", r"layers='0,1' names no FFN: write a list: \[0, 1\]"),
        ("[blocks.0.mlp, blocks.1.mlp]", r"names no FFN: write a list: \[blocks.0.mlp, blocks.1.mlp\]"),
        ("block.1.mlp", "names no FFN: did you mean 'blocks.1.mlp'"),
        ([0, "blocks.7.mlp"], "'blocks.7.mlp' names no FFN: did you mean 'blocks.*.mlp'"),
    ],
    ids=str,
)
def test_a_name_without_a_layer_is_refused_with_the_nearest_one(named: str | list, message: str) -> None:
    assert_refused(vit(), message, layers=named)


@pytest.mark.parametrize("named", ["all", "none"])
def test_densify_that_would_do_nothing_is_refused(named: str) -> None:
    with pytest.raises(SurgeryError, match="has no MoE layer"):
        vimoe.densify(vit(), layers=named)


@pytest.mark.parametrize("named", ["last:x", "every:0", "first:1"])
def test_densify_refuses_words_that_a_config_would_refuse(named: str) -> None:
    model = upcycle(vit(), config())
    with pytest.raises(vimoe.VimoeError, match=named):
        vimoe.densify(model, layers=named)


# ----- all or nothing


def assert_refused(model: nn.Module, message: str, **settings: object) -> None:
    """Upcycling and planning raise the same error, and neither has changed the model."""
    before = dict(model.named_modules())
    for verb in (vimoe.upcycle, vimoe.plan):
        with pytest.raises(SurgeryError, match=message):
            verb(model, config(**settings))
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())


class Quantised(nn.Linear):
    """As the layers of quantisation libraries, a subclass that computes something else."""


class Adapted(nn.Module):
    """As the layers of adapter libraries, a wrapper of the matrix that is no nn.Linear."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_one_subclassed_matrix_refuses_the_whole_model_and_names_the_block() -> None:
    model = vit(depth=3)
    model.blocks[1].mlp.fc1 = Quantised(24, 96)
    assert_refused(model, r"blocks\.1\.mlp \(block 1\): fc1 is a Quantised: expected a plain nn.Linear")
    assert converted(upcycle(model, config(layers=[0, 2]))) == mlps(0, 2)


def test_one_adapted_matrix_refuses_the_whole_model_instead_of_being_passed_over() -> None:
    model = vit(depth=3)
    model.blocks[1].mlp.fc1 = Adapted(model.blocks[1].mlp.fc1)
    assert_refused(model, r"blocks\.1\.mlp \(block 1\): fc1 is a Adapted")


def test_blocks_are_those_of_the_vit_where_it_is_a_numbered_part_itself() -> None:
    model = vimoe.upcycle(nn.Sequential(nn.Identity(), vit(depth=4)), config(layers="last:1"))
    assert converted(model) == ["1.blocks.3.mlp"]
    assert find_backbone(model).block_of("1.blocks.3.mlp") == "1.blocks.3"


@pytest.mark.parametrize("part", ["mlp", "mlp.fc1", "mlp.act"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_experts_would_not_call_are_refused(part: str, hook: str) -> None:
    model = vit(depth=2)
    handle = getattr(model.blocks[1].get_submodule(part), hook)(lambda *args: None)
    for change in (vimoe.upcycle, vimoe.plan):
        with pytest.raises(SurgeryError, match=r"blocks\.1\.mlp \(block 1\) has forward hooks"):
            change(model, config(layers="all"))
    assert not converted(model)
    handle.remove()
    assert converted(vimoe.upcycle(model, config(layers="all"))) == mlps(0, 1)


def test_a_parametrised_matrix_is_refused() -> None:
    model = vit()
    nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc2)
    assert_refused(model, r"blocks\.1\.mlp \(block 1\): fc2 is a Parametrized")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"norm": nn.RMSNorm(96)}, "norm is a RMSNorm"),
        ({"norm": nn.LayerNorm(96, elementwise_affine=False)}, "norm has no weight"),
        ({"act": nn.PReLU()}, "it has the parameter act.weight .its activation is PReLU."),
    ],
    ids=["rms norm", "norm without weights", "trained activation"],
)
def test_a_part_that_experts_could_not_reproduce_is_refused(part: dict[str, nn.Module], message: str) -> None:
    model = vit()
    for name, module in part.items():
        setattr(model.blocks[0].mlp, name, module)
    assert_refused(model, rf"blocks\.0\.mlp \(block 0\): {message}")


def test_a_layer_that_is_moe_already_is_refused_and_others_are_not() -> None:
    model = upcycle(vit(depth=3), config(layers="last:1"))
    assert_refused(model, r"blocks\.2\.mlp \(block 2\) is an MoE layer already.*densify it first")
    assert converted(upcycle(model, config(layers=[0], routing="token"))) == mlps(0, 2)


def test_densify_refuses_a_dense_layer_by_name_and_changes_nothing() -> None:
    model = upcycle(vit(depth=3), config(layers="last:1"))
    with pytest.raises(SurgeryError, match=r"blocks\.1\.mlp \(block 1\) is a dense FFN already"):
        vimoe.densify(model, layers="last:2")
    assert converted(model) == mlps(2)
    assert converted(vimoe.densify(model, layers=[2])) == []


def test_densify_changes_the_named_layers_only() -> None:
    model = upcycle(vit(depth=3), config())
    assert converted(vimoe.densify(model, layers=[-2])) == mlps(0, 2)


@pytest.mark.parametrize("how", ["merg", ""])
def test_an_unknown_way_to_densify_is_refused(how: str) -> None:
    with pytest.raises(SurgeryError, match="expected 'shared' or 'merge'"):
        vimoe.densify(upcycle(vit(), config()), how=how)


def test_one_ffn_in_two_blocks_is_refused() -> None:
    model = vit(depth=3)
    model.blocks[2].mlp = model.blocks[0].mlp
    assert_refused(model, r"blocks\.2\.mlp is the same module as blocks\.0\.mlp.*untie")


def test_one_ffn_at_two_places_of_a_block_is_refused() -> None:
    model = vit()
    model.blocks[1].second_mlp = model.blocks[1].mlp
    assert_refused(model, r"blocks\.1\.second_mlp is the same module as blocks\.1\.mlp.*untie")


# ----- models that are no plain ViT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tnt_s_patch16_224", r"blocks\.0\.mlp_in \(block 0\) gets \(392, 16, 24\) for 2 images.*folds windows"),
        ("mobilevit_xxs", r"stages\.2\.1\.transformer\.0\.mlp \(block 0\) gets \(8, 256, 64\) for 2 images"),
        ("coat_tiny", r"parallel_blocks\.0\.mlp3 is the same module as parallel_blocks\.0\.mlp2.*untie"),
        ("levit_128s", r"stages\.0\.blocks\.0\.mlp is a LevitMlp, whose batch norms see all tokens"),
        ("pvt_v2_b0", r"stages\.0\.blocks\.0\.mlp is a MlpWithDepthwiseConv, whose convolutions see a token's neigh"),
        ("convnextv2_atto", r"GlobalResponseNormMlp, whose norm is over all tokens"),
        ("gmlp_ti16_224", r"blocks\.0\.mlp_channels is a GatedMlp, whose gate sees all tokens"),
        ("resnet18", "no FFN was found inside the model's blocks"),
    ],
)
@pytest.mark.parametrize("routing", ["image", "token"])
def test_other_models_are_refused_by_class_or_block(name: str, message: str, routing: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert_refused(model, message, layers="all", routing=routing)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("naflexvit_base_patch16_gap", "NaFlexVit pads its tokens"),
        ("crossvit_tiny_240", "CrossVit does not say which tokens are no patches"),
        ("tnt_s_patch16_224", "TNT does not say how many patches it makes"),
    ],
)
def test_image_routing_is_refused_by_block_where_no_one_knows_which_token_is_which(name: str, message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = "blocks.?.mlp" if name.startswith("tnt") else "all"
    assert_refused(
        model, rf"\.mlp \(block 0\) with image routing: {message}.*routing='token'", layers=blocks, routing="image"
    )
    assert converted(vimoe.upcycle(model, config(layers=blocks, routing="token")))


def test_a_model_without_ffns_is_not_refused_where_nothing_is_asked_for() -> None:
    with torch.device("meta"):
        model = timm.create_model("levit_128s")
    assert converted(vimoe.upcycle(model, config(layers="none"))) == []


def test_the_ffn_of_an_attention_pool_is_left_alone() -> None:
    model = upcycle(vit("siglip, attention pool"), config())
    assert type(model.attn_pool.mlp).__name__ == "Mlp"
    assert converted(model) == mlps(0, 1)


@pytest.mark.parametrize("heads", [2, 4])
def test_the_mlp_of_relative_positions_is_left_alone(heads: int) -> None:
    """It maps two coordinates to one bias for each head, so with two heads it is as square as an FFN."""
    arguments = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": heads}
    model = timm.create_model("vit_relpos_small_patch16_224", pretrained=False, **arguments)
    assert converted(upcycle(model, config())) == mlps(0, 1)


# ----- plan


def test_plan_changes_nothing_and_says_what_upcycle_would_do() -> None:
    model = vit(depth=3)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    plan = vimoe.plan(model, config(layers="last:2"))
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.dense == vimoe.count(model)
    assert plan.moe == vimoe.count(upcycle(model, config(layers="last:2")))
    text = str(plan)
    assert f"before: {plan.dense}" in text
    assert f"after:  {plan.moe}" in text
    assert [line.split(":")[0].strip() for line in text.splitlines()[2:]] == mlps(1, 2)


def test_hooks_of_the_user_see_no_tensors_without_values() -> None:
    model, seen = vit(), []
    model.blocks[0].register_forward_hook(lambda _module, _args, output: seen.append(output.sum().item()))
    vimoe.plan(model, config())
    vimoe.count(upcycle(model, config()))
    assert not seen
    model(images(model))
    assert len(seen) == 1


class ScaledNorm(nn.LayerNorm):
    """A norm that gets more than tokens."""

    def forward(self, x: Tensor, scale: float, *, shift: float = 0.0) -> Tensor:
        return super().forward(x) * scale + shift


class Called(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ScaledNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, 2.0, shift=1.0)


def test_norms_that_get_more_than_tokens_do_not_matter_to_shapes() -> None:
    parent = vit()
    for block in parent.blocks:
        block.norm2 = Called(24)
    x = images(parent)
    torch.testing.assert_close(upcycle(copy.deepcopy(parent), config())(x), parent(x))


def test_plan_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    model = vit()
    torch.manual_seed(0)
    vimoe.plan(model, config())
    assert torch.equal(torch.rand(3), expected)


def test_an_ffn_that_changes_the_number_of_channels_is_refused() -> None:
    model = vit()
    model.blocks[0].mlp = timm.layers.Mlp(24, 12, 20)
    assert_refused(model, r"blocks\.0\.mlp \(block 0\): it maps 24 channels to 20")


@torch.no_grad()
def test_stages_of_fewer_and_fewer_patches_are_converted_where_no_token_is_special() -> None:
    model = randomise(MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1, 1)), img_size=64)).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = model(x)
    with vimoe.record(upcycle(model, config())) as routing:
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert [each.tokens_per_unit for each in routing] == [256, 64, 16, 4]


class Fewer(nn.Module):
    """A block whose FFN gets some of the tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return x + self.mlp(x[:, :3]).mean(dim=1, keepdim=True)


def test_tokens_of_an_unknown_number_are_refused_to_image_routing() -> None:
    model = vit()
    model.blocks[1] = Fewer(model.blocks[1].mlp)
    message = r"blocks\.1\.mlp \(block 1\) with image routing: 3 tokens: expected 4 patches and 1 others"
    assert_refused(model, message, routing="image")


def test_plan_of_a_blind_router_is_silent_and_upcycle_warns() -> None:
    blind = config(num_experts=1)
    vimoe.plan(vit(), blind)
    with pytest.warns(UserWarning, match="num_experts=1.*never trains the router"):
        vimoe.upcycle(vit(), blind)


def test_experts_keep_the_device_and_mode_of_their_ffn() -> None:
    meta = upcycle(vit().to("meta").train(), config())
    assert all(p.is_meta for layer in layers(meta) for p in layer.parameters())
    assert all(module.training for module in meta.modules())
    assert not any(module.training for module in upcycle(vit().eval(), config()).modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_type_is_converted_and_counted_in_it(dtype: torch.dtype) -> None:
    model = upcycle(vit().to(dtype), config())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert vimoe.count(model) == vimoe.count(upcycle(vit(), config()))
    assert {p.dtype for p in vimoe.densify(model, how="merge").parameters()} == {dtype}


def test_a_vit_that_drops_patches_in_training_is_upcycled_while_it_trains() -> None:
    model = vit(patch_drop_rate=0.5).train()
    assert len(layers(upcycle(model, config()))) == 2 and model.training
