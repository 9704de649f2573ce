"""What every family answers, timm's against timm itself; modules around a ViT; models that no family knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.segmenters import segmenter
from helpers.tiny import FAMILIES as TIMM
from helpers.tiny import config, images, upcycle, vit
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import vimoe
from vimoe.analysis.partial_forward import PartialForward
from vimoe.config.model import FAMILIES, ModelConfig
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError, DataError, FolderError, SurgeryError, VimoeError
from vimoe.metrics.base import evaluate
from vimoe.models.create import create
from vimoe.models.frozen_trunk import Entry
from vimoe.models.interface import Backbone, find_backbone, label_names, logits_of
from vimoe.models.timm_vit import TimmViT
from vimoe.training.parameter_groups import parameter_groups

BLOCKS = ("blocks.0", "blocks.1")


class Around(nn.Module):
    """A user's module around a ViT, with a head of its own."""

    def __init__(self, inside: nn.Module, **says: object) -> None:
        super().__init__()
        self.inside, self.head = inside, nn.Linear(5, 4)
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x))


def test_every_entry_of_the_table_is_a_family() -> None:
    assert all(issubclass(FAMILIES.find(name), Backbone) for name in FAMILIES)
    assert FAMILIES.find("timm") is TimmViT
    assert ModelConfig(name="timm:vit_tiny_patch16_224").family == ("timm", "vit_tiny_patch16_224")
    assert ModelConfig(name="hf-hub:timm/x").family == ("timm", "hf-hub:timm/x")


@pytest.mark.parametrize("family", TIMM)
def test_a_vit_of_timm_is_described_as_it_is(family: str) -> None:
    model = vit(family)
    backbone = find_backbone(model)
    assert (backbone.family, backbone.path, backbone.blocks) == ("timm", "", BLOCKS)
    tokens: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _block, args: tokens.append(args[0]))
    logits = logits_of(model, images(model, 2))
    assert tokens[0].shape == (2, backbone.layout.num_prefix_tokens + backbone.num_patches, backbone.width)
    assert backbone.num_classes == logits.shape[1] == len(backbone.label_names) == 5
    channels, height, width = backbone.input_size
    assert (channels, height, width) == images(model)[0].shape
    assert (height // backbone.patch_size[0]) * (width // backbone.patch_size[1]) == backbone.num_patches
    assert Backbone.patch_size.fget(backbone) == backbone.patch_size  # what a family gets that does not say
    assert backbone.head() == {name for name, _ in model.named_parameters() if name.startswith("head")}


@pytest.mark.parametrize("family", ["vit", "deit, distilled", "dinov2, registers", "siglip, attention pool", "dinov3"])
@torch.no_grad()
def test_features_are_the_patches_that_blocks_give(family: str) -> None:
    """And a family that does not say how gets them as they leave the block; timm's are normalised after that."""
    model = vit(family, num_classes=0)
    backbone, x = find_backbone(model), images(vit(family))
    normalised = backbone.features(x, [0, 1])
    plain = Backbone.features(backbone, x, [0, 1])
    assert plain[0].shape == (3, backbone.num_patches, 24)
    for ours, theirs in zip(plain, normalised, strict=True):
        assert not torch.allclose(ours, theirs)
        torch.testing.assert_close(model.norm(ours), theirs)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", TIMM)
@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_layer_decay_is_timms_in_number_and_order(family: str, decay: float) -> None:
    model, settings = vit(family), TrainConfig(weight_decay=decay, layer_decay=0.5)
    expected = param_groups_layer_decay(model, decay, model.no_weight_decay(), layer_decay=0.5)
    assert len(expected) > 4
    for ours, theirs in zip(parameter_groups(model, settings), expected, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert (ours["weight_decay"], ours["lr_scale"]) == (theirs["weight_decay"], theirs["lr_scale"])


def test_a_module_around_a_vit_belongs_to_the_last_layer_and_to_the_head() -> None:
    alone, around = vit(), Around(vit())
    depths, inside = find_backbone(around).layer_numbers(), find_backbone(alone).layer_numbers()
    outside = {"head.weight", "head.bias"}
    assert {name.removeprefix("inside."): depths[name] for name in depths.keys() - outside} == inside
    assert {depths[name] for name in outside} == {inside["head.weight"]} == {3}
    assert find_backbone(around).head() == outside | {"inside.head.weight", "inside.head.bias"}
    assert find_backbone(around).no_weight_decay() == {"inside.cls_token", "inside.pos_embed"}
    around = find_backbone(segmenter(depth=2))
    decoder = around.layer_numbers()
    assert decoder["backbone.norm.weight"] == 2 and decoder["decoder.classifier.weight"] == 3
    assert {"decoder.classifier.weight", "decoder.norm.running_mean"} < around.head()


def test_the_outermost_vit_is_found_wherever_it_is() -> None:
    around = nn.Sequential(nn.Identity(), Around(vit()))
    backbone = find_backbone(around)
    assert backbone.path == "1.inside" and backbone.blocks == ("1.inside.blocks.0", "1.inside.blocks.1")
    assert backbone.block_of("1.inside.blocks.1.mlp") == "1.inside.blocks.1" and backbone.block_of("1.head") is None
    compiled = torch.compile(vit(), backend="eager")
    assert find_backbone(compiled).path == "_orig_mod" and find_backbone(compiled).num_classes == 5
    assert find_backbone(nn.DataParallel(vit())).path == "module"


def test_classes_are_those_that_the_outer_module_says() -> None:
    assert label_names(Around(vit())) == [str(i) for i in range(5)]
    assert label_names(Around(vit(), num_classes=4)) == [str(i) for i in range(4)]
    assert find_backbone(Around(vit(), read_blocks=[0])).read_blocks == (0,)
    assert find_backbone(segmenter(decoder="linear4")).read_blocks == (0, 1, 2, 3)


class Halved(VisionTransformer):
    """A user's ViT that is timm's but for its output."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"half": super().forward(x) / 2}


class HalvedFamily(TimmViT):
    models = (Halved,)
    owns = classmethod(Backbone.owns.__func__)

    def logits(self, output: dict[str, Tensor]) -> Tensor:
        return 2 * output["half"]


def halved() -> Halved:
    torch.manual_seed(0)
    return Halved(img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5).eval()


@torch.no_grad()
def test_an_output_that_is_no_tensor_is_read_by_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = halved(), images(vit())
    with pytest.raises(VimoeError, match="Halved gives a dict: expected a tensor of logits, or a family whose"):
        logits_of(model, x)
    monkeypatch.setitem(FAMILIES, "halved", HalvedFamily)
    assert find_backbone(model).family == "halved" and find_backbone(vit()).family == "timm"
    assert torch.equal(logits_of(model, x), VisionTransformer.forward(model, x))
    upcycle(model, config(layers=[1]))
    assert PartialForward.find(model, ["blocks.1.mlp"], Entry(x)).first == 1
    score = evaluate(model, [(x, torch.arange(3))])
    assert score.loss == pytest.approx(nn.functional.cross_entropy(logits_of(model, x), torch.arange(3)).item())


def test_an_entry_may_be_the_place_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "timm", "vimoe.models.timm_vit:TimmViT")
    assert type(find_backbone(vit())) is TimmViT


def test_a_vit_that_timms_factory_did_not_build_says_its_own_size() -> None:
    model = VisionTransformer(img_size=48, in_chans=1, embed_dim=24, depth=1, num_heads=2)
    assert find_backbone(model).input_size == (1, 48, 48)
    with pytest.raises(DataError, match="takes 1 channels: expected 3"):
        preprocessing(model)
    with pytest.raises(DataError, match=r"expected \(images, 1, height, width\)"):
        evaluate(model, [(torch.zeros(2, 3, 48, 48), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(DataError, match=r"expected \(48, 48\), the model's size"):
        evaluate(model, [(torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.long))])
    assert find_backbone(vit(dynamic_img_size=True)).fixed_size is None


def test_a_module_around_a_vit_is_not_saved_as_if_it_were_one(tmp_path: Any) -> None:
    with pytest.raises(FolderError, match="Around is a module around a ViT, .* save its part 'inside'"):
        vimoe.save(Around(vit(), num_classes=4), tmp_path / "m")
    assert not list(tmp_path.iterdir())


class Plain(nn.Module):
    """Blocks and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([vit().blocks[0]])


QUESTIONS = ("layout", "num_patches", "input_size", "patch_size", "classifiers", "num_classes", "arguments")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_no_family_answers_is_one_line(question: str) -> None:
    backbone = find_backbone(Plain())
    assert (backbone.family, backbone.blocks, backbone.block_of("blocks.0.mlp")) == (None, ("blocks.0",), "blocks.0")
    with pytest.raises(SurgeryError, match="no family knows Plain: expected a ViT of timm") as error:
        getattr(backbone, question)
    assert "\n" not in str(error.value)


def test_a_family_that_leaves_a_question_open_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "plain", type("PlainFamily", (Backbone,), {"models": (Plain,)}))
    with pytest.raises(
        SurgeryError, match="the family 'plain' does not answer 'input_size': expected it of PlainFamily"
    ):
        vimoe.upcycle(Plain(), config(layers="all"))
    with pytest.raises(ConfigError, match="PlainFamily builds no models by name"):
        create(ModelConfig(name="plain:x"))
    with pytest.raises(ConfigError, match="multiple values for keyword argument 'any_size'; look at model.args"):
        create(ModelConfig(name="plain:x", args={"any_size": True}))
