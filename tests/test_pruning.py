"""Pruning removes what the evidence does not support, and the receipt says what that cost and saved."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_analysis import CLASSES, Known, loader
from tiny import config, images, layers, perturb_experts, upcycle, vit

import vimoe
from vimoe.analysis import Evidence, LayerEvidence
from vimoe.errors import VimoeError
from vimoe.evaluate import Score
from vimoe.pruning import receipts, verdicts


def evidence(*changes: float, shared: bool = True) -> Evidence:
    """For the layers of a tiny ViT with 4 experts, given what making them dense changes."""
    counts, mass = np.ones((5, 4), dtype=int), np.full(4, 0.25)
    made = [(change, None) if shared else (None, change) for change in changes]
    rows = [LayerEvidence(f"blocks.{i}.mlp", counts, mass, 0.0, 0.0, 0.5, *change) for i, change in enumerate(made)]
    return Evidence(tuple(rows), Score(0.5, 0.9, 1.0, 10), tuple("abcde"))


def test_what_matters_is_kept_and_what_does_not_goes() -> None:
    """Measured, not made up: the second layer of the known model specialises but does nothing."""
    model = Known()
    decided = vimoe.prune(model, vimoe.analyze(model, loader()))
    assert [verdict.keep for verdict in decided] == [True, False]
    assert isinstance(model.blocks[0]["mlp"], vimoe.MoE) and not isinstance(model.blocks[1]["mlp"], vimoe.MoE)
    x = torch.cat([x for x, _ in loader()])
    torch.testing.assert_close(model(x), Known()(x))
    assert x.shape[-1] == CLASSES


def test_the_tolerance_is_the_largest_change_that_a_removed_layer_may_have() -> None:
    kept = [[v.keep for v in verdicts(evidence(0.01, 0.011, -0.2), tolerance)] for tolerance in (0.01, 0.02, -1.0)]
    assert kept == [[False, True, False], [False, False, False], [True, True, True]]


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf")])
def test_a_tolerance_is_a_number(tolerance: float) -> None:
    with pytest.raises(VimoeError, match="expected a number of nats"):
        verdicts(evidence(5.0), tolerance)


def test_with_a_shared_expert_it_alone_remains() -> None:
    model = perturb_experts(upcycle(vit(), config()))
    expected = vimoe.densify(copy.deepcopy(model), layers=[1], how="shared")
    assert [str(v.how) for v in vimoe.prune(model, evidence(0.5, 0.0))] == ["shared", "shared"]
    assert len(layers(model)) == 1 and torch.equal(model(images(model)), expected(images(model)))


def test_without_one_experts_are_merged_by_their_gates() -> None:
    model = perturb_experts(upcycle(vit(), config(num_shared_experts=0, top_k=2)))
    found = evidence(0.0, 0.0, shared=False)
    mass = np.array([0.7, 0.3, 0.0, 0.0])
    found = replace(found, layers=(replace(found.layers[0], gate_mass=mass), found.layers[1]))
    weight = layers(model)[0].experts.fc1.weight.detach()
    vimoe.prune(model, found)
    assert not layers(model)
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight.detach(), 0.7 * weight[0] + 0.3 * weight[1])


def test_evidence_of_another_model_is_refused_and_nothing_changed() -> None:
    model = upcycle(vit(), config(layers=[0]))
    for other in (evidence(0.0, 0.0), evidence(0.0, shared=False)):
        with pytest.raises(VimoeError, match="run analyze on this model"):
            vimoe.prune(model, other)
        assert len(layers(model)) == 1


def test_the_receipt_has_score_cost_and_measured_speed() -> None:
    dense = vit()
    moe = upcycle(copy.deepcopy(dense), config())
    batch = [(images(dense), torch.tensor([0, 1, 2]))]
    before, after = receipts([moe, dense], batch)
    assert before.score.to_dict() == pytest.approx(after.score.to_dict(), rel=1e-4)  # upcycled, not yet trained
    assert before.cost == vimoe.count(moe) and after.cost == vimoe.count(dense)
    assert before.cost.params > before.cost.activated_params > after.cost.params
    assert before.images_per_second > 0 and after.images_per_second > 0
