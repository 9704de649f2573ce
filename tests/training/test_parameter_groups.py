"""Every parameter is in one group, with the rate and decay that its parent had."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.kinds import Scaled
from helpers.tiny import config, images, layers, upcycle, vit
from torch import nn

import vimoe
from vimoe.config.moe import EXPERTS
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, SurgeryError
from vimoe.moe.experts import Role
from vimoe.training.parameter_groups import adamw, freeze_all_but, parameter_groups, trained_modules

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


class Based(Scaled):
    """Experts that hold the shared expert itself, as the base that they change."""

    def __init__(self, dense: nn.Module, config: vimoe.MoEConfig) -> None:
        super().__init__(dense, config)
        self.dense = dense


def trained(model: nn.Module, only: object, converted: list[str] | None = None) -> set[str]:
    """Names of the parameters that are trained, without those of the classifier, which always are."""
    names = trained_modules(model, TrainConfig(train_only=only).trained, converted)
    assert names is not None
    freeze_all_but(model, names)
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= found and set(settings_of(model)) == found
    return found - {"head.weight", "head.bias"}


def under(model: nn.Module, *modules: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{m}." for m in modules))}


FFN1, FFN2 = "blocks.1.mlp", "blocks.2.mlp"
ONLY = {
    "the MoE layers": ("moe", [FFN2]),
    "experts": ("experts", [f"{FFN2}.experts", f"{FFN2}.router"]),
    "nothing but the classifier": ("head", []),
    "the last blocks, dense or MoE": ("last:2", [FFN1, FFN2]),
    "a list of blocks": ([0, -1], ["blocks.0.mlp", FFN2]),
    "a pattern": ("blocks.[12].mlp", [FFN1, FFN2]),
    "all FFNs": ("every:1", ["blocks.0.mlp", FFN1, FFN2]),
}


@pytest.mark.parametrize("case", ONLY)
def test_what_is_named_is_trained_and_the_classifier(case: str) -> None:
    model = upcycle(vit(depth=3), config(layers=[2]))
    only, modules = ONLY[case]
    assert trained(model, only) == (under(model, *modules) if modules else set())
    assert trained_modules(model, TrainConfig().trained) is None


def test_a_dense_control_trains_the_ffns_that_the_moe_arm_trains() -> None:
    dense, moe = vit(depth=3), upcycle(vit(depth=3), config(layers="last:2"))
    ours, theirs = trained(dense, "last:2"), trained(moe, "moe")
    assert ours == {name.replace(".shared.", ".") for name in theirs if ".shared." in name}
    assert trained(dense, "moe", [FFN1, FFN2]) == ours  # of an FFN that was widened in the place of a mixture


@pytest.mark.parametrize("only", ["moe", "experts"])
def test_what_a_dense_model_does_not_have_is_refused(only: str) -> None:
    with pytest.raises(ConfigError, match=f"train_only='{only}': the model has no MoE layer: expected one"):
        trained(vit(), only)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("expert", "train_only='expert' names no FFN: did you mean 'experts'"),
        ("blocks.11.mlp", "train_only='blocks.11.mlp' names no FFN: did you mean 'blocks.1.mlp'"),
        ([7], "train_only: no block 7: expected -2 to 1"),
        ("last:9", "train_only='last:9': expected at most 2"),
        ("none", "train_only='none' names no FFN: known: all, moe, experts, head, last:N, every:N"),
    ],
)
def test_what_names_nothing_is_refused_with_the_nearest_name(only: object, message: str) -> None:
    with pytest.raises(SurgeryError) as raised:
        trained(vit(), only)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_experts_leave_the_shared_expert_frozen_where_they_hold_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "based", Based)
    model = upcycle(vit(), config(experts="based", layers=[1]))
    held = {id(p) for p in layers(model)[0].shared.parameters()}
    assert {id(p) for p in layers(model)[0].experts.parameters()} > held
    assert trained(model, "experts") == {f"{FFN1}.experts.scale", f"{FFN1}.router.weight"}
    assert held <= {id(p) for p in model.parameters() if not p.requires_grad}
    trained(model, "moe")
    assert held <= {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("decay", [None, 0.3])
@pytest.mark.parametrize("family", ["vit", "eva02, SwiGLU with inner norm"])
def test_routed_experts_can_have_a_rate_of_their_own(family: str, decay: float | None) -> None:
    """And nothing else: no shared expert, no router, no decay; relative to their block's."""
    model, settings = upcycle(vit(family), config()), replace(TRAIN, expert_weight_decay=decay)
    before, after = settings_of(model, settings), settings_of(model, replace(settings, expert_lr_scale=4.0))
    assert {name for name in after if after[name] != before[name]} == {name for name in after if ".experts." in name}
    assert all(after[name] == (d, 4 * rate) for name, (d, rate) in before.items() if ".experts." in name)
    assert len({after[f"blocks.{b}.mlp.experts.fc1.weight"] for b in (0, 1)}) == 2


def test_a_shared_expert_that_experts_hold_has_the_rate_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "based", Based)
    model = upcycle(vit(), config(experts="based"))
    before, after = settings_of(model), settings_of(model, replace(TRAIN, expert_lr_scale=4.0))
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"blocks.{b}.mlp.experts.scale" for b in (0, 1)}


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


def plain_adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, TRAIN), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)


def test_weights_that_are_not_contiguous_are_updated_as_others_are() -> None:
    """Such as a slice that a kind of experts of your own keeps."""
    found = []
    for make in (plain_adamw, lambda model: adamw(model, TRAIN)):
        torch.manual_seed(0)
        model = vit()
        model.head.weight = nn.Parameter(torch.cat([model.head.weight.detach()] * 2, dim=1)[:, ::2])
        optimizer = make(model)
        for _ in range(2):
            model(images(model)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_goes_on_with_the_kernel_of_a_checkpoint(fused: bool) -> None:
    """As under train.precision=fp16, whose scaler leaves it to a fused kernel to scale gradients back."""
    found = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = vit()
        first = adamw(model, TRAIN) if fused else plain_adamw(model)
        model(images(model)).square().sum().backward()
        first.step()
        optimizer = adamw(model, TRAIN)
        optimizer.load_state_dict(first.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        optimizer.zero_grad()
        scaler.scale(model(images(model)).square().sum()).backward()
        scaler.step(optimizer)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)
