"""The start "cluster" against its formula: k-means of what routers read, and the SVD of W L by Cholesky."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import config, images, layers, randomise, vit
from torch import Tensor, nn

import vimoe
from vimoe.moe import ffn
from vimoe.moe.kmeans import spherical_kmeans
from vimoe.moe.starts.cluster import truncated

N = 3


def clustered(**settings: object) -> vimoe.MoEConfig:
    return config(**{"init": "cluster", "num_experts": N, "top_k": 1, **settings})


def batches(model: nn.Module, number: int = 40) -> list[tuple[Tensor, Tensor]]:
    x = images(model, number).to(next(model.parameters()).dtype)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(16)]


def inputs_of(model: nn.Module, name: str, given: list[tuple[Tensor, Tensor]]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    with torch.no_grad():
        for x, _ in given:
            model(x)
    handle.remove()
    return torch.cat(found)


def reduced(weight: Tensor, x: Tensor, energy: float) -> Tensor:
    """The reference: W' = U_r S_r V_r^T L^-1, for inputs (M, I)."""
    second = x.T @ x / len(x)
    low = torch.linalg.cholesky(second + 1e-6 * second.diagonal().mean() * torch.eye(len(second)))
    u, s, v = torch.linalg.svd(weight @ low, full_matrices=False)
    rank = next(r for r in range(1, len(s) + 1) if s[:r].square().sum() >= energy * s.square().sum())
    return u[:, :rank] @ s[:rank].diag() @ v[:rank] @ torch.linalg.inv(low)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("family", ["vit", "dinov3, SwiGLU"])
def test_each_expert_is_cut_to_what_its_cluster_needs(family: str, routing: str) -> None:
    parent = vit(family).double()
    given = batches(parent)
    model = vimoe.upcycle(copy.deepcopy(parent), clustered(routing=routing, cluster_energy=0.8), given)
    torch.set_default_dtype(torch.float64)
    try:
        for name, layer in zip(("blocks.0.mlp", "blocks.1.mlp"), layers(model), strict=True):
            dense, rows = parent.get_submodule(name), layer.router.weight.detach()
            x = inputs_of(parent, name, given)
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(N), rtol=1e-6, atol=1e-6)
            if routing == "image":
                read = (
                    x[:, 0]
                    if layer.router.layout.class_token
                    else x[:, layer.router.layout.num_prefix_tokens :].mean(1)
                )
                centroids, labels = spherical_kmeans(read.float(), N)
                torch.testing.assert_close(rows, centroids.double())
                assert torch.equal((read @ rows.T).argmax(1), labels)  # the router sends images to their clusters
                cluster = labels[:, None].expand(x.shape[:2])
            else:
                cluster = (F.normalize(x, dim=-1) @ rows.T).argmax(-1)
            weights = ffn.read(dense)
            kind = ffn.describe(dense)
            for e in range(N):
                own = x[cluster == e]
                hidden = ffn.hidden(kind, weights, own)
                halves = weights["fc1.weight"].chunk(1 + kind.gated)
                expected = {
                    "fc1.weight": torch.cat([reduced(half.detach(), own, 0.8) for half in halves]),
                    "fc2.weight": reduced(weights["fc2.weight"].detach(), hidden.detach(), 0.8),
                }
                for part, w in layer.experts.weights(e).items():
                    want = expected.get(part, weights[part])
                    torch.testing.assert_close(w.detach(), want.detach(), rtol=1e-4, atol=1e-4)
                    assert part not in expected or (w - weights[part]).abs().max() > 1e-2
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_rank_is_the_smallest_that_holds_the_energy() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(20, 12).double(), torch.randn(200, 12).double() * torch.arange(1, 13)
    moment = x.T @ x
    whole = (x @ weight.T).square().sum()
    for energy in (0.3, 0.6, 0.9, 0.99):
        cut = truncated(weight, moment, energy)
        rank = int(torch.linalg.matrix_rank(cut))
        assert (x @ cut.T).square().sum() >= (energy - 1e-6) * whole
        _, s, _ = torch.linalg.svd(weight @ torch.linalg.cholesky(moment))
        assert s[: rank - 1].square().sum() < energy * whole
    plain = truncated(weight, torch.zeros(12, 12), 0.9)  # of a cluster without tokens
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(plain))
    torch.testing.assert_close(plain, u[:, :rank] @ s[:rank].diag() @ v[:rank])


@pytest.mark.parametrize("family", ["vit", "inner norm", "dinov2, packed SwiGLU"])
@torch.no_grad()
def test_all_energy_gives_back_the_parent(family: str) -> None:
    parent = vit(family)
    model = vimoe.upcycle(copy.deepcopy(parent), clustered(cluster_energy=1.0), batches(parent, 8))
    for layer, block in zip(layers(model), parent.blocks, strict=True):
        for e in range(N):
            for name, w in ffn.read(block.mlp).items():
                torch.testing.assert_close(layer.experts.weights(e)[name], w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images(parent)), parent(images(parent)), rtol=1e-4, atol=1e-4)
    rows = layers(model)[0].router.weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(N))  # so it did start


@torch.no_grad()
def test_narrow_experts_are_cut_by_their_own_hidden_units() -> None:
    parent = vit()
    settings = clustered(expert_width=48, num_experts=4, cluster_energy=1.0, gate="choice", top_k=4)
    model = vimoe.upcycle(copy.deepcopy(parent), settings, batches(parent, 16))
    assert layers(model)[0].experts.kind.hidden == 48
    torch.testing.assert_close(model(images(parent)), parent(images(parent)), rtol=1e-4, atol=1e-4)


def test_it_trains_and_its_experts_differ() -> None:
    parent = randomise(vit())
    model = vimoe.upcycle(parent, clustered(top_k=2, routing="token"), batches(parent, 12))
    model(images(model)).square().sum().backward()
    first = layers(model)[0].experts.fc1.weight
    assert first.grad.isfinite().all() and not torch.allclose(first[0], first[1], atol=1e-3)


def test_too_few_images_are_refused_and_the_model_stays() -> None:
    model = vit()
    with pytest.raises(vimoe.VimoeError, match="2 images to start 3 experts or their router from"):
        vimoe.upcycle(model, clustered(), batches(model, 2))
    assert not layers(model)


def test_no_images_are_refused() -> None:
    with pytest.raises(vimoe.VimoeError, match="init='cluster'.*computed from training images"):
        vimoe.upcycle(vit(), clustered())
