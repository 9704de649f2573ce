"""A diagnosis names the fault of a model that was made to have it, and no other fault."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.kinds import DECIDE as DECIDE  # registers kinds
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.analysis.diagnosis import Diagnosis
from vimoe.errors import ConfigError, DataError, VimoeError
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import TokenLayout

CLASSES, EXPERTS = 4, 8
# channels of the "images": their class, a group that has nothing to do with it, a sign that neither has, votes, and two
# that nothing reads
CLASS, GROUP, SIGN, VOTE, UNREAD = slice(0, 4), slice(4, 12), 12, slice(13, 17), slice(17, 19)
DIM = 19


class Made(nn.Module):
    """Layers one after the other, each made from how it routes and from what its experts do; votes are the logits."""

    num_classes = CLASSES

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.pretrained_cfg: dict = {}
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[..., VOTE].mean(dim=1)


class Block(nn.Module):
    def __init__(self, router: Tensor, **experts: Tensor) -> None:
        super().__init__()
        ffn = Mlp(DIM, 2, act_layer=nn.ReLU)
        with torch.no_grad():
            for p in ffn.parameters():
                p.zero_()
            ffn.fc2.bias[UNREAD] = torch.tensor([1.0, 0.0])
        self.mlp = vimoe.MoE(ffn, vimoe.MoEConfig(num_experts=EXPERTS), TokenLayout(0, class_token=False))
        with torch.no_grad():
            self.mlp.router.weight.copy_(router)
            for name, value in experts.items():
                getattr(self, name)(value)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)

    def vote(self, strength: Tensor) -> None:
        """Expert e votes for class e % 4."""
        self.mlp.experts.fc2.bias[:, VOTE] += strength * torch.eye(CLASSES).repeat(2, 1)

    def turn(self, by: Tensor) -> None:
        """Experts turn the constant that nothing reads, each by another angle: they differ, and it has no effect."""
        angles = by * torch.arange(EXPERTS)
        self.mlp.experts.fc2.bias[:, UNREAD] = torch.stack([angles.cos(), angles.sin()], dim=1)
        self.mlp.experts.fc2.bias[:, VOTE] += 1e-3 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def sway(self, strength: Tensor) -> None:
        """Every other expert adds the sign to the first class's votes, the others subtract it."""
        self.mlp.experts.fc1.weight[:, :, SIGN] = torch.tensor([1.0, -1.0])
        signs = torch.tensor([1.0, -1.0]).repeat(EXPERTS // 2)
        self.mlp.experts.fc2.weight[:, VOTE.start] = strength * signs[:, None] * torch.tensor([1.0, -1.0])


def by_group(scale: float) -> Tensor:
    weight = torch.zeros(EXPERTS, DIM)
    weight[:, GROUP] = scale * torch.eye(EXPERTS)
    return weight


def by_class(scale: float) -> Tensor:
    """Class c and even groups go to expert c, odd ones to expert c + 4, which has the same vote."""
    weight = torch.zeros(EXPERTS, DIM)
    weight[:, CLASS] = scale * torch.eye(CLASSES).repeat(2, 1)
    weight[:4, GROUP], weight[4:, GROUP] = scale * torch.tensor([[1, 0] * 4]), scale * torch.tensor([[0, 1] * 4])
    return weight


def to_one(scale: float) -> Tensor:
    weight = torch.zeros(EXPERTS, DIM)
    weight[0, GROUP] = scale
    return weight


def without_the_last(weight: Tensor) -> Tensor:
    weight[-1] = 0
    return weight


def loader(count: int = 400, batch: int = 50) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels, groups = torch.arange(count) % CLASSES, torch.randint(EXPERTS, (count,), generator=generator)
    x = torch.zeros(count, DIM)
    x[:, CLASS], x[:, GROUP] = torch.eye(CLASSES)[labels], torch.eye(EXPERTS)[groups]
    x[:, SIGN] = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    x[:, VOTE] = torch.eye(CLASSES)[labels] + 0.1 * torch.randn(count, CLASSES, generator=generator)
    return list(zip(x[:, None].expand(-1, 2, -1).split(batch), labels.split(batch), strict=True))


HEALTHY = {"router": by_class(2), "vote": 3}
USELESS = {"router": by_group(2), "turn": 0.7}
FAULTS = {
    "collapsed": ({"router": to_one(2), "turn": 0.7}, 400, "a higher train.balance_loss"),
    "copies": ({"router": by_group(2)}, 400, "moe.init=drop"),
    "small gates": ({"router": by_group(0.2), "turn": 0.7}, 400, "moe.gate=choice"),
    "saturated": ({"router": by_group(30), "turn": 0.7}, 400, "train.z_loss=0.001"),
    "better routes": ({"router": by_group(2), "vote": 1.5}, 400, "moe.router=centroids"),
    "idle experts": ({"router": without_the_last(by_class(2)), "vote": 3}, 400, "train.router_warmup_epochs=1"),
    "too few images": ({"router": by_group(2), "sway": 1}, 12, "more validation images (data.val_fraction)"),
    "useless experts": (USELESS, 400, "vimoe prune"),
}


def block(router: Tensor, **experts: float) -> Block:
    return Block(router, **{name: torch.tensor(float(value)) for name, value in experts.items()})


def names(diagnosis: Diagnosis) -> dict[str, list[str]]:
    return {finding.name: list(finding.layers) for finding in diagnosis.findings}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_no_other(fault: str) -> None:
    made, count, remedy = FAULTS[fault]
    diagnosis = vimoe.diagnose(Made(block(**made)), loader(count), draws=4)
    assert names(diagnosis) == {fault: ["blocks.0.mlp"]}
    assert remedy in diagnosis.findings[0].remedies
    text = str(diagnosis)
    assert f"1. {fault}: " in text and remedy in text and "2. " not in text and len(text.splitlines()) <= 10


def test_a_healthy_layer_has_no_fault_and_one_without_effect_is_told_from_it() -> None:
    alone = vimoe.diagnose(Made(block(**HEALTHY)), loader(), draws=4)
    assert names(alone) == {"healthy": ["blocks.0.mlp"]} and alone.findings[0].remedies == ()
    assert alone.layers[0].permuted.loss.low > 0.5 and "Nothing to mend" in str(alone)
    both = vimoe.diagnose(Made(block(**HEALTHY), block(**USELESS)), loader(), draws=4)
    assert names(both) == {"useless experts": ["blocks.1.mlp"], "healthy": ["blocks.0.mlp"]}
    assert "vimoe prune" in both.findings[0].remedies and "made dense by" in both.findings[0].layers["blocks.1.mlp"]


def test_a_frozen_router_is_not_called_saturated() -> None:
    model = Made(block(by_group(30), turn=0.7))
    model.blocks[0].mlp.router.requires_grad_(False)
    assert names(vimoe.diagnose(model, loader(), draws=1)) == {"useless experts": ["blocks.0.mlp"]}


def test_one_rule_names_all_of_its_layers() -> None:
    diagnosis = vimoe.diagnose(Made(block(by_group(2)), block(by_group(2))), loader(40), draws=1)
    assert names(diagnosis) == {"copies": ["blocks.0.mlp", "blocks.1.mlp"]}


def test_the_figures_of_a_known_layer_are_those_that_follow() -> None:
    (layer,) = vimoe.diagnose(Made(block(by_group(2), turn=0.7)), loader(), draws=1).layers
    gate = math.exp(2) / (math.exp(2) + 7)
    assert layer.gates.mean == pytest.approx(gate) and layer.gates.low == pytest.approx(layer.gates.high)
    assert layer.router_confidence == pytest.approx(gate) and layer.experts_per_unit == 1 and layer.images == 400
    groups = torch.cat([x[:, 0, GROUP] for x, _ in loader()])
    assert layer.load == pytest.approx(groups.mean(dim=0).tolist())
    angles = 0.7 * np.arange(EXPERTS)
    assert layer.from_shared.outputs == pytest.approx((2 * np.abs(np.sin(angles / 2))).mean(), abs=1e-2)
    assert layer.from_shared.cosine == pytest.approx(np.cos(angles).mean(), abs=1e-3)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"router": "threshold"}, {"num_shared_experts": 0}], ids=str)
def test_the_oracle_is_that_of_loops_over_images_and_experts(routing: str, settings: dict) -> None:
    made = config(routing=routing, **({"top_k": 2} if "num_shared_experts" in settings else {}), **settings)
    model = perturb_experts(upcycle(vit(global_pool="avg"), made)).double()
    x, labels = images(model, 20).double(), torch.arange(20) % 5
    found = vimoe.diagnose(model, list(zip(x.split(7), labels.split(7), strict=True)), draws=1, overrule=None)
    base = losses(model, x, labels)
    half = halves_of(labels.numpy())
    for (name, layer), figures in zip(moe_layers(model).items(), found.layers, strict=True):
        alone = np.stack([losses_with(model, layer, e, x, labels) - base for e in range(4)], axis=1)
        with torch.no_grad():
            predicted = model(x).argmax(dim=1)
        changes, for_all, by_prediction = [], [], []
        for i in range(20):
            others = [j for j in range(20) if half[j] != half[i]]
            for_all.append(alone[i, alone[others].mean(axis=0).argmin()])
            alike = [j for j in others if predicted[j] == predicted[i]] or others
            by_prediction.append(alone[i, alone[alike].mean(axis=0).argmin()])
            changes.append(alone[i, alone[[j for j in others if labels[j] == labels[i]]].mean(axis=0).argmin()])
        assert figures.name == name and figures.oracle.images == 20
        assert figures.oracle.by_class.loss.value == pytest.approx(np.mean(changes), abs=1e-7)
        assert figures.oracle.by_prediction.loss.value == pytest.approx(np.mean(by_prediction), abs=1e-7)
        assert figures.oracle.for_all.loss.value == pytest.approx(np.mean(for_all), abs=1e-7)
        assert figures.oracle.by_image.loss.value == pytest.approx(alone.min(axis=1).mean(), abs=1e-7)
        assert np.std(changes) > 1e-3  # the comparison would be of zeros


def halves_of(labels: np.ndarray) -> np.ndarray:
    """The halves as the package draws them: which images are in which is a matter of chance alone."""
    half = vimoe.analysis.halves.halves(labels + 1, 0)
    assert all(half[labels == label].sum() == 2 for label in range(5))
    return half


def losses(model: nn.Module, x: Tensor, labels: Tensor) -> np.ndarray:
    with torch.no_grad():
        return F.cross_entropy(model(x).float(), labels, reduction="none").double().numpy()


def losses_with(model: nn.Module, layer: vimoe.MoE, expert: int, x: Tensor, labels: Tensor) -> np.ndarray:
    """Losses if the layer computes S + g (E - S) for each token, with g the sum of the gates that it had."""

    def other(_layer: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        routing, (tokens,) = layer.router(args[0]), args
        gates = routing.gates.sum(dim=1).view(len(tokens), -1, 1)
        w = {name: stacked[expert] for name, stacked in layer.experts.named_parameters()}
        y = F.linear(F.gelu(F.linear(tokens, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])
        shared = torch.zeros_like(y) if layer.shared is None else layer.shared(tokens)
        return shared + gates * (y - shared)

    handle = layer.register_forward_hook(other)
    try:
        return losses(model, x, labels)
    finally:
        handle.remove()


def test_evidence_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Made(block(**HEALTHY))
    evidence = vimoe.analyze(model, loader(), draws=2)
    monkeypatch.setattr("vimoe.analysis.diagnose.analyze", lambda *_: pytest.fail("it analysed again"))
    diagnosis = vimoe.diagnose(model, loader(), evidence)
    assert diagnosis.layers[0].permuted == evidence.layers[0].permuted and diagnosis.base == evidence.base


def test_a_sample_of_the_images_is_measured_and_the_seed_draws_it() -> None:
    model = Made(block(by_group(2), vote=3))
    evidence = vimoe.analyze(model, loader(), draws=2)
    first, again, other = (vimoe.diagnose(model, loader(), evidence, overrule=50, seed=seed) for seed in (0, 0, 1))
    assert first.images == first.layers[0].images == 50 and first.to_dict() == again.to_dict()
    assert first.layers[0].load != other.layers[0].load
    # however the loader cuts its batches
    assert vimoe.diagnose(model, loader(batch=30), evidence, overrule=50).layers[0].load == first.layers[0].load


def test_a_batch_may_have_no_image_of_the_sample() -> None:
    model = Made(block(**HEALTHY))
    evidence = vimoe.analyze(model, loader(), draws=1)
    assert vimoe.diagnose(model, loader(batch=5), evidence, overrule=2).images == 2


def test_frames_of_a_video_count_together() -> None:
    model = Made(block(by_group(2), sway=1))
    batches, videos = loader(40), [i // 4 for i in range(40)]
    plain, by_video = (vimoe.diagnose(model, batches, draws=2, sequences=each) for each in (None, videos))
    assert plain.sequences is None and by_video.sequences == 10 and "over 10 sequences" in str(by_video)
    widths = [d.layers[0].oracle.by_class.loss.high - d.layers[0].oracle.by_class.loss.low for d in (plain, by_video)]
    assert widths[0] != widths[1]
    with pytest.raises(ConfigError, match="3 sequences of 40 images"):
        vimoe.diagnose(model, batches, vimoe.analyze(model, batches, draws=1), sequences=["a", "b", "c"])


def test_without_two_images_of_a_class_there_is_no_oracle() -> None:
    model = vit(num_classes=6)
    upcycle(model, config())
    diagnosis = vimoe.diagnose(model, [(images(model, 6), torch.arange(6))], draws=1)
    assert all(layer.oracle is None for layer in diagnosis.layers)
    assert "No oracle: no class has images in both halves" in str(diagnosis)


def test_experts_that_are_no_ffns_are_compared_by_their_outputs() -> None:
    model = upcycle(vit(), config(experts="scaled"))
    x, labels = images(model, 10), torch.arange(10) % 5
    diagnosis = vimoe.diagnose(model, [(x, labels)], draws=1)
    assert "copies" in names(diagnosis) and diagnosis.layers[0].from_shared.cosine is None
    with torch.no_grad():
        for layer in layers(model):
            layer.experts.scale += torch.arange(4)[:, None]
    assert "copies" not in names(vimoe.diagnose(model, [(x, labels)], draws=1))


def test_remedies_that_are_in_force_are_not_given() -> None:
    model = Made(block(by_group(0.2), turn=0.7))
    layer = model.blocks[0].mlp
    layer.config = replace(layer.config, gate="choice")
    (finding,) = vimoe.diagnose(model, loader(), draws=1).findings
    assert finding.name == "small gates" and finding.remedies[0] == "a higher moe.gate_weight"


MISUSE = {
    "no layer": (lambda: vit(num_classes=4), {}, VimoeError, "has no MoE layer"),
    "one image": (lambda: Made(block(**HEALTHY)), {"overrule": 1}, ConfigError, "overrule=1: expected at least 2"),
    "slots": (
        lambda: vimoe.upcycle(vit(num_classes=4), vimoe.MoEConfig(router="soft", routing="token", layers="last:1")),
        {},
        VimoeError,
        "moe.router='soft': expected routers with decisions that images can exchange, .* use analyze",
    ),
    "one table for all": (
        lambda: vimoe.upcycle(vit(num_classes=4), vimoe.MoEConfig(router="hash", routing="token", layers="last:1")),
        {},
        VimoeError,
        "moe.router='hash': expected routers with decisions that differ between images",
    ),
    "no loader": (lambda: Made(block(**HEALTHY)), {"loader": []}, DataError, "the loader is empty"),
    "no evidence": (lambda: Made(block(**HEALTHY)), {"evidence": {}}, VimoeError, "evidence is of type dict"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_a_mistake_is_one_line(case: str) -> None:
    model, arguments, error, text = MISUSE[case]
    made = model()
    batches = [(images(made, 4), torch.arange(4))] if case in ("no layer", "slots", "one table for all") else loader(8)
    with pytest.raises(error, match=text) as caught:
        vimoe.diagnose(made, **{"loader": batches, **arguments})
    assert "\n" not in str(caught.value)


def test_evidence_of_other_images_or_another_model_is_refused() -> None:
    model = Made(block(**HEALTHY))
    evidence = vimoe.analyze(model, loader(16), draws=1)
    for others in (loader(20), loader(12)):
        with pytest.raises(DataError, match="the evidence is of 16: expected the same images"):
            vimoe.diagnose(model, others, evidence)
    for broken in (loader(16)[0][0], [{"image": 1}], [loader(16)[0][0]]):
        with pytest.raises(DataError, match="expected"):
            vimoe.diagnose(model, broken, evidence)
    with pytest.raises(VimoeError, match="the evidence is of another model"):
        vimoe.diagnose(Made(block(**HEALTHY), block(**HEALTHY)), loader(16), evidence)
    with pytest.raises(VimoeError, match="the evidence has no interventions"):
        vimoe.diagnose(model, loader(16), vimoe.analyze(model, loader(16), overrule=0))


def test_of_random_labels_the_oracle_by_prediction_gets_no_more_right() -> None:
    """The best expert of a true class seems to gain, because it raises that class; no router could know it."""
    generator = torch.Generator().manual_seed(0)
    model = Made(block(by_group(2), turn=0.7))
    batches = [(x, torch.randint(CLASSES, (len(x),), generator=generator)) for x, _ in loader()]
    diagnosis = vimoe.diagnose(perturb_experts(model), batches, draws=1)
    oracle = diagnosis.layers[0].oracle
    assert oracle.by_class.right.low > 0  # of labels that nothing can predict
    assert oracle.by_prediction.right.low < 0 < oracle.by_prediction.right.high
