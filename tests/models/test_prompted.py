"""The decoder "prompted": its formula, prompts that decide about masks, vectors from a file, other classes, SAM."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import pictures
from helpers.tiny import config, layers, perturb_experts, randomise, upcycle, vit
from safetensors.torch import save_file
from torch import Tensor, nn

import vimoe
from vimoe.config.model import ModelConfig
from vimoe.errors import ConfigError, FolderError
from vimoe.models.create import create_segmenter
from vimoe.models.interface import label_names
from vimoe.models.prompted import Prompted, read_prompts
from vimoe.models.segmenter import Segmenter
from vimoe.moe.layer import moe_layers

WIDTH = 6
KINDS = [(mlp, attention) for mlp in (True, False) for attention in ("none", "last", "levels")]


def vectors(classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(seed))


def prompted(classes: int = 3, **args: object) -> Segmenter:
    torch.manual_seed(0)
    backbone = vit(num_classes=0, depth=4, dynamic_img_size=True)
    model = Segmenter(backbone, classes, "prompted", decoder_args={"prompt_width": WIDTH, **args})
    model.decoder.set_prompts(vectors(classes))
    return randomise(model, seed=1, scale=0.3).eval()


def by_hand(decoder: Prompted, maps: list[Tensor], image: int, row: int, column: int) -> list[float]:
    """Scores of one patch, prompt by prompt, in float64."""

    def linear(module: nn.Module, x: Tensor) -> Tensor:
        return module.weight.double().flatten(1) @ x + module.bias.double()

    prompts = []
    for vector in decoder.prompts.double():
        x = vector / vector.square().mean().sqrt()
        if isinstance(decoder.to_prompts, nn.Linear):
            x = linear(decoder.to_prompts, x)
        else:
            x = linear(decoder.to_prompts[2], linear(decoder.to_prompts[0], x).clamp(min=0))
        prompts.append(x / x.norm())
    features = []
    for level, each in zip(decoder.levels, maps, strict=True):
        norm, x = level.norm, each[image, :, row, column].double()
        x = (x - norm.running_mean) / (norm.running_var.double() + norm.eps).sqrt() * norm.weight + norm.bias
        features.append(linear(level.project, x))
    mask = features[-1]
    for attend, x in zip(decoder.attention, features, strict=False):
        scores = torch.stack([x @ p for p in prompts]) / 16
        weights = scores.exp() / scores.exp().sum()
        read = sum(w * p for w, p in zip(weights, prompts, strict=True))
        mask = mask + linear(attend.join, torch.cat([x, read]))
    return [float(mask @ p) for p in prompts]


@pytest.mark.parametrize(("mlp", "attention"), KINDS)
@torch.no_grad()
def test_the_scores_are_those_of_the_formula(mlp: bool, attention: str) -> None:
    decoder = randomise(Prompted(5, 8, 3, WIDTH, mlp, attention), scale=0.3).eval()
    decoder.set_prompts(10 * vectors())
    assert decoder.blocks == ((1, 3, 5, 7) if attention == "levels" else (7,))
    assert len(decoder.attention) == {"none": 0, "last": 1, "levels": 4}[attention]
    for level in decoder.levels:
        level.norm.running_mean.normal_()
        level.norm.running_var.uniform_(0.5, 2)
    maps = [torch.randn(2, 5, 3, 4) for _ in decoder.blocks]
    got = decoder(maps)
    assert got.shape == (2, 3, 3, 4)
    for place in ((0, 0, 0), (1, 2, 3)):
        image, row, column = place
        assert got[image, :, row, column].tolist() == pytest.approx(by_hand(decoder, maps, *place), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("mlp", "attention"), KINDS)
@torch.no_grad()
def test_permuted_prompts_give_permuted_masks(mlp: bool, attention: str) -> None:
    model = prompted(prompt_mlp=mlp, prompt_attention=attention)
    x, order = pictures(model), [2, 0, 1]
    before = model(x)
    model.decoder.set_prompts(vectors()[order])
    torch.testing.assert_close(model(x), before[:, order], rtol=1e-4, atol=1e-5)
    assert (before[:, order] - before).abs().max() > 0.01


@torch.no_grad()
def test_a_mask_without_dense_attention_depends_on_its_own_prompt_alone() -> None:
    other = vectors()
    other[1] = vectors(seed=5)[1]
    changed = {}
    for attention in ("none", "last", "levels"):
        model = prompted(prompt_attention=attention)
        x, before = pictures(model), model(pictures(model))
        model.decoder.set_prompts(other)
        changed[attention] = (model(x) - before).abs().amax(dim=(0, 2, 3))
        assert changed[attention][1] > 0.01
    assert not changed["none"][[0, 2]].any()
    assert changed["last"][[0, 2]].any() and changed["levels"][[0, 2]].any()


@torch.no_grad()
def test_the_length_of_a_vector_does_not_matter() -> None:
    model = prompted()
    before = model(pictures(model))
    model.decoder.set_prompts(vectors() * torch.tensor([[7.0], [0.1], [2.0]]))
    torch.testing.assert_close(model(pictures(model)), before, rtol=1e-4, atol=1e-5)


def test_given_vectors_stay_and_learnt_ones_learn() -> None:
    given = prompted()
    assert "decoder.prompts" not in dict(given.named_parameters()) and "decoder.prompts" in given.state_dict()
    learnt = Segmenter(vit(num_classes=0, depth=4), 3, "prompted")
    assert learnt.decoder.prompts.shape == (3, 256) and learnt.decoder.prompts.requires_grad
    loss = F.cross_entropy(learnt(pictures(learnt)), torch.zeros(2, *learnt.crop, dtype=torch.int64))
    loss.backward()
    assert learnt.decoder.prompts.grad.any(dim=1).all()


@torch.no_grad()
def test_other_classes_take_the_place_of_those_it_learnt(tmp_path: Path) -> None:
    vimoe.save(prompted(), tmp_path / "trained", label_names=["sky", "road", "car"])
    model = vimoe.load(tmp_path / "trained")
    x = pictures(model)
    more = dict(zip(("sky", "road", "car", "bus"), (*vectors(), *vectors(1, seed=8)), strict=True))
    model.set_prompts(more, palette=[(0, 0, i) for i in range(4)])
    assert model(x).shape[1] == model.num_classes == 4 and label_names(model) == list(more) and len(model.palette) == 4
    none = prompted(prompt_attention="none")
    before = none(x)
    none.set_prompts(more)  # no other mask reads the new prompt
    torch.testing.assert_close(none(x)[:, :3], before)
    vimoe.save(model, tmp_path / "more")
    again = vimoe.load(tmp_path / "more")
    assert label_names(again) == list(more)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prompted().set_prompts({"a": torch.ones(4), "b": torch.ones(4)}), r"\(2, 4\): .* \(classes, 6"),
        (lambda: prompted().set_prompts({"a": torch.ones(WIDTH)}), "classes=1: expected 2 to 255"),
        (lambda: prompted().decoder.set_prompts(vectors() / 0), "expected finite ones"),
        (lambda: Segmenter(vit(num_classes=0), 3, "prompted"), "4 layers: .* got 2; use prompt_attention='last'"),
        (
            lambda: Segmenter(vit(num_classes=0, depth=4), 3, "prompted").set_prompts(dict(enumerate(vectors()))),
            "are learnt",
        ),
        (lambda: Segmenter(vit(num_classes=0), 3).set_prompts({}), "decoder='linear' takes no class vectors"),
        (lambda: ModelConfig(prompt_mlp=False), "prompt_mlp=False with model.decoder='linear': expected it with"),
        (lambda: ModelConfig(decoder="upernet", prompts="a"), "model.prompts='a' with model.decoder='upernet'"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_one_line(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_vectors_are_found_in_a_file_by_the_names_of_the_classes(tmp_path: Path) -> None:
    found = dict(zip(("sky", "road", "car"), vectors(), strict=True))
    path = str(tmp_path / "words.safetensors")
    save_file({**found, "bus": torch.ones(WIDTH)}, path)
    assert torch.equal(read_prompts(path, ["sky", "car"]), torch.stack([found["sky"], found["car"]]))
    with pytest.raises(ConfigError, match="no vector for the class 'raod': did you mean 'road'"):
        read_prompts(path, ["sky", "raod"])
    save_file({**found, "bus": torch.ones(WIDTH + 1)}, path)
    with pytest.raises(ConfigError, match=r"shapes \[\(6,\), \(7,\)\]: expected one \(width,\)"):
        read_prompts(path, ["sky", "bus"])
    with pytest.raises(FolderError, match="expected a whole safetensors file"):
        read_prompts(str(tmp_path / "absent"), ["sky"])


@torch.no_grad()
def test_one_is_created_from_settings(tmp_path: Path) -> None:
    args = {"depth": 4, "embed_dim": 24, "num_heads": 2}
    settings = ModelConfig(
        name="vit_tiny_patch16_224", pretrained=False, img_size=32, decoder="prompted", prompt_mlp=False,
        prompt_attention="last", args=args,
    )  # fmt: skip
    model = create_segmenter(settings, 3, "prompted", prompts=vectors()).eval()
    assert model.read_blocks == (3,) and isinstance(model.decoder.to_prompts, nn.Linear)
    assert torch.equal(model.decoder.prompts, vectors())
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert again.decoder_args == {"prompt_mlp": False, "prompt_attention": "last", "prompt_width": WIDTH}
    torch.testing.assert_close(again(pictures(again)), model(pictures(model)))


@pytest.mark.parametrize("routing", ["image", "token"])
@torch.no_grad()
def test_moe_layers_keep_its_function(routing: str) -> None:
    parent = prompted()
    model = upcycle(copy.deepcopy(parent), config(layers="last:2", routing=routing))
    assert len(layers(model)) == 2
    x, expected = pictures(parent), parent(pictures(parent))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (perturb_experts(copy.deepcopy(model))(x) - expected).abs().max() > 1e-3 * expected.abs().max()


SAM = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 8,
    "image_size": 32, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1, 3], "num_pos_feats": 4,
}  # fmt: skip


@pytest.mark.parametrize("routing", ["image", "token"])
@torch.no_grad()
def test_sams_vision_encoder_takes_experts_and_the_decoder(routing: str) -> None:
    """Attention of SAM is windowed, and windows (3) do not fill its grid (4); its FFNs get all patches of an image."""
    from transformers import SamVisionConfig, SamVisionModel

    parent = randomise(SamVisionModel(SamVisionConfig(**SAM)), scale=0.3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = upcycle(copy.deepcopy(parent), config(layers="all", routing=routing))
    assert list(moe_layers(model)) == [f"vision_encoder.layers.{i}.mlp" for i in range(4)]
    with vimoe.record(model) as record:
        got = model(x).last_hidden_state
    assert all((each.unit, each.batch) == (routing, (2, 16)) for each in record)  # images, not windows
    expected = parent(x).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    changed = perturb_experts(copy.deepcopy(model))(x).last_hidden_state
    assert (changed - expected).abs().max() > 1e-3 * expected.abs().max()
    segmenter = Segmenter(model, 3, "prompted").eval()
    assert segmenter.read_blocks == (0, 1, 2, 3) and segmenter(x).shape == (2, 3, 32, 32)


@torch.no_grad()
def test_the_whole_of_sam_gives_its_masks_with_experts_in_its_vision_encoder() -> None:
    from transformers import SamConfig, SamModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    parts = {
        "vision_config": SAM,
        "prompt_encoder_config": {"hidden_size": 8, "image_size": 32, "patch_size": 8},
        "mask_decoder_config": {**small, "iou_head_hidden_dim": 8},
    }
    parent = randomise(SamModel(SamConfig(**parts)), scale=0.3).eval()
    model = upcycle(copy.deepcopy(parent), config(layers="last:2"))
    assert list(moe_layers(model)) == ["vision_encoder.layers.2.mlp", "vision_encoder.layers.3.mlp"]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[[9.0, 20.0]]], [[[3.0, 30.0]]]])
    expected, got = (each(x, input_points=points).pred_masks for each in (parent, model))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    changed = perturb_experts(model)(x, input_points=points).pred_masks
    assert (changed - expected).abs().max() > 1e-2 * expected.abs().max()
