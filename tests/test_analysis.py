"""On layers whose routing is known, the numbers are what they must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.analysis import Evidence, computing, mutual_information, permuted
from vimoe.config import MoEConfig
from vimoe.errors import DataError, VimoeError
from vimoe.moe.router import TokenLayout

CLASSES = 4


class Known(nn.Module):
    """Two MoE layers over one-hot "images" of the classes. The first sends class c to expert c, which votes for c.

    The second routes by class as well, but all of its experts do nothing: specialised by number, not by cause.
    """

    num_classes = CLASSES

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.pretrained_cfg: dict = {}
        made = MoEConfig(num_experts=CLASSES, **settings)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": moe(made)}) for _ in range(2))
        with torch.no_grad():
            self.blocks[0]["mlp"].experts.fc2.bias.copy_(5 * torch.eye(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        voted = self.blocks[0]["mlp"](x)
        return (voted + self.blocks[1]["mlp"](x)).mean(dim=1)


def moe(made: MoEConfig) -> vimoe.MoE:
    from timm.layers import Mlp

    silent = Mlp(CLASSES, 2)
    for p in silent.parameters():
        nn.init.zeros_(p)
    layer = vimoe.MoE(silent, made, TokenLayout(0, class_token=False))
    with torch.no_grad():
        layer.router.weight.copy_(20 * torch.eye(CLASSES))
    return layer


def loader(batch: int = 10, images: int = 60, tokens: int = 3, by_class: bool = False) -> list[tuple[Tensor, Tensor]]:
    labels = torch.randint(CLASSES, (images,), generator=torch.Generator().manual_seed(0))
    labels = labels.sort().values if by_class else labels
    x = torch.eye(CLASSES)[labels][:, None].expand(-1, tokens, -1)
    return list(zip(x.split(batch), labels.split(batch), strict=True))


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("by_class", [True, False], ids=["sorted by class", "shuffled"])
def test_cause_is_told_from_specialisation(routing: str, by_class: bool) -> None:
    """Sorted by class too, where a permutation within batches would exchange like with like."""
    votes, silent = vimoe.analyze(Known(routing=routing), loader(by_class=by_class)).layers
    for layer in (votes, silent):
        assert layer.adjusted_mutual_information == pytest.approx(1)
        assert np.array_equal(layer.heatmap, np.eye(CLASSES))
    assert votes.permuted_loss_change > 1 and votes.shared_loss_change > 1
    assert abs(silent.permuted_loss_change) < 1e-6 and abs(silent.shared_loss_change) < 1e-6


def test_the_known_layer_has_the_figures_that_follow() -> None:
    evidence = vimoe.analyze(Known(), loader())
    votes = evidence.layers[0]
    labels = torch.cat([y for _, y in loader()])
    shares = torch.bincount(labels) / len(labels)
    assert votes.load == pytest.approx(shares.numpy())
    assert votes.mutual_information == pytest.approx(float(-(shares * shares.log()).sum()))
    assert votes.gate_mass.sum() == pytest.approx(1, abs=1e-3)  # the gates are all but 1
    assert evidence.base.top1 == 1 and evidence.base.images == 60
    # without votes the loss is that of a guess
    assert votes.shared_loss_change + evidence.base.loss == pytest.approx(np.log(CLASSES))


def test_routing_that_ignores_the_class_looks_so() -> None:
    model = Known()
    with torch.no_grad():
        for layer in layers(model):
            layer.router.weight.zero_()
            layer.router.weight[1] = 1
    for layer in vimoe.analyze(model, loader()).layers:
        assert layer.load.tolist() == [0, 1, 0, 0]
        assert layer.mutual_information == 0 and layer.adjusted_mutual_information == 0
        assert layer.permuted_loss_change == pytest.approx(0, abs=1e-6)


def test_without_a_shared_expert_merging_is_measured() -> None:
    votes, silent = vimoe.analyze(Known(num_shared_experts=0, combine="sum"), loader()).layers
    assert votes.shared_loss_change is silent.shared_loss_change is None
    assert votes.removal_loss_change == votes.merged_loss_change > 1
    assert silent.merged_loss_change == pytest.approx(0, abs=1e-6)


def test_experts_that_agree_in_function_but_not_in_weights_are_not_said_to_merge() -> None:
    """Their hidden units are permuted: which expert an image gets does not matter, their mean weights do."""
    model = perturb_experts(upcycle(vit(), config(num_shared_experts=0, top_k=2)))
    with torch.no_grad():
        for layer in layers(model):
            experts = layer.experts
            for e in range(1, 4):
                order = torch.randperm(experts.fc1.weight.shape[1], generator=torch.Generator().manual_seed(e))
                experts.fc1.weight[e], experts.fc1.bias[e] = experts.fc1.weight[0][order], experts.fc1.bias[0][order]
                experts.fc2.weight[e], experts.fc2.bias[e] = experts.fc2.weight[0][:, order], experts.fc2.bias[0]
    x, labels = images(model, batch=12), torch.arange(12) % 5
    for found in vimoe.analyze(model, [(x, labels)]).layers:
        assert found.permuted_loss_change == pytest.approx(0, abs=1e-5)
        assert abs(found.merged_loss_change) > 1e-3


@pytest.mark.parametrize("routing", ["image", "token"])
def test_permuting_hands_each_image_the_whole_decision_of_its_donor(routing: str) -> None:
    model = perturb_experts(upcycle(vit(), config(routing=routing, top_k=2)))
    layer, donors = layers(model)[1], torch.tensor([2, 0, 1])
    x = images(model)
    with torch.no_grad(), vimoe.record(model) as routings:
        before = model(x)
        first = routings[1]
        decisions = first.experts.view(3, -1, 2), first.gates.view(3, -1, 2)
        with permuted(layer, *decisions, donors):
            during = model(x)
        after = model(x)
    moved = routings[3]
    assert torch.equal(moved.experts.view(3, -1, 2), decisions[0][donors])
    assert torch.equal(moved.gates.view(3, -1, 2), decisions[1][donors])
    assert not torch.equal(decisions[0], decisions[0][donors])
    assert torch.equal(before, after) and not torch.allclose(before, during)


def test_the_shared_expert_alone_is_what_densify_leaves() -> None:
    model = perturb_experts(upcycle(vit(), config()))
    with torch.no_grad():
        with computing(layers(model)[0], layers(model)[0].shared):
            during = model(images(model))
        assert not torch.allclose(during, model(images(model)))
        torch.testing.assert_close(during, vimoe.densify(model, layers=[0])(images(model)))


def test_mutual_information_agrees_with_scikit_learn() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (5, 3))
    rows, columns = np.nonzero(counts)
    repeated = [np.repeat(index, counts[rows, columns]) for index in (rows, columns)]
    assert mutual_information(counts) == pytest.approx(mutual_info_score(*repeated))


def test_evidence_travels_as_json() -> None:
    import json

    evidence = vimoe.analyze(Known(), loader())
    again = Evidence.from_dict(json.loads(json.dumps(evidence.to_dict())))
    assert str(again) == str(evidence) and again.base == evidence.base
    assert np.array_equal(again.layers[0].counts, evidence.layers[0].counts)


def test_a_loader_that_shuffles_is_refused() -> None:
    batches = loader()

    def shuffled() -> list:
        batches.reverse()
        return batches

    changing = type("Changing", (), {"__iter__": lambda self: iter(shuffled())})()
    with pytest.raises(DataError, match="another order each time"):
        vimoe.analyze(Known(), changing)


def test_what_cannot_be_analysed_is_refused() -> None:
    with pytest.raises(DataError, match="60 images, then 0: expected one that can be read again"):
        vimoe.analyze(Known(), iter(loader()))
    broken = Known()
    with torch.no_grad():
        broken.blocks[0]["mlp"].shared.fc2.bias[0] = float("nan")
    with pytest.raises(VimoeError, match="loss on validation is nan"):
        vimoe.analyze(broken, loader())
    with pytest.raises(VimoeError, match="no MoE layer"):
        vimoe.analyze(vit(), loader())
    with pytest.raises(DataError, match="the loader is empty"):
        vimoe.analyze(Known(), [])
