"""The family "transformers": surgery on a tiny model of every architecture, language models, building and saving."""

from __future__ import annotations

import copy
import itertools
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.pickles import PICKLE
from helpers.slow import one_in
from helpers.tiny import config, layers, perturb_experts, randomise, upcycle
from helpers.tiny_transformers import ENCODER, INPUTS, OTHERS, TEXT, VITS, tiny, vit
from torch import Tensor, nn

import vimoe
from vimoe.config.model import ModelConfig
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, FolderError, SurgeryError, VimoeError
from vimoe.models import transformers_files, transformers_vit
from vimoe.models.create import create, create_without_weights
from vimoe.models.frozen_trunk import cut_before
from vimoe.models.interface import find_backbone, logits_of
from vimoe.models.segmenter import Segmenter
from vimoe.models.upcycling import sites
from vimoe.moe import ffn, traced_ffn
from vimoe.moe.experts import Experts
from vimoe.training.parameter_groups import parameter_groups

transformers = pytest.importorskip("transformers")

LM = {name: each for name, each in OTHERS.items() if each[3] == "words" and not name.startswith("bert")}


def images(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, *find_backbone(model).input_size, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """All that a model gives, flat; ViT-MAE masks the same patches on every call."""
    torch.manual_seed(3)
    found = model(*args, **kwargs)
    return torch.cat([each.flatten() for each in found.to_tuple() if isinstance(each, Tensor)])


def gradients(model: nn.Module, *args: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, *args).sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.numel()}


def last_matrix(module: nn.Module) -> Tensor:
    """Gradient of the last matrix of experts, or of an FFN."""
    name = "fc2" if isinstance(module, Experts) else ffn.kind_of(module).fc2
    return module.get_submodule(name).weight.grad


def test_no_architecture_is_missing() -> None:
    """Those that the family promises; each is a class of its own."""
    promised = {
        "vit",
        "deit",
        "beit",
        "dinov2",
        "dinov3",
        "clip",
        "siglip",
        "siglip2",
        "mae",
        "swin",
        "data2vec",
        "sam",
    }
    assert promised <= {name.partition(",")[0] for name in (*VITS, *OTHERS)}


@pytest.mark.parametrize(("name", "routing"), one_in(3, itertools.product(VITS, ["image", "token"])))
def test_upcycled_it_computes_what_it_did_and_densified_it_is_what_it_was(name: str, routing: str) -> None:
    parent = vit(name)
    x = images(parent)
    expected = output(parent, x).detach()
    model = upcycle(copy.deepcopy(parent), config(routing=routing))
    assert type(model) is type(parent) and len(layers(model)) == len(find_backbone(model).blocks) >= 2
    torch.testing.assert_close(output(model, x), expected, rtol=1e-4, atol=1e-5)
    before, after = gradients(parent, x), gradients(model, x)
    kept = [key for key in before if key in after]
    assert len(kept) > 10
    for key in kept:  # all but FFNs: attention, embeddings, norms, head
        torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-5 * float(before[key].abs().max() + 1))
    with vimoe.record(model) as routes:
        output(model, x)
    for i, (layer, route, site) in enumerate(zip(layers(model), routes, sites(parent), strict=True)):
        experts, shared, dense = (last_matrix(each) for each in (layer.experts, layer.shared, site.module))
        torch.testing.assert_close(experts.sum(dim=0) + shared, dense, rtol=1e-3, atol=1e-5)
        trained, chosen = experts.flatten(1).any(dim=1), route.experts.flatten().bincount(minlength=4) > 0
        assert not (trained & ~chosen).any()
        assert i or torch.equal(trained, chosen)  # of the last block a head may read the class token alone
    perturb_experts(model)
    assert (output(model, x) - expected).abs().max() > 0.01
    dense = vimoe.densify(model)
    assert all(torch.equal(dense.state_dict()[key], w) for key, w in parent.state_dict().items())
    assert [*dense.state_dict()] == [*parent.state_dict()] and torch.equal(output(dense, x), expected)
    assert [type(module) for module in dense.modules()] == [type(module) for module in parent.modules()]


@torch.no_grad()
def test_a_split_ffn_is_widened_merged_planned_and_counted() -> None:
    parent = vit("data2vec, split")
    x = images(parent)
    plan = vimoe.plan(parent, config(layers="last:1"))
    assert [site.name for site in plan.sites] == ["data2vec_vision.encoder.layer.1.intermediate"]
    assert plan.dense == vimoe.count(parent) and plan.moe == vimoe.count(
        upcycle(copy.deepcopy(parent), config(layers="last:1"))
    )
    for settings in ({"num_experts": 0, "num_shared_experts": 2}, {"num_shared_experts": 2}):
        wide = upcycle(copy.deepcopy(parent), config(**settings))
        torch.testing.assert_close(output(wide, x), output(parent, x), rtol=1e-4, atol=1e-5)
    merged = vimoe.densify(upcycle(copy.deepcopy(parent), config()), how="merge")
    assert all(torch.equal(merged.state_dict()[key], w) for key, w in parent.state_dict().items())


@pytest.mark.parametrize(
    ("made", "prefix"),
    [
        (("Aimv2VisionModel", "Aimv2VisionConfig"), 0),  # its pool holds a class token, its blocks get none
        (("BlipVisionModel", "BlipVisionConfig"), 1),  # its config says no number of channels
        (("IJepaModel", "IJepaConfig"), 0),
    ],
)
@torch.no_grad()
def test_tokens_before_the_patches_are_those_that_the_blocks_get(made: tuple[str, str], prefix: int) -> None:
    parent = tiny(*made, ENCODER)
    x = images(parent)
    assert find_backbone(parent).layout.num_prefix_tokens == prefix
    torch.testing.assert_close(output(upcycle(copy.deepcopy(parent), config()), x), output(parent, x))


def test_a_split_ffn_with_an_adapter_is_refused() -> None:
    parent = vit("data2vec, split")
    block = parent.data2vec_vision.encoder.layer[1]
    block.output.dense.register_parameter("lora", nn.Parameter(torch.zeros(1)))
    with pytest.raises(SurgeryError, match=r"layer\.1\.intermediate \(block 1\): it has the parameter"):
        upcycle(parent, config())


@pytest.mark.parametrize("name", one_in(2, ["dinov2, registers", "clip, classifier", "mae", "data2vec, split", "sam"]))
@torch.no_grad()
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    parent = vit(name)
    sparse = perturb_experts(upcycle(copy.deepcopy(parent), config()))
    wide = upcycle(copy.deepcopy(parent), config(num_experts=0, num_shared_experts=2))
    for place, each in {"dense": parent, "sparse": sparse, "wide": wide}.items():
        again = vimoe.load(vimoe.save(each, tmp_path / place))
        assert type(again) is type(each) and torch.equal(output(again, images(each)), output(each, images(each)))
        assert len(layers(again)) == len(layers(each))


# ----- other models of transformers


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_tokens_of_other_models_are_routed_one_by_one(name: str) -> None:
    *made, kind = OTHERS[name]
    parent = tiny(*made)
    torch.manual_seed(1)
    x = INPUTS[kind]()
    model = upcycle(copy.deepcopy(parent), config(routing="token"))
    assert len(layers(model)) >= 2
    torch.testing.assert_close(output(model, **x), output(parent, **x), rtol=1e-4, atol=1e-5)
    perturb_experts(model)
    assert (output(model, **x) - output(parent, **x)).abs().max() > 0.01
    assert torch.equal(output(vimoe.densify(model), **x), output(parent, **x))


@pytest.mark.parametrize("name", OTHERS)
def test_images_of_other_models_are_not_routed(name: str) -> None:
    *made, _ = OTHERS[name]
    with pytest.raises(SurgeryError, match=f"{made[0]} gets .*routing='token'") as error:
        upcycle(tiny(*made), config())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OTHERS)
def test_what_needs_images_is_refused_in_its_own_words(name: str, tmp_path: Path) -> None:
    """The remedy of layers that route whole images would be none: the settings route tokens already."""
    *made, _ = OTHERS[name]
    model = upcycle(tiny(*made), config(routing="token"))
    for ask in (lambda: vimoe.count(model), lambda: vimoe.save(model, tmp_path / "saved")):
        with pytest.raises(SurgeryError, match=f"{made[0]} gets .*plan, count and save expect .* one size") as error:
            ask()
        assert "\n" not in str(error.value) and "routing" not in str(error.value)


def test_a_model_that_asks_for_more_than_images_is_refused_in_one_line(tmp_path: Path) -> None:
    blip = tiny("BlipForConditionalGeneration", "BlipConfig", {"vision_config": ENCODER, "text_config": TEXT})
    settings = config(layers="vision_model.*mlp*", routing="token")
    for call in (
        lambda: vimoe.count(blip),
        lambda: vimoe.plan(blip, settings),
        lambda: vimoe.upcycle(blip, settings),
        lambda: vimoe.save(blip, tmp_path / "m"),
    ):
        with pytest.raises(VimoeError, match="does not run on images") as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_routers_that_look_at_later_words_are_refused() -> None:
    with pytest.raises(SurgeryError, match="router='expert_choice' compares the tokens.*LlamaForCausalLM is not known"):
        upcycle(tiny(*OTHERS["llama"][:3]), config(routing="token", router="expert_choice"))


def test_layers_of_a_tower_are_named_by_patterns() -> None:
    model = tiny(*OTHERS["clip, both towers"][:3])
    upcycle(model, config(routing="token", layers="vision_model.*.1.mlp"))
    upcycle(model.text_model, config(routing="token", layers="last:1"))
    names = [name for name, module in model.named_modules() if isinstance(module, vimoe.MoE)]
    assert names == ["text_model.encoder.layers.0.mlp", "vision_model.encoder.layers.1.mlp"]


@pytest.mark.parametrize("settings", [{}, {"capacity_factor": 0.5}, {"groups": [1, 3]}], ids=str)
@torch.no_grad()
def test_a_clip_upcycled_in_both_towers_keeps_its_similarities(settings: dict) -> None:
    model, x = tiny(*OTHERS["clip, both towers"][:3]), INPUTS["pair"]()
    before = model(**x).logits_per_image
    upcycle(model.vision_model, config(routing="token", **settings))
    upcycle(model.text_model, config(routing="token"))
    assert len(layers(model)) == 3
    torch.testing.assert_close(model(**x).logits_per_image, before, rtol=1e-4, atol=1e-5)
    for tower in (model.vision_model, model.text_model):
        perturb_experts(tower)
        after = model(**x).logits_per_image
        assert (after - before).abs().max() > 1e-3
        before = after


# ----- models that no family describes


class Own(nn.Module):
    """A model of no family with two FFNs, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = timm.layers.Mlp(8, 16)
        self.many = nn.ModuleList([timm.layers.Mlp(8, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for each in self.many:
            x = x + each(x)
        return x


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 2, 2, 8), (5, 8)])
def test_tokens_of_named_modules_are_routed_without_a_family(shape: tuple[int, ...]) -> None:
    model, x = randomise(Own()).eval(), torch.randn(shape)
    before = model(x)
    upcycle(model, config(routing="token", layers=["many.*", "first"]))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert len(layers(model)) == 3 and model(x).shape == shape
    perturb_experts(model)
    assert (model(x) - before).abs().max() > 0.01
    assert torch.equal(vimoe.densify(model)(x), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "last:1"}, "no family knows Own: .* with routing='token' also name modules in layers"),
        ({"layers": [0]}, "no family knows Own"),
        ({"layers": "many.*", "routing": "image"}, "no family knows Own: .*'layout'"),
        ({"layers": "manny.0"}, "layers='manny.0' names no FFN: did you mean 'many.0'"),
        ({"layers": "many.*", "router": "soft"}, "router='soft' compares the tokens of an image, and Own"),
    ],
)
def test_what_needs_a_family_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        upcycle(Own(), config(**{"routing": "token", **settings}))


# ----- building by name


def folder(path: Path, name: str, **changes: object) -> str:
    vit(name, **changes).save_pretrained(path)
    return f"transformers:{path}"


def test_a_folder_is_built_with_its_weights_and_another_head(tmp_path: Path) -> None:
    name = folder(tmp_path, "dinov2, bare", image_size=32)
    parent = vit("dinov2, bare", image_size=32)
    model = create(ModelConfig(name=name, num_classes=5)).eval()
    assert type(model).__name__ == "Dinov2ForImageClassification" and find_backbone(model).num_classes == 5
    assert all(torch.equal(model.dinov2.state_dict()[key], w) for key, w in parent.state_dict().items())
    assert logits_of(model, images(model)).shape == (2, 5)
    small = create(ModelConfig(name=name, num_classes=5, img_size=16)).eval()
    x = torch.randn(2, 3, 16, 16)
    assert find_backbone(small).input_size == (3, 16, 16) and find_backbone(small).num_patches == 4
    torch.testing.assert_close(small.dinov2(x).last_hidden_state, parent(x).last_hidden_state)
    fresh = create(ModelConfig(name=name, pretrained=False, img_size=16, args={"num_hidden_layers": 1}))
    assert len(find_backbone(fresh).blocks) == 1 and find_backbone(fresh).input_size == (3, 16, 16)
    assert not torch.equal(fresh.dinov2.layernorm.weight, parent.layernorm.weight)
    empty = create_without_weights(ModelConfig(name=name, num_classes=4))
    assert all(p.is_meta for p in empty.parameters()) and vimoe.count(empty).params > 1000


@pytest.mark.parametrize("name", ["vit", "clip, classifier", "siglip, classifier", "deit"])
def test_position_embeddings_are_interpolated_as_the_model_does_it(name: str, tmp_path: Path) -> None:
    model = create(ModelConfig(name=folder(tmp_path, name), img_size=24)).eval()
    parent, x = vit(name), torch.randn(2, 3, 24, 24)
    assert find_backbone(model).input_size == (3, 24, 24)
    asked = {"interpolate_pos_encoding": True}
    torch.testing.assert_close(model(x).logits, parent(x, **asked).logits)


def test_another_size_keeps_the_type_and_the_attention_that_were_asked_for(tmp_path: Path) -> None:
    args = {"dtype": "bfloat16", "attn_implementation": "eager"}
    model = create(ModelConfig(name=folder(tmp_path, "vit"), img_size=24, args=args))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_rates_that_a_config_wants_whole_stay_whole(tmp_path: Path) -> None:
    stages = {"hidden_sizes": [16, 16, 16], "depths": [1, 1, 1], "image_size": 64, "num_labels": 3}
    levit = tiny("LevitForImageClassification", "LevitConfig", stages)
    assert find_backbone(levit).arguments["config"]["drop_path_rate"] == 0
    find_backbone(levit).build(**find_backbone(levit).arguments)
    levit.save_pretrained(tmp_path)
    assert create(ModelConfig(name=f"transformers:{tmp_path}")).config.drop_path_rate == 0


def test_stochastic_depth_belongs_to_a_training(tmp_path: Path) -> None:
    name = folder(tmp_path / "m", "dinov2", drop_path_rate=0.1)
    assert create(ModelConfig(name=name)).config.drop_path_rate == 0
    model = create(ModelConfig(name=name, drop_path_rate=0.3))
    assert model.config.drop_path_rate == 0.3
    assert vimoe.load(vimoe.save(model, tmp_path / "saved")).config.drop_path_rate == 0


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
            {"crop_pct": 0.8, "crop_mode": "center", "interpolation": "bicubic"},
        ),
        (
            ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}),
            {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)},
        ),
        (("ViTImageProcessor", {"do_normalize": False}), {"mean": (0, 0, 0), "std": (1, 1, 1)}),
    ],
)
def test_preprocessing_is_that_of_the_image_processor(
    processor: tuple[str, dict[str, object]], expected: dict[str, object], tmp_path: Path
) -> None:
    name = folder(tmp_path, "dinov2", image_size=32)
    getattr(transformers, processor[0])(**processor[1]).save_pretrained(tmp_path)
    model = create(ModelConfig(name=name))
    found = find_backbone(model).data_config({})
    assert {key: found[key] for key in expected} == expected
    assert (
        found["input_size"] == find_backbone(model).input_size == ((3, 16, 16) if len(expected) > 2 else (3, 224, 224))
    )


def test_names_of_classes_come_from_the_config(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = vit("vit")
    model.config.id2label, model.config.label2id = names, {word: i for i, word in names.items()}
    model.save_pretrained(tmp_path / "m")
    name = f"transformers:{tmp_path / 'm'}"
    made = create(ModelConfig(name=name))
    assert find_backbone(made).label_names == ["cat", "dog", "eel"]
    assert find_backbone(vimoe.load(vimoe.save(made, tmp_path / "again"))).label_names == ["cat", "dog", "eel"]
    assert find_backbone(create(ModelConfig(name=name, num_classes=2))).label_names == ["0", "1"]


NAMES = {0: "cat", 1: "dog", 2: "eel"}


def named(name: str) -> nn.Module:
    """A model that a user built, whose config names its classes."""
    return vit(name, id2label=NAMES, label2id={word: i for i, word in NAMES.items()})


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip, classifier", "deit, two classifiers"])
def test_names_of_a_users_model_are_those_of_its_folder_and_of_what_is_loaded(tmp_path: Path, name: str) -> None:
    model = upcycle(named(name), config(layers="last:1"))
    assert find_backbone(model).label_names == ["cat", "dog", "eel"]
    path = vimoe.save(model, tmp_path / "m")
    assert json.loads((path / "config.json").read_text())["label_names"] == ["cat", "dog", "eel"]
    again = vimoe.load(path)
    assert again.config.id2label == NAMES and again.config.label2id["eel"] == 2
    renamed = vimoe.load(vimoe.save(again, tmp_path / "other", label_names=["a", "b", "c"]))
    assert renamed.config.id2label == {0: "a", 1: "b", 2: "c"} and find_backbone(renamed).label_names == list("abc")
    vimoe.densify(renamed).save_pretrained(tmp_path / "theirs")  # a dense folder, for who has transformers alone
    theirs = type(model).from_pretrained(tmp_path / "theirs")
    assert theirs.config.label2id == {"a": 0, "b": 1, "c": 2}
    torch.testing.assert_close(logits_of(theirs, images(theirs)), logits_of(renamed, images(renamed)))


def test_names_that_a_user_writes_into_a_config_later_are_those_of_the_model(tmp_path: Path) -> None:
    model = vimoe.load(vimoe.save(named("dinov2"), tmp_path / "m"))
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    assert find_backbone(vimoe.load(vimoe.save(model, tmp_path / "again"))).label_names == ["x", "y", "z"]
    many = vit("vit", num_labels=12)
    many.config.id2label = {str(i): f"class {i}" for i in range(12)}  # as a JSON file has them
    assert find_backbone(many).label_names == [f"class {i}" for i in range(12)]


def test_what_save_pretrained_writes_of_a_vimoe_is_refused_by_name(tmp_path: Path) -> None:
    upcycle(vit("dinov2"), config()).save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="do not fit its config in dinov2.encoder.layer.0.mlp.fc1.bias"):
        create(ModelConfig(name=f"transformers:{tmp_path / 'm'}"))


def test_a_config_without_names_has_none() -> None:
    assert transformers_files.label_names(transformers.ViTConfig(id2label=None)) is None


def test_names_that_are_none_are_numbers(tmp_path: Path) -> None:
    assert find_backbone(vit("vit")).label_names == ["0", "1", "2"]
    bare = vit("vit, bare", id2label=NAMES, label2id={word: i for i, word in NAMES.items()})
    assert find_backbone(bare).label_names == []  # of a ViT without a classifier
    again = vimoe.load(vimoe.save(upcycle(vit("vit"), config()), tmp_path / "m"))
    assert again.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip, classifier"])
def test_outputs_are_those_of_an_image_classifier(tmp_path: Path, name: str) -> None:
    """By keywords, with logits, the loss where labels are given, and hidden states where they are asked for."""
    parent, labels = vit(name), torch.tensor([1, 0])
    model = vimoe.load(vimoe.save(upcycle(vit(name), config(routing="token")), tmp_path / "m"))
    given = {"pixel_values": images(parent), "labels": labels, "output_hidden_states": True}
    got, expected = model(**given), parent(**given)
    assert type(got) is type(expected) and type(model) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.values()
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, nn.functional.cross_entropy(got.logits, labels))
    assert len(got.keys()) == len(expected.keys()) and len(got.hidden_states) == len(expected.hidden_states)
    assert model(images(parent)).loss is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "transformers:./nowhere"}, "transformers:./nowhere': no model folder there"),
        ({"args": {"num_hiden_layers": 1}}, "no setting 'num_hiden_layers': did you mean 'num_hidden_layers'"),
        ({"args": {"hidden_size": 32}}, "do not fit its config in .*expected all but a classifier"),
        ({"drop_path_rate": 0.1}, "no setting 'drop_path_rate'"),
        ({"args": {"revision": "main"}}, "no setting 'revision'"),  # it would be that of the config alone
        ({"args": {"hidden_size": "wide"}}, "expected int, got str.*look at model.args"),
        ({"args": {"hidden_act": "gelux"}}, "KeyError: 'gelux'; look at model.args"),
        ({"args": {"num_attention_heads": 0}}, "ZeroDivisionError.*look at model.args"),
        (
            {"args": {"attn_implementation": "some/kernel"}},
            "names code .some/kernel., which vimoe never runs: expected a model",
        ),
    ],
)
def test_a_mistake_in_a_name_or_setting_is_one_line(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    values = {"name": folder(tmp_path, "vit"), **settings}
    with pytest.raises(ConfigError, match=message) as error:
        create(ModelConfig(**values))
    assert "\n" not in str(error.value)


def test_an_architecture_without_a_classifier_is_built_without_one(tmp_path: Path) -> None:
    name = folder(tmp_path, "dinov3")
    with pytest.raises(ConfigError, match="no image classifier of type 'dinov3_vit'"):
        create(ModelConfig(name=name, num_classes=3))
    assert find_backbone(create(ModelConfig(name=name), num_classes=0)).num_classes == 0


def test_weights_that_would_have_to_be_unpickled_are_refused(tmp_path: Path) -> None:
    name = folder(tmp_path, "vit")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(PICKLE)
    with pytest.raises(ConfigError, match="safetensors"):
        create(ModelConfig(name=name))


def write(path: Path, **values: object) -> None:
    """Add values to a file of JSON, or begin one."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"short", "SafetensorError: .*look at model.args and the files"),
        ("model.safetensors", PICKLE, "SafetensorError: "),
        ("config.json", {"image_size": "16"}, "Validation error for field 'image_size'"),
        ("config.json", {"_attn_implementation": "some/kernel"}, "names code .some/kernel."),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "could not build"),
        ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "a/b"}, "holds an adapter: expected"),
        ("preprocessor_config.json", b"{", "preprocessing of .* cannot be read .*correct or remove preprocessor_co"),
        ("preprocessor_config.json", b"[1]", "preprocessing of .* cannot be read"),
        ("preprocessor_config.json", {"image_processor_type": "Mine"}, "preprocessing of .* cannot be read"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "image_mean": 0.5},
            "preprocessing of .* cannot be read",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    file: str, content: bytes | dict[str, object], message: str, tmp_path: Path
) -> None:
    name = folder(tmp_path, "vit")
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        write(tmp_path / file, **content)
    with pytest.raises(ConfigError, match=message) as error:
        create(ModelConfig(name=name))
    assert "\n" not in str(error.value)


def test_an_index_of_safetensors_that_names_a_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    name = folder(tmp_path, "vit")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(PICKLE)
    write(tmp_path / "model.safetensors.index.json", metadata={}, weight_map={"classifier.bias": "pytorch_model.bin"})
    with pytest.raises(ConfigError, match="are in pytorch_model.bin: expected safetensors alone"):
        create(ModelConfig(name=name))


def test_weights_are_float32_in_whatever_type_they_are_stored(tmp_path: Path) -> None:
    for name in ("vit", "clip, classifier"):
        vit(name).half().save_pretrained(tmp_path / name)
        for settings in ({}, {"img_size": 24}, {"pretrained": False}):
            model = create(ModelConfig(name=f"transformers:{tmp_path / name}", **settings))
            assert {p.dtype for p in model.parameters()} == {torch.float32}
    asked = create(ModelConfig(name=f"transformers:{tmp_path / 'vit'}", args={"dtype": "float16"}))
    assert {p.dtype for p in asked.parameters()} == {torch.float16}


def changed(model: Path, **arguments: object) -> None:
    values = json.loads((model / "config.json").read_text())
    values["vimoe"]["arguments"] |= arguments
    (model / "config.json").write_text(json.dumps(values))


def test_a_model_folder_that_names_code_or_no_model_is_refused(tmp_path: Path) -> None:
    path = vimoe.save(upcycle(vit("vit"), config()), tmp_path / "m")
    config_of = json.loads((path / "config.json").read_text())["vimoe"]["arguments"]["config"]
    for arguments, message in (
        ({"class_name": "pipeline"}, "class_name='pipeline': expected a model of transformers"),
        ({"class_name": "os.system"}, "class_name='os.system': expected a model"),
        ({"class_name": "ViTModel"}, "does not fit"),
        ({"class_name": "ViTForImageClassification", "config": {**config_of, "auto_map": {"A": "b.C"}}}, "names code"),
        ({"config": {**config_of, "attn_implementation": "some/kernel"}}, "names code .some/kernel."),
        ({"config": {**config_of, "hidden_size": 24}}, "does not fit"),
        ({"config": {**config_of, "num_hidden_layers": "x"}}, "'num_hidden_layers' expected int, got str"),
        ({"config": {**config_of, "num_attention_heads": 0}}, "cannot build the backbone: .* by zero"),
        ({"config": {**config_of, "id2label": 5}}, "cannot build the backbone"),
        ({"config": {**config_of, "dtype": "float7"}}, "cannot build the backbone: .*float7"),
        ({"config": None}, "cannot build the backbone"),
        ({"config": config_of, "more": 1}, "unexpected keyword argument 'more'"),
    ):
        changed(path, **arguments)
        with pytest.raises(FolderError, match=message) as error:
            vimoe.load(path)
        assert "\n" not in str(error.value)


def test_a_config_that_names_a_model_elsewhere_is_refused_and_nobody_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_args: object, **_more: object) -> None:
        raise AssertionError("it looks on the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    monkeypatch.setattr(transformers.utils.hub, "cached_files", ask)
    path = vimoe.save(upcycle(vit("vit"), config()), tmp_path / "m")
    for inside in ({"backbone": "user/repo"}, {"depth_config": {"backbone": "user/repo"}}):
        changed(path, class_name="UperNetForSemanticSegmentation", config=inside)
        with pytest.raises(FolderError, match="the config names another model .'user/repo', 'backbone'"):
            vimoe.load(path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "upernet", "backbone": "user/repo"}')
    with pytest.raises(ConfigError, match="the config names another model .'user/repo', 'backbone'"):
        create(ModelConfig(name=f"transformers:{tmp_path / 'theirs'}"))


# ----- what training, segmentation and cached features ask


def test_rates_grow_with_depth_and_positions_do_not_decay() -> None:
    model = vit("swin", use_absolute_embeddings=True)
    depths = find_backbone(model).layer_numbers()
    assert depths["swin.encoder.layers.0.blocks.1.mlp.fc1.weight"] == 2
    assert depths["swin.encoder.layers.0.downsample.reduction.weight"] == 2
    assert depths["swin.encoder.layers.1.blocks.0.mlp.fc1.weight"] == 3
    assert depths["classifier.weight"] == depths["swin.layernorm.weight"] == 4
    assert find_backbone(model).no_weight_decay() >= {"swin.embeddings.position_embeddings"}
    for name, expected in (("clip", {"embeddings.class_embedding", "embeddings.position_embedding.weight"}),):
        assert find_backbone(vit(name)).no_weight_decay() == expected
    groups = parameter_groups(vit("vit"), TrainConfig(layer_decay=0.5))
    assert len({group["lr_scale"] for group in groups}) == 4  # stem, two blocks, head


@pytest.mark.parametrize("name", ["dinov2, bare", "dinov3", "beit", "data2vec, split, bare", "clip"])
@torch.no_grad()
def test_features_are_the_normalised_patch_tokens(name: str) -> None:
    model = vit(name, **({"num_labels": 0} if name == "beit" else {}))
    backbone, x = find_backbone(model), images(vit(name))
    (tokens,) = backbone.features(x, [1])
    assert tokens.shape == (2, 4, 16)
    if name != "beit" and name != "clip":
        hidden = model(x).last_hidden_state
        torch.testing.assert_close(tokens, hidden[:, backbone.layout.num_prefix_tokens :])
    segmenter = Segmenter(upcycle(model, config()), classes=3)
    assert segmenter(x).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", ["dinov2", "deit", "dinov3", "beit", "clip, classifier", "data2vec, split"])
def test_the_trunk_can_be_frozen(name: str) -> None:
    model = upcycle(vit(name), config(layers="last:1"))
    x = images(model, 3)
    cut = cut_before(model, [find_backbone(model).blocks[1] + ".mlp"], find_backbone(model).input_size)
    features = cut.trunk(model, x)
    torch.testing.assert_close(cut.rest(model, features), logits_of(model, x))
    assert features.shape[0] == 3


@torch.no_grad()
def test_a_grid_of_features_is_a_row_for_a_decoder() -> None:
    model = upcycle(vit("sam"), config())
    assert [each.shape for each in find_backbone(model).features(images(model), [0, 1])] == [(2, 16, 16)] * 2
    assert Segmenter(model, classes=3)(images(model)).shape == (2, 3, 16, 16)


def test_features_of_stages_are_not_cached() -> None:
    model = vit("swin")
    with pytest.raises(ConfigError, match="expected a ViT whose blocks pass on tokens alone"):
        cut_before(model, ["swin.encoder.layers.1.blocks.0.mlp"], find_backbone(model).input_size)


def test_it_is_not_imported_for_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would fail
    for module in (transformers_files, traced_ffn, transformers_vit):
        made = runpy.run_path(str(module.__file__))
    assert not made["TransformersViT"].owns(timm.create_model("test_vit"))
    with pytest.raises(ConfigError, match=r"not installed: pip install 'vimoe\[transformers\]'"):
        transformers_files.create("any/name", False, None, None, {})


# ----- one ViT in two libraries


def of_timm(vit: nn.Module) -> dict[str, Tensor]:
    """The weights of a DINOv2 ViT of timm by transformers' names, and a head on the class token."""
    renamed = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "norm": "layernorm",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer", "attn.proj":
        "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for key, w in vit.state_dict().items():
        for old, new in renamed.items():
            key = key.replace(old, new) if old != "norm" or key.startswith("norm.") else key
        if "attn.qkv" in key:
            for part, third in zip("qkv", w.chunk(3), strict=True):
                found[key.replace("attn.qkv", f"attention.{part}_proj")] = third
        elif not key.startswith("head"):
            found[key] = w
    return found


@pytest.mark.parametrize("weights", ["random", "pretrained"])
@torch.no_grad()
def test_it_computes_what_timm_does_before_and_after_upcycling(weights: str) -> None:
    """VIMOE_DINOV2 names a model folder of timm with a pretrained ViT-S/14 of DINOv2."""
    if weights == "random":
        arguments = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 28}
        theirs = randomise(timm.create_model("vit_small_patch14_dinov2", **arguments)).eval()
    else:
        if "VIMOE_DINOV2" not in os.environ:
            pytest.skip("VIMOE_DINOV2 names no folder")
        folder = os.environ["VIMOE_DINOV2"]
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=224, num_classes=5).eval()
        assert theirs.norm.weight.std() > 0.01  # it is 1 everywhere before any training
    depth, width, heads = len(theirs.blocks), theirs.embed_dim, theirs.blocks[0].attn.num_heads
    ours = transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=images(theirs).shape[-1],
            patch_size=14,
            num_labels=5,
        )  # fmt: skip
    ).eval()
    ours.dinov2.load_state_dict({**ours.dinov2.state_dict(), **of_timm(theirs)})
    ours.classifier.weight.zero_()[:, :width] = theirs.head.weight
    ours.classifier.bias.copy_(theirs.head.bias)
    x = images(theirs)
    expected, features = theirs(x), theirs.forward_features(x)
    for moe in (False, True):
        for model in (theirs, ours) if moe else ():
            upcycle(model, config(layers="last:2"))
        torch.testing.assert_close(logits_of(ours, x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.dinov2(x).last_hidden_state, features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)
    assert features.abs().max() > 1 and len(layers(ours)) == 2
