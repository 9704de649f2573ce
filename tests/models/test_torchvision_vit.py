"""The family "torchvision": its ViTs and Swins through surgery, model folders, training, and their own weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers.commands import call, refused
from helpers.flops import macs
from helpers.reading import IN_FLOAT64, assert_same, inputs, pair
from helpers.round_trip import round_trip
from helpers.slow import one_in
from helpers.tiny import config, layers, perturb_experts, randomise
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

import vimoe
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, FolderError
from vimoe.experiments.train import run_training
from vimoe.models.create import create
from vimoe.models.interface import find_backbone
from vimoe.models.reading import tokens_read
from vimoe.models.segmenter import Segmenter
from vimoe.models.torchvision_vit import TorchvisionViT, _preprocessing
from vimoe.moe.router import TokenLayout

SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": [4, 4]}
BUILT: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48},
    "swin": SWIN,
    "swin_v2": SWIN,
}
SIDES = {"vit": 8, "swin": 32, "swin_v2": 32}
MLPS = {
    "vit": [f"encoder.layers.encoder_layer_{i}.mlp" for i in range(3)],
    "swin": ["features.1.0.mlp", "features.3.0.mlp", "features.3.1.mlp"],
}
MLPS["swin_v2"] = MLPS["swin"]


def dense(kind: str, num_classes: int = 5, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(TorchvisionViT.build(kind=kind, num_classes=num_classes, **{**BUILT[kind], **more}), 1, 0.3).eval()


def images(kind: str, batch: int = 3) -> Tensor:
    side = SIDES[kind]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=BUILT)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("routing", ["image", "token"])
def test_it_is_upcycled_saved_and_brought_back(kind: str, routing: str, tmp_path: Path) -> None:
    again, names = round_trip(dense(kind), images(kind), routing, tmp_path / "m")
    assert names == MLPS[kind] and find_backbone(again).family == "torchvision"


def test_the_family_answers_what_the_model_is(kind: str) -> None:
    model, x = dense(kind), images(kind)
    backbone, seen = find_backbone(model), []
    assert backbone.family == "torchvision" and backbone.num_classes == model(x).shape[1] == 5
    assert backbone.head() == {n for n, _ in model.named_parameters() if n.startswith("head")}
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in backbone.blocks)
    assert {backbone.block_of(name) for name in MLPS[kind]} <= set(backbone.blocks)
    model.get_submodule(backbone.blocks[0]).register_forward_pre_hook(lambda _block, args: seen.append(args[0]))
    model(x)
    if kind == "vit":
        assert backbone.layout == TokenLayout(1, True) and backbone.width == 24 and backbone.fixed_size == (8, 8)
        assert seen[0].shape == (3, 1 + backbone.num_patches, backbone.width)
        assert backbone.no_weight_decay() == {"class_token", "encoder.pos_embedding"}
    else:
        assert backbone.layout == TokenLayout(0, False) and backbone.width is None and backbone.fixed_size is None
        assert backbone.blocks == ("features.1.0", "features.2", "features.3.0", "features.3.1")
        assert any(name.endswith("logit_scale") for name in backbone.no_weight_decay()) == (kind == "swin_v2")
    assert TorchvisionViT.build(**backbone.arguments).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_classifier_that_the_user_replaced_counts_and_is_saved(tmp_path: Path, kind: str) -> None:
    model = dense(kind)
    part = model.heads if kind == "vit" else model
    part.head = nn.Linear(part.head.in_features, 3)
    vimoe.upcycle(model, config(routing="token"))
    assert find_backbone(model).num_classes == 3
    again = vimoe.load(vimoe.save(model, tmp_path / "m", label_names=["a", "b", "c"]))
    torch.testing.assert_close(again(images(kind)), model(images(kind)))
    if kind == "vit":  # the other way that people write it; its names are not those of a class of torchvision
        model.heads = nn.Linear(24, 2)
        assert find_backbone(model).num_classes == 2
        assert find_backbone(model).head() == {"heads.weight", "heads.bias"}
        with pytest.raises(FolderError, match="would not rebuild this model"):
            vimoe.save(model, tmp_path / "other")


def test_a_swin_of_another_width_of_ffns_says_so_when_it_is_saved(tmp_path: Path) -> None:
    model = dense("swin", mlp_ratio=2.0)
    with pytest.raises(FolderError, match="would not rebuild this model.*pass model_args"):
        vimoe.save(model, tmp_path / "m")
    vimoe.save(model, tmp_path / "m", model_args={"mlp_ratio": 2.0})


@torch.no_grad()
def test_a_vit_carries_a_decoder_and_a_swin_does_not(tmp_path: Path) -> None:
    model = Segmenter(dense("vit", num_classes=0), 3).eval()
    (maps,) = find_backbone(model.backbone).features(images("vit"), [2])
    tokens: list[Tensor] = []
    model.backbone.encoder.register_forward_hook(lambda _encoder, _args, output: tokens.append(output))
    model.backbone(images("vit"))
    torch.testing.assert_close(maps, tokens[0][:, 1:])
    again = vimoe.load(vimoe.save(vimoe.upcycle(model, config()), tmp_path / "m"))
    torch.testing.assert_close(again(images("vit")), model(images("vit")))
    with pytest.raises(ConfigError, match="SwinTransformer gives no feature maps"):
        Segmenter(dense("swin", num_classes=0), 3)


# ---- the last block, for the class token alone


def vimoes(routing: str) -> tuple[nn.Module, nn.Module]:
    """A ViMoE in float64 that computes everything, and one that computes what the head reads."""
    return pair(perturb_experts(vimoe.upcycle(dense("vit"), config(routing=routing, top_k=2))))


@pytest.mark.parametrize("routing", ["image", "token"])
def test_the_last_block_computes_the_class_token_alone(routing: str) -> None:
    for whole, narrow in (pair(dense("vit", dropout=0.0)), vimoes(routing)):
        x = inputs(whole)
        assert tokens_read(whole) is None and tokens_read(narrow) == 1
        assert_same(whole, narrow, x)
        assert_same(whole.train(), narrow.train(), x)
    assert [*narrow.state_dict()] == [*whole.state_dict()]
    dense_pair = pair(dense("vit"))
    assert macs(dense_pair[1].train(), x) < 0.9 * macs(dense_pair[0].train(), x)  # in eval torch has a path uncounted


@pytest.mark.parametrize(
    "place", ["encoder", "encoder.layers", "encoder.ln", f"encoder.layers.{MLPS['vit'][2].split('.')[2]}"]
)
def test_who_asks_for_patch_tokens_gets_them(place: str) -> None:
    whole, narrow = vimoes("image")
    x, seen = inputs(whole), []
    for model in (whole, narrow):
        with model.get_submodule(place).register_forward_hook(lambda _module, _args, y: seen.append(y.detach())):
            model(x)
    torch.testing.assert_close(*seen, **IN_FLOAT64)
    assert seen[1].shape == (3, 5, 24) and tokens_read(narrow) == 1
    features = [find_backbone(model).features(x, [2])[0] for model in (whole, narrow)]
    torch.testing.assert_close(*features, **IN_FLOAT64)
    torch.testing.assert_close(
        narrow.encoder(torch.ones(1, 5, 24).double()), whole.encoder(torch.ones(1, 5, 24).double())
    )


class Mean(torchvision.models.VisionTransformer):
    """A ViT of a user's own, whose head reads all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        return self.heads(self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)).mean(dim=1))


class Attention(nn.MultiheadAttention):
    """An attention of a user's own."""

    def forward(self, query: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, None]:
        return query.cumsum(dim=1), None


@pytest.mark.parametrize("part", ["ViT", "attention", "norm", "norm of the block"])
def test_what_is_not_known_gets_all_tokens(part: str) -> None:
    model, mixing = dense("vit"), nn.Sequential(nn.Flatten(), nn.LayerNorm(5 * 24), nn.Unflatten(1, (5, 24)))
    if part == "ViT":
        model.__class__ = Mean
    elif part == "attention":
        model.encoder.layers[-1].self_attention.__class__ = Attention
    elif part == "norm":
        model.encoder.ln = mixing
    else:
        model.encoder.layers[-1].ln_2 = mixing
    whole, narrow = pair(model)
    assert tokens_read(narrow) is None
    assert_same(whole, narrow, inputs(whole))


@pytest.mark.parametrize("patched", [EncoderBlock, nn.MultiheadAttention])
def test_a_class_with_a_forward_of_other_code_gets_all_tokens(
    patched: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, narrow = pair(dense("vit"))
    assert tokens_read(narrow) == 1
    monkeypatch.setattr(patched, "forward", lambda self, *args, **more: args[0])
    assert tokens_read(narrow) is None


def test_the_tokens_that_are_read_are_dropped_out_too() -> None:
    model = dense("vit")
    model.encoder.layers[-1].dropout.p = 1.0  # of all numbers, so that nothing is random
    whole, narrow = pair(model)
    assert_same(whole.train(), narrow.train(), inputs(whole))


@torch.no_grad()
def test_compiled_and_exported_it_gives_the_same() -> None:
    torch._dynamo.reset()
    whole, narrow = vimoes("token")
    x = inputs(whole)
    compiled = torch.compile(narrow, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), whole(x), **IN_FLOAT64)
    exported = torch.export.export(narrow, (x,)).module()
    torch.testing.assert_close(exported(x), whole(x), **IN_FLOAT64)
    assert macs(exported, x) < macs(whole.train(), x)


# ---- names and weights


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16", "swin_t", "swin_v2_b"])
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    for weights in torchvision.models.get_model_weights(name):
        found, theirs = _preprocessing(weights), weights.transforms()
        crop = found["input_size"][1]
        assert [crop] == theirs.crop_size and [math.floor(crop / found["crop_pct"])] == theirs.resize_size
        assert (list(found["mean"]), list(found["std"])) == (theirs.mean, theirs.std)
        assert found["interpolation"] == theirs.interpolation.value


SMALL_VIT = {"patch_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_b_32 small, so that a test need not build 88 million parameters."""

    def build(weights: None = None, **args: Any) -> nn.Module:
        return torchvision.models.VisionTransformer(**{**SMALL_VIT, **args})

    monkeypatch.setattr("vimoe.models.torchvision_vit.get_model_builder", lambda _name: build)


@pytest.mark.usefixtures("small")
def test_weights_of_torchvision_are_loaded_and_brought_to_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = torchvision.models.VisionTransformer(image_size=224, **SMALL_VIT)
    randomise(trained)
    weights = torchvision.models.ViT_B_32_Weights.DEFAULT
    state = trained.state_dict()

    def read(self: object, *, weights_only: bool, **_: object) -> dict[str, Tensor]:
        assert weights_only  # these files are pickles
        return dict(state)

    monkeypatch.setattr(type(weights), "get_state_dict", read)
    model = create(ModelConfig(name="torchvision:vit_b_32"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert find_backbone(model).label_names == weights.meta["categories"]
    other = create(ModelConfig(name="torchvision:vit_b_32", img_size=64, num_classes=7))
    found = other.state_dict()
    assert torch.equal(
        found["encoder.layers.encoder_layer_1.mlp.0.weight"], state["encoder.layers.encoder_layer_1.mlp.0.weight"]
    )
    assert found["encoder.pos_embedding"].shape == (1, 5, 24) and found["heads.head.weight"].shape == (7, 24)
    assert find_backbone(other).input_size == (3, 64, 64) and find_backbone(other).label_names[0] == "0"


@pytest.mark.usefixtures("small")
def test_what_is_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(self: object, **_: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ViT_B_32_Weights, "get_state_dict", no_network)
    for settings, message in (
        ({"name": "torchvision:vit_b_31"}, "no such ViT there; did you mean 'vit_b_32'"),
        ({"name": "torchvision:vit_b_32.IMAGENET1K_V2"}, "no such weights; did you mean 'IMAGENET1K_V1'"),
        (
            {"name": "torchvision:vit_b_32"},
            "weights of 'torchvision:vit_b_32' cannot be had.*no route to host.*pretrained",
        ),
        ({"name": "torchvision:vit_b_32", "drop_path_rate": 0.1}, "drop_path_rate=0.1 .* which has none: expected 0"),
        ({"name": "torchvision:vit_b_32", "img_size": 33}, "torchvision could not build 'vit_b_32'.*indivisible"),
        ({"name": "torchvision:vit_b_32", "args": {"depth": 3}}, "torchvision could not build .*'depth'"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            create(ModelConfig(**settings))
        assert "\n" not in str(error.value)


def test_stochastic_depth_rises_to_the_rate() -> None:
    with torch.device("meta"):
        model = create(ModelConfig(name="torchvision:swin_t", pretrained=False, drop_path_rate=0.11))
    rates = [module.stochastic_depth.p for module in model.modules() if hasattr(module, "stochastic_depth")]
    assert len(rates) == 12 and rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize("cache", one_in(2, ["features", "none"]))
@pytest.mark.usefixtures("small")
def test_it_is_trained_evaluated_analysed_and_pruned(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = Settings(
        model=ModelConfig(name="torchvision:vit_b_32", pretrained=False, img_size=64),
        moe=MoEConfig(layers="last:1", num_experts=4, routing="image"),
        data=DataConfig(path="digits", images_per_class=6, workers=0, cache=cache),
        train=TrainConfig(
            epochs=1, batch_size=20, lr=3e-3, warmup_epochs=0, hflip=0, min_crop=1, tensorboard=False,
            train_only="moe" if cache == "features" else "all",
        ),
    )  # fmt: skip
    summary = run_training(settings, tmp_path / "run")
    assert ("features" in summary and summary["features"]["before"] == MLPS["vit"][1].removesuffix(".mlp")) == (
        cache == "features"
    )
    found = call(capsys, "analyze", tmp_path / "run")
    assert [layer["name"] for layer in found["layers"]] == [MLPS["vit"][1]]
    call(capsys, "prune", tmp_path / "run", "--tolerance=99", "--out", tmp_path / "dense")
    assert not layers(vimoe.load(tmp_path / "dense" / "model"))


def test_the_command_line_plans_it(capsys: pytest.CaptureFixture[str]) -> None:
    planned = call(capsys, "plan", "--model.name=torchvision:swin_t", "--moe.layers=last:1", "--moe.routing=token")
    assert planned["moe"]["layers"] == ["features.7.1.mlp"]
    assert "did you mean 'swin_t'" in refused(capsys, "plan", "--model.name=torchvision:swint")
