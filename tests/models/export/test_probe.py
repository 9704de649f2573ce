"""Images that reach every expert: given, random, or sought; without those whose routes rounding could change."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import images, layers, perturb_experts, vit
from torch import nn

import vimoe
from vimoe.models.export import probe as module
from vimoe.models.export.probe import RANDOM, ROUNDING, probe


def model(routing: str = "image", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = vimoe.MoEConfig(layers="all", num_experts=4, routing=routing, **settings)
    return perturb_experts(vimoe.upcycle(vit(), config)).eval().requires_grad_(False)


def reached(network: nn.Module, x: torch.Tensor) -> list[set[int]]:
    with torch.no_grad(), vimoe.record(network) as routings:
        network(x)
    return [set(routing.chosen.any(dim=0).nonzero().flatten().tolist()) for routing in routings]


@pytest.mark.parametrize("routing", ["image", "token"])
def test_every_expert_is_reached_although_random_images_do_not(routing: str) -> None:
    network = model(routing)
    for layer in layers(network):
        layer.router.weight[3] = 0.9 * layer.router.weight[0]  # it wins where all scores are low
    x = images(network, RANDOM)
    found = probe(network, x[:2])
    assert reached(network, found.images) == [{0, 1, 2, 3}] * 2 and found.unreached == {}
    assert torch.equal(found.images[:2], x[:2]) and len(found.images) > RANDOM + 2


def test_an_expert_that_nothing_can_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model(bias_update_rate=0.1)
    layers(network)[1].router.choice_bias[2] = -10
    monkeypatch.setattr(module, "STEPS", 2)
    assert probe(network).unreached == {"blocks.1.mlp": [2]}


def test_scores_that_no_image_changes_end_the_search() -> None:
    network = model("token", router="hash")
    layers(network)[1].router.weight[2] = -torch.inf
    assert 2 in probe(network).unreached["blocks.1.mlp"]


def test_images_whose_routes_rounding_changes_are_left_out() -> None:
    network, x = model(), images(model(), 3)
    with torch.no_grad(), vimoe.record(network) as routings:
        network(x)
    router, logits = layers(network)[0].router, routings[0].logits
    best, second = logits[1].topk(2).indices.tolist()
    decide = router.decide
    tied = logits[1].clone()
    tied[second] = tied[best] - ROUNDING / 1e4

    def with_a_tie(scores: torch.Tensor, batch: tuple[int, int]) -> vimoe.Routing:
        near = (scores - logits[1]).abs().amax(dim=1) < 1e-3
        return decide(torch.where(near[:, None], scores - logits[1] + tied, scores), batch)

    router.decide = with_a_tie
    found = probe(network, x).images
    assert torch.equal(found[:2], x[[0, 2]])


def test_images_are_kept_where_rounding_changes_all_of_them() -> None:
    network = model()
    for layer in layers(network):
        layer.router.weight.zero_()
    assert len(probe(network).images) >= RANDOM
