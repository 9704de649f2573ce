"""Every parameter is in one group, with the rate and decay that its parent had."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.kinds import Scaled
from helpers.tiny import config, layers, upcycle, vit
from torch import nn

import vimoe
from vimoe.config.moe import EXPERTS
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.moe.experts import Role
from vimoe.training.parameter_groups import freeze_all_but, parameter_groups

TRAIN = TrainConfig(weight_decay=0.05, layer_decay=0.5, router_lr_scale=3.0, router_weight_decay=0.01)


class Flat(Scaled):
    """Experts with a matrix of one axis."""

    def __init__(self, dense: nn.Module, config: vimoe.MoEConfig) -> None:
        super().__init__(dense, config)
        self.flat = nn.Parameter(torch.zeros(6))

    @property
    def roles(self) -> dict[str, Role]:
        return {**super().roles, "flat": Role(matrix=True, per_expert=False)}


def settings_of(model: nn.Module, settings: TrainConfig = TRAIN) -> dict[str, tuple[float, float]]:
    """(weight decay, rate) of every parameter by name."""
    groups = parameter_groups(model, settings)
    by_id = {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
    counts = Counter(id(p) for group in groups for p in group["params"])
    assert set(counts.values()) == {1}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


@pytest.mark.parametrize("family", ["vit", "dinov2, registers", "dinov3, SwiGLU", "eva02, SwiGLU with inner norm"])
def test_experts_are_treated_as_the_parents_ffn_was(family: str) -> None:
    parent, model = settings_of(vit(family)), settings_of(upcycle(vit(family), config(num_experts=2, top_k=2)))
    assert len(model) == len(list(upcycle(vit(family), config(num_experts=2, top_k=2)).parameters()))
    for name, got in model.items():
        if ".router." in name:
            block_rate = parent[name.split(".mlp.")[0] + ".norm1.weight"][1]
            assert got == (0.01, 3.0 * block_rate)
        elif ".experts." in name:
            ours = name.replace(".experts.", ".")
            theirs = ours if ours in parent else ours.replace(".fc1.", ".fc1_g.")
            assert got == parent[theirs], name
        else:
            assert got == parent[name.replace(".shared.", ".")], name


def test_stacked_biases_are_biases() -> None:
    model = upcycle(vit(), config())
    assert model.blocks[0].mlp.experts.fc1.bias.ndim == 2
    decay = {name: values[0] for name, values in settings_of(model).items()}
    assert decay["blocks.0.mlp.experts.fc1.bias"] == 0 and decay["blocks.0.mlp.experts.fc1.weight"] == 0.05


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("family", ["vit", "eva02, SwiGLU with inner norm"])
def test_the_matrices_of_routed_experts_can_have_a_decay_of_their_own(family: str, decay: float) -> None:
    """And nothing else: no bias or norm of theirs, no shared expert, no router, no rate."""
    model = upcycle(vit(family), config())
    before, after = settings_of(model), settings_of(model, replace(TRAIN, expert_weight_decay=decay))
    changed = {name for name in after if after[name] != before[name]}
    matrices = {f"blocks.{b}.mlp.experts.{layer}.weight" for b in (0, 1) for layer in ("fc1", "fc2")}
    assert changed == matrices
    assert all(after[name] == (decay, before[name][1]) for name in matrices)


def test_without_one_the_groups_are_the_same() -> None:
    """In number and order too, which the optimiser's state in a checkpoint goes by."""
    model = upcycle(vit(), config())
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in parameter_groups(model, TRAIN)]
    ours = [[name for name in group if ".experts." in name or ".shared." in name] for group in groups]
    matrices = [f"blocks.0.mlp.{part}.weight" for part in ("experts.fc1", "experts.fc2", "shared.fc1", "shared.fc2")]
    assert matrices in ours


def test_nothing_to_train_but_the_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has no MoE layer"):
        freeze_all_but(vit(), [])


def test_deeper_blocks_learn_faster() -> None:
    rates = {name: values[1] for name, values in settings_of(upcycle(vit(), config())).items()}
    assert rates["blocks.0.mlp.experts.fc1.weight"] == 0.5 * rates["blocks.1.mlp.experts.fc1.weight"]


@pytest.mark.parametrize("family", ["vit", "deit, distilled"])
def test_training_the_moe_layers_alone_leaves_them_and_the_classifiers(family: str) -> None:
    model = upcycle(vit(family), config(layers=[-1]))
    freeze_all_but(model, ["blocks.1.mlp"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and {name.split(".")[0] for name in trained} <= {"blocks", "head", "head_dist"}
    assert {name for name in trained if name.startswith("blocks")} == {
        f"blocks.1.mlp.{name}" for name, _ in layers(model)[0].named_parameters()
    }
    assert set(settings_of(model)) == trained


def test_the_role_of_a_parameter_of_experts_decides_and_not_its_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared matrix may be kept flat, as a vector."""
    monkeypatch.setitem(EXPERTS, "flat", Flat)
    model = upcycle(vit(), config(experts="flat"))
    for settings, expected in ((TRAIN, 0.05), (replace(TRAIN, expert_weight_decay=0.3), 0.3)):
        decay = {name: values[0] for name, values in settings_of(model, settings).items()}
        assert decay["blocks.0.mlp.experts.flat"] == expected
        assert decay["blocks.0.mlp.experts.scale"] == decay["blocks.0.mlp.shared.fc1.bias"] == 0
