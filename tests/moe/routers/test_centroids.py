"""The router "centroids" sends images and tokens where a spherical k-means of the dense model's features puts them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import config, images, perturb_experts, vit
from torch import Tensor, nn

import vimoe
from vimoe.models.calibration import calibrate
from vimoe.moe.layer import moe_layers

BATCHES = 3


def parent() -> nn.Module:
    """The same dense model on every call."""
    torch.manual_seed(0)
    return vit()


def given(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(images(model, 8, seed), torch.zeros(8, dtype=torch.long)) for seed in range(BATCHES)]


def upcycled(routing: str = "image", **settings: object) -> nn.Module:
    model = parent()
    return vimoe.upcycle(model, config(router="centroids", routing=routing, **settings), given(model))


def without_mean(x: Tensor) -> Tensor:
    """Directions without what all have in common."""
    common = x.mean(dim=0) / x.mean(dim=0).norm()
    x = x - torch.outer(x @ common, common)
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_calibration_images_go_where_the_k_means_put_them(routing: str) -> None:
    """A k-means has ended where each vector is with the nearest centroid, and each centroid is its vectors' mean."""
    model = upcycled(routing)
    routers = {name: layer.router for name, layer in moe_layers(model).items()}
    seen = calibrate(vimoe.set_reading(parent()), routers, given(model))
    for name, router in routers.items():
        x, rows = seen[name].features.double(), router.weight.detach().double()
        cluster = (without_mean(x) @ rows.T).argmax(dim=1)
        sums = torch.stack([without_mean(x)[cluster == i].sum(dim=0) for i in range(4)])
        torch.testing.assert_close(rows, sums / sums.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
        assert len(cluster.unique()) == 4
        assert torch.equal(router.route(router.score(seen[name].features), (len(x), 1)).experts[:, 0], cluster)


def test_the_model_itself_sends_them_there_from_the_first_step() -> None:
    model = upcycled()
    seen = calibrate(parent(), {name: layer.router for name, layer in moe_layers(model).items()}, given(model))
    with torch.no_grad(), vimoe.record(model) as routings:
        model(torch.cat([x for x, _ in given(model)]))
    for routing in routings:
        rows = model.get_submodule(routing.layer).router.weight.detach()
        expected = (without_mean(seen[routing.layer].features) @ rows.T).argmax(dim=1)
        assert torch.equal(routing.experts[:, 0], expected) and len(expected.unique()) == 4


@pytest.mark.parametrize("routing", ["image", "token"])
def test_the_function_is_kept_and_a_seed_repeats_itself(routing: str) -> None:
    model, x = upcycled(routing), images(parent())
    with torch.no_grad():
        torch.testing.assert_close(model(x), parent()(x), rtol=1e-5, atol=1e-5)
    states = model.state_dict(), upcycled(routing).state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("routing", ["image", "token"])
def test_it_is_a_softmax_router_with_these_rows(routing: str) -> None:
    """The softmax router is compared with a naive loop in tests/moe/test_layer.py."""
    model = perturb_experts(upcycled(routing, top_k=2)).double()
    plain = vimoe.upcycle(vit(), config(routing=routing, top_k=2)).double()
    plain.load_state_dict(model.state_dict())
    x = images(model).double()
    outputs = [each(x) for each in (model, plain)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert all(layer.router.weight.grad.abs().max() > 0 for layer in moe_layers(model).values())


def test_it_is_saved_copied_cast_cut_and_made_dense(tmp_path: Path) -> None:
    model, x = perturb_experts(upcycled()), images(parent())
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(vimoe.load(vimoe.save(model, tmp_path / "model"))(x), expected)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).isfinite().all()
        layer = next(iter(moe_layers(model).values()))
        rows = layer.router.weight.clone()
        layer.keep_experts([3, 1])
        assert torch.equal(layer.router.weight, rows[[3, 1]])
        torch.testing.assert_close(vimoe.densify(model)(x), parent()(x), rtol=1e-5, atol=1e-5)


def test_features_that_are_all_alike_give_finite_rows() -> None:
    model = vit()
    same = [(images(model, 1).expand(6, -1, -1, -1), torch.zeros(6, dtype=torch.long))]
    model = vimoe.upcycle(model, config(router="centroids"), same)
    assert all(layer.router.weight.isfinite().all() for layer in moe_layers(model).values())


def test_what_all_images_share_decides_nothing() -> None:
    model = upcycled()
    seen = calibrate(parent(), {name: layer.router for name, layer in moe_layers(model).items()}, given(model))
    for name, layer in moe_layers(model).items():
        common = F.normalize(seen[name].features.mean(dim=0), dim=0)
        assert (layer.router.weight @ common).abs().max() < 1e-5
