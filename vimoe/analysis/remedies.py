"""Findings on MoE layers by rules, and what to try next: a table of rules, each a small function of a layer's figures.

A rule is about one layer. Each layer fulfils at least one: if routes matter it is healthy, or better routes exist, or
experts lie idle; if they do not, there is a reason, or the images do not tell, or the experts are of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from vimoe.analysis.diagnosis import Finding, LayerDiagnosis
from vimoe.config.analysis import PRUNE_TOLERANCE
from vimoe.moe.layer import MoE
from vimoe.training.routing_health import COLLAPSED, CONFIDENT

EFFECT = PRUNE_TOLERANCE  # nats; a change that pruning would accept is no effect
SAME_OUTPUT = 0.01  # distance of the experts' outputs from their mean, below which experts are copies
SMALL_GATE = 0.25  # mean weight of the chosen experts together: a softmax over 8 begins at 0.14 to 0.25
MEASURE_MORE = "a higher --overrule"  # a remedy that needs images which were not measured
EXPECTED = 10  # images that an expert would get of an even load, before getting none is no accident


def matters(layer: LayerDiagnosis) -> bool:
    """Return True if exchanging routes surely costs loss, and enough of it."""
    return layer.permuted.loss.low > 0 and layer.permuted.loss.value >= EFFECT


def misses(layer: LayerDiagnosis) -> bool:
    """Return True if the best expert of each predicted class is surely better than the router's own, and by enough."""
    change = layer.oracle.by_prediction.loss if layer.oracle else None
    return change is not None and change.high < 0 and change.value <= -EFFECT


def collapsed(layer: LayerDiagnosis) -> bool:
    """Return True if nearly all units get the same experts; the alarm of the training has the same bound."""
    k = max(1.0, layer.experts_per_unit)
    return any(layer.load) and layer.effective_experts.value < COLLAPSED * k and layer.num_experts > 2 * k


def idle(layer: LayerDiagnosis) -> bool:
    """Return True if an expert got nothing that should have got some, in a layer that has not collapsed."""
    even = layer.images * layer.experts_per_unit / layer.num_experts
    return 0 in layer.load and even >= EXPECTED and not collapsed(layer)


def copies(layer: LayerDiagnosis) -> bool:
    """Return True if all experts compute nearly the same, and no routes among them matter."""
    alike = layer.from_mean.outputs < SAME_OUTPUT
    return layer.num_experts > 1 and alike and not matters(layer) and not misses(layer)


def small_gates(layer: LayerDiagnosis) -> bool:
    """Return True if experts differ, but weigh too little for it to matter."""
    return layer.gates.mean < SMALL_GATE and not copies(layer) and not matters(layer)


def saturated(layer: LayerDiagnosis) -> bool:
    """Return True if the router cannot learn because it is certain, and has not found what there is to find."""
    stuck = layer.router_confidence > CONFIDENT and layer.learns and layer.num_experts > 1
    return stuck and (misses(layer) or not matters(layer))


def undecided(layer: LayerDiagnosis) -> bool:
    """Return True if intervals include both no effect and one that would matter."""
    gain = -layer.oracle.by_prediction.loss.low if layer.oracle else 0.0
    return not matters(layer) and not misses(layer) and max(layer.permuted.loss.high, gain) > EFFECT


def useless(layer: LayerDiagnosis) -> bool:
    """Return True if experts differ and weigh enough, but no choice among them changes the loss."""
    reasons = (collapsed, copies, small_gates, saturated, misses, undecided)
    return not matters(layer) and not any(reason(layer) for reason in reasons)


def healthy(layer: LayerDiagnosis) -> bool:
    """Return True if the routes are needed, and nothing better was found."""
    return matters(layer) and not any(fault(layer) for fault in (collapsed, idle, misses))


@dataclass(frozen=True)
class Rule:
    """A rule: name, condition, finding in words, figure of a layer, settings to try, and their reason with its source.

    A remedy is left out where it would change nothing in these layers, or contradict their other settings.
    """

    name: str
    holds: Callable[[LayerDiagnosis], bool]
    says: str
    figure: Callable[[LayerDiagnosis], str]
    remedies: tuple[str, ...]
    because: str


def _used(layer: LayerDiagnosis) -> str:
    return f"{layer.effective_experts.value:.1f} of {layer.num_experts} in use"


def _gain(layer: LayerDiagnosis) -> str:
    assert layer.oracle
    return f"{layer.oracle.by_prediction.loss}, one expert for all {layer.oracle.for_all.loss.value:+.4f}"


def _near(layer: LayerDiagnosis) -> str:
    cosine = "" if layer.from_mean.cosine is None else f", weights with a cosine of {layer.from_mean.cosine:.5f}"
    return f"outputs {layer.from_mean.outputs:.2%} apart{cosine}"


def _dense(layer: LayerDiagnosis) -> str:
    if not layer.dense:
        return "no method makes it dense"
    how, effect = min(layer.dense.items(), key=lambda item: item[1].loss.value)
    return f"made dense by {how!r} {effect.loss}"


# in the order of urgency: what an earlier rule finds may explain what a later one does
RULES = (
    Rule(
        "collapsed",
        collapsed,
        "the router sends nearly everything to the same experts",
        _used,
        ("a higher train.balance_loss", "moe.bias_update_rate=0.001", "a lower train.router_lr_scale"),
        "experts without images learn nothing (Switch Transformers, arXiv 2101.03961; loss-free balancing, arXiv "
        "2408.15664)",
    ),
    Rule(
        "copies",
        copies,
        "the experts are still near to one another, and no choice among them was found to matter",
        _near,
        ("a higher train.expert_lr_scale", "a higher train.lr", "moe.init=drop", "moe.init=cluster"),
        "at a low rate upcycled experts stay at the parent, with a cosine near 1 (arXiv 2410.07524); Drop-Upcycling "
        "(arXiv 2502.19261) and clusters (arXiv 2604.13508) are starts at which they differ",
    ),
    Rule(
        "small gates",
        small_gates,
        "the experts differ, but the gates give them little weight",
        lambda layer: f"mean gate {layer.gates.mean:.2f}",
        ("moe.gate=choice", "a higher moe.gate_weight", "fewer moe.num_experts"),
        "an expert's difference enters with its gate; a softmax over N experts begins near 1/N, and no loss raises it "
        "while routes do not matter",
    ),
    Rule(
        "saturated",
        saturated,
        "the router is certain, so its gradient vanishes",
        lambda layer: f"first choice {layer.router_confidence:.4f}",
        ("train.z_loss=0.001", "a lower train.router_lr_scale"),
        "the gradient of a softmax vanishes at its corners; the z-loss keeps scores small (ST-MoE, arXiv 2202.08906)",
    ),
    Rule(
        "better routes",
        misses,
        "the router does not find what is there: the best expert of each class lowers the loss",
        _gain,
        (
            "moe.router=centroids", "moe.router=superclass", "moe.router_gradient=dense",
            "a higher train.router_lr_scale",
        ),
        "given routes tell a router that cannot learn from experts that cannot help (Mobile V-MoE, arXiv 2309.04354); "
        "a router with top-1 gates hears of the chosen expert alone",
    ),
    Rule(
        "idle experts",
        idle,
        "some experts get nothing",
        lambda layer: f"nothing for {', '.join(str(expert) for expert, share in enumerate(layer.load) if share == 0)}",
        ("a higher train.balance_loss", "train.router_warmup_epochs=1", "fewer moe.num_experts"),
        "an expert that gets nothing at first is never trained, so the router has no reason to choose it later",
    ),
    Rule(
        "too few images",
        undecided,
        "the intervals are too wide to tell whether the routes matter",
        lambda layer: f"permuted {layer.permuted.loss}",
        ("more validation images (data.val_fraction)", MEASURE_MORE),
        "the width of an interval falls with the square root of the number of images",
    ),
    Rule(
        "useless experts",
        useless,
        "the experts differ and weigh enough, but no choice among them changes the loss",
        _dense,
        ("more train.epochs", "data of several domains or finer classes", "fewer moe.num_experts", "vimoe prune"),
        "gains are reported for fine-grained classes, several domains and long training (GMoE, arXiv 2206.04046); "
        "elsewhere the dense FFN is as good and cheaper",
    ),
    Rule(
        "healthy",
        healthy,
        "the routes are needed, exchanging them costs loss (a dense control tells what they gain)",
        lambda layer: f"permuted {layer.permuted.loss}",
        (),
        "no rule found a fault; whether the model beats a dense one, only a dense control tells (moe.layers=none)",
    ),
)  # fmt: skip


# what a remedy needs in a layer; "moe.NAME=VALUE" needs a value that the layer has not, and could have
_NEEDS: dict[str, Callable[[LayerDiagnosis, MoE], bool]] = {
    "a higher train.balance_loss": lambda figures, layer: figures.learns and not layer.router.even,
    "a higher train.router_lr_scale": lambda figures, _: figures.learns,
    "a lower train.router_lr_scale": lambda figures, _: figures.learns,
    "train.router_warmup_epochs=1": lambda figures, layer: figures.learns and layer.router.adjustable,
    "a higher moe.gate_weight": lambda _, layer: layer.could_have(gate_weight=0.99),
}


def helps(remedy: str, figures: LayerDiagnosis, layer: MoE) -> bool:
    """Return True if a layer could follow a remedy, and has not done so."""
    if remedy in _NEEDS:
        return _NEEDS[remedy](figures, layer)
    setting, _, value = remedy.partition("=")
    if not value or not setting.startswith("moe."):
        return True
    change = {setting.removeprefix("moe."): yaml.safe_load(value)}
    return any(getattr(layer.config, name) != new for name, new in change.items()) and layer.could_have(**change)


def findings(
    figures: Sequence[LayerDiagnosis], layers: Mapping[str, MoE], more_images: bool = True
) -> tuple[Finding, ...]:
    """Return the findings of all rules, the most urgent first.

    Args:
        figures: figures of each layer.
        layers: the layers, by name.
        more_images: False if all images of validation were measured, so that there are no others to take.
    """
    found = []
    for rule in RULES:
        there = [each for each in figures if rule.holds(each)]
        where = {each.name: rule.figure(each) for each in there}
        could = [each for each in rule.remedies if more_images or each != MEASURE_MORE]
        remedies = [each for each in could if any(helps(each, own, layers[own.name]) for own in there)]
        if where:
            found.append(Finding(rule.name, where, rule.says, tuple(remedies), rule.because))
    return tuple(found)
