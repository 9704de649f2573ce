"""Calibration gives each new layer what the dense model computes there, and refuses images that do not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.segmenters import pictures, segmenter
from helpers.tiny import config, images, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.errors import VimoeError
from vimoe.models.calibration import TOKENS_OF_AN_IMAGE, _features, calibrate
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import Router

NAMES = ("blocks.0.mlp", "blocks.1.mlp")


def parent(**changes: object) -> nn.Module:
    """The same model on every call."""
    torch.manual_seed(0)
    return vit(**changes)


def routers(model: nn.Module, **settings: object) -> dict[str, Router]:
    """The routers of layers that the model does not have yet."""
    arguments = {"class_token": False, "global_pool": "avg"} if model.cls_token is None else {}
    return {n: layer.router for n, layer in moe_layers(upcycle(vit(**arguments), config(**settings))).items()}


def batches(model: nn.Module, sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, size, seed), torch.arange(size)) for seed, size in enumerate(sizes)]


def ffn_inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What each FFN gets in eval mode."""
    seen: list[Tensor] = []
    handles = [block.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for block in model.blocks]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("class_token", [True, False])
def test_image_routing_sees_what_its_router_will_read(class_token: bool) -> None:
    model = vit() if class_token else vit(class_token=False, global_pool="avg")
    given = batches(model)
    found = calibrate(model, routers(model), given)
    expected = ffn_inputs(model, torch.cat([x for x, _ in given]))
    assert tuple(found) == NAMES
    for name, x in zip(NAMES, expected, strict=True):
        read = x[:, 0] if class_token else x.mean(dim=1)
        torch.testing.assert_close(found[name].features, read)
        assert found[name].image.tolist() == [0, 1, 2, 3, 4] and found[name].labels.tolist() == [0, 1, 2, 0, 1]
        assert found[name].num_classes == 5
        torch.testing.assert_close(model.head(found[name].pooled), model(torch.cat([x for x, _ in given])))


def test_token_routing_sees_some_tokens_of_each_image_and_the_same_again() -> None:
    model = vit(img_size=80)  # 25 patches and a class token
    given = batches(model)
    first, again = (calibrate(model, routers(model, routing="token"), given) for _ in range(2))
    inputs = ffn_inputs(model, torch.cat([x for x, _ in given]))
    for name, x in zip(NAMES, inputs, strict=True):
        assert first[name].image.tolist() == [i for i in range(5) for _ in range(TOKENS_OF_AN_IMAGE)]
        distance = (first[name].features.view(5, TOKENS_OF_AN_IMAGE, 1, -1) - x[:, None]).abs().sum(dim=-1)
        assert distance.amin(dim=-1).max() < 1e-3  # each is a token of its image,
        places = distance.argmin(dim=-1)
        assert all(len(row.unique()) == TOKENS_OF_AN_IMAGE for row in places)  # none comes twice,
        assert not torch.equal(places[0], places[3])  # and a batch has not the places of another
        assert torch.equal(first[name].features, again[name].features)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_nothing_is_kept_of_tokens_that_are_not_read(routing: str) -> None:
    """Not even as the memory behind a view."""
    x = torch.randn(3, 26, 24)
    _, read = _features(routers(vit(), routing=routing)["blocks.0.mlp"], x, seen=0)
    assert read.untyped_storage().nbytes() == 4 * read.numel() < 4 * x.numel()
    assert read.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_an_image_of_few_tokens_gives_all_of_them() -> None:
    model = vit()  # 4 patches and a class token
    assert len(calibrate(model, routers(model, routing="token"), batches(model))["blocks.0.mlp"].features) == 5 * 5


def test_inputs_run_the_dense_model_again_as_often_as_asked() -> None:
    model = vit()
    given = batches(model)
    found = calibrate(model, routers(model), given)
    for name, x in zip(NAMES, ffn_inputs(model, torch.cat([x for x, _ in given])), strict=True):
        for _ in range(2):
            torch.testing.assert_close(torch.cat(list(found[name].inputs())), x)


def test_the_model_stays_as_it_was_and_computes_as_in_evaluation() -> None:
    model = parent(drop_path_rate=0.9, proj_drop_rate=0.9).train()
    model.blocks[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = calibrate(model, routers(model), batches(model))
    assert model.training and model.blocks[0].mlp.training and not model.blocks[1].mlp.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    expected = calibrate(parent(), routers(model), batches(model))
    torch.testing.assert_close(found["blocks.1.mlp"].features, expected["blocks.1.mlp"].features)


def test_masks_are_no_classes_and_a_segmenter_has_no_pooled_feature() -> None:
    model = segmenter(depth=2)
    names = [name for name, _ in model.named_modules() if name.endswith(".mlp")]
    masks = [(pictures(model), torch.zeros(2, *model.crop, dtype=torch.long))]
    found = calibrate(model, dict(zip(names, routers(vit(), num_experts=2).values(), strict=True)), masks)
    assert all(seen.labels is None and seen.pooled is None for seen in found.values())
    vimoe.upcycle(model, config(num_experts=2, router="centroids"), masks)
    assert len(moe_layers(model)) == 2


@pytest.mark.parametrize("targets", [None, ["cat", "dog"], [{"boxes": 1}, {}]], ids=str)
def test_targets_that_are_no_classes_are_not_read(targets: object) -> None:
    model = vit()
    images = [(x[:2], targets) for x, _ in batches(model, (2, 2))]
    vimoe.upcycle(model, config(router="centroids"), images)
    assert moe_layers(model)


def generator(given: list) -> Iterator:
    yield from given


MISTAKES: dict[str, tuple[Callable[[list], object], dict, str]] = {
    "an iterator": (generator, {}, "images=generator, which is read once: expected a list"),
    "images alone": (lambda given: [x for x, _ in given], {}, "images have a batch of type Tensor: expected"),
    "names for images": (lambda _: [(["a.jpg"], [0])], {}, "images is of type list, .*: expected Tensor; give batches"),
    "one image": (lambda given: [(given[0][0][0], 1)], {}, r"of shape \(3, .*: expected \(images, channels"),
    "no labels for classes": (
        lambda given: [(x, None) for x, _ in given], {"router": "superclass"}, "without a class",
    ),
    "nothing": (lambda _: [], {}, "0 images to start 4 experts"),
    "fewer images than experts": (lambda given: given[:1], {}, "3 images to start 4 experts .* at least as many"),
    "a class that is not there": (
        lambda given: [(x, y + 3) for x, y in given], {}, "labels from 3 to 5 for a model of 5 classes: expected 0",
    ),
    "labels of other images": (
        lambda given: [(x, y[:2]) for x, y in given], {}, "2 labels for a batch of 3 images: expected one for each",
    ),
    "masks for classes": (
        lambda given: [(x, torch.zeros(len(x), 4, 4, dtype=torch.long)) for x, _ in given], {"router": "superclass"},
        "router='superclass' without a class for each image: expected a classification",
    ),
    "a figure for a class": (
        lambda given: [(x, torch.rand(len(x))) for x, _ in given], {"router": "superclass"}, "without a class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_images_that_do_not_do_are_refused_and_the_model_is_as_it_was(what: str) -> None:
    change, settings, message = MISTAKES[what]
    model = vit()
    with pytest.raises(VimoeError, match=message) as raised:
        vimoe.upcycle(model, config(**{"router": "centroids", **settings}), change(batches(model)))
    assert "\n" not in str(raised.value)
    assert not moe_layers(model) and not any(module._forward_pre_hooks for module in model.modules())


def test_a_router_that_needs_images_asks_for_them() -> None:
    with pytest.raises(VimoeError, match="^router='centroids' is computed from training images: expected some; pass"):
        vimoe.upcycle(vit(), config(router="centroids"))


def test_a_plan_needs_no_images() -> None:
    assert "centroids router" in str(vimoe.plan(vit(), config(router="centroids")))


def test_a_router_of_the_last_block_sees_the_tokens_that_are_routed_there() -> None:
    """Experts may see more (`Calibration.inputs`), since class tokens alone are few."""
    model = vimoe.set_reading(vit())
    given = batches(model)
    expected = ffn_inputs(model, torch.cat([x for x, _ in given]))
    for router, rows in (("softmax", (25, 5)), ("expert_choice", (25, 25))):
        found = calibrate(model, routers(model, routing="token", router=router), given)
        assert tuple(len(each.features) for each in found.values()) == rows
        assert next(found["blocks.1.mlp"].inputs()).shape == (3, 5, 24)
        if rows[1] == 5:
            torch.testing.assert_close(found["blocks.1.mlp"].features, expected[1][:, 0])
