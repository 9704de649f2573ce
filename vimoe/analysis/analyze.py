"""The evidence that pruning decides on: specialisation of MoE layers, and its effect.

These are two questions. By number: do the experts of a layer get different classes? By cause: does the loss change if
the routing of a layer is overruled, or the layer is made dense? A layer can specialise without need.

Axes: I images, C classes, N experts, U routed units of an image, K chosen experts, L layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vimoe.analysis import block_order, decisions, expert_usage
from vimoe.analysis.decisions import ByClass, Decisions, observe
from vimoe.analysis.dependence import agreement
from vimoe.analysis.diversity import measure_diversity
from vimoe.analysis.evidence import Effect, Evidence, LayerEvidence
from vimoe.analysis.expert_similarity import compare_experts
from vimoe.analysis.halves import halves
from vimoe.analysis.intervals import enough_draws, numbered
from vimoe.analysis.interventions import Frozen, Handed, Images, Intervention, Subjects, Without, measure
from vimoe.analysis.probe import check_probed
from vimoe.analysis.probe import probe as probe_experts
from vimoe.config.analysis import DRAWS, OVERRULED_IMAGES
from vimoe.config.checks import LARGEST_SEED, check_count
from vimoe.errors import ConfigError, VimoeError
from vimoe.metrics.base import Batches
from vimoe.models.interface import unwrapped
from vimoe.models.upcycling import sites
from vimoe.moe import MoE, ffn
from vimoe.moe.layer import moe_layers
from vimoe.moe.packed import check_not_packed
from vimoe.process import Process

FIRST_DRAWS = 4  # by which it is judged how many are enough


def analyze(
    model: nn.Module,
    loader: Batches,
    draws: int = DRAWS,
    overrule: int | None = OVERRULED_IMAGES,
    seed: int = 0,
    progress: bool = False,
    sequences: Sequence[Hashable] | None = None,
    metric: str | None = None,
    parent: nn.Module | None = None,
    probe: bool = False,
    process: Process | None = None,
) -> Evidence:
    """Measure every MoE layer of a model on validation images.

    The metric says what labels are: classes of images, or masks. Each patch of a mask gets the majority class of its
    pixels. The accuracy of a segmented image is its share of correct pixels.

    The cost is one pass over the loader to see the routing, and up to `draws` + N + 4 interventions on a layer. An
    intervention runs the blocks after the layer again, on the images that are overruled. For `last:2` of a ViT with a
    class token that is about 2 more passes, and 5 for one that pools its patches. Features before the first layer are
    kept if they take at most 1 GiB; else the loader is read again, once or twice.

    If whole blocks come after a layer, a few permutations are made first. More follow as long as they narrow the
    interval by more than a twentieth (`vimoe.analysis.intervals.enough_draws`). Their number follows from widths and
    the seed, not from the mean, so the mean stays unbiased for all practical purposes.

    Where the decisions of a router cannot be overruled (`Router.overrulable`), only dense FFNs take the layer's place.

    Memory does not depend on the number of images: the decisions of at most 20,000 are kept, drawn uniformly.

    Args:
        model: a model with MoE layers; left in eval mode.
        loader: validation batches of (images, labels), all images of one size, and the same in the same order when it
            is read again.
        draws: permutations of the images' decisions, at most.
        overrule: images that interventions are measured on, drawn uniformly; 0 for no interventions, None for all that
            are kept.
        seed: draws images, permutations and resamples.
        progress: show how far each pass is: a bar where standard error is a terminal, else lines in the log.
        sequences: name of the video of each image of the loader. Intervals are then over sequences, if there are at
            least 5 of them: frames of one video are alike, and intervals over frames too narrow. By default each image
            counts by itself.
        metric: name in `vimoe.metrics.registry.METRICS`; by default the model's attribute `metric`, and
            "classification" for a model without it.
        parent: dense model that was upcycled, with the weights that it had then and on the model's device, to compare
            experts with its FFNs; by default with the shared expert, or with the FFN that they have in common.
        probe: measure each expert alone too (`vimoe.analysis.probe`), by as many further interventions as experts.
        process: this one of the processes that share the images, each of which calls this with a model of its own. Its
            `loader.batch_sampler` has the places of its images, as `vimoe.data.loaders.share` gives them. Each gets
            the evidence of all images, which is that of one process to rounding. By default all are for this one.

    Raises:
        ConfigError: if there are not as many sequences as images, no such metric is registered, or the parent has no
            FFN in the place of a layer.
        VimoeError: if the model has no MoE layer, is optimised, or has a loss that is not finite; or if experts are to
            be probed where images have no class, or cannot be sent to one expert.
        DataError: if the loader is empty, in one process or all, gives no pairs of tensors that the model takes, or
            gives other images when it is read again; or if the metric gives classes of another shape or range than it
            says.

    >>> import timm, torch, vimoe
    >>> dense = timm.create_model("test_vit", num_classes=2)
    >>> model = vimoe.upcycle(dense, vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> loader = [(torch.randn(8, 3, 160, 160), torch.tensor([0, 1] * 4))]
    >>> evidence = vimoe.analyze(model, loader, draws=1)
    >>> [layer.name for layer in evidence.layers]
    ['blocks.5.mlp']
    """
    if draws < 1:
        raise ConfigError(f"draws={draws}: expected at least 1")
    check_count("seed", seed, 0, LARGEST_SEED)
    if overrule is not None and (overrule < 0 or overrule == 1):  # one image has nobody to exchange decisions with
        raise ConfigError(f"overrule={overrule}: expected 0 for none, at least 2 images, or None for all")
    model = unwrapped(model)
    check_not_packed(model)
    layers = moe_layers(model)
    if not layers:
        raise VimoeError("the model has no MoE layer: expected one that vimoe.upcycle made")
    parents = {} if parent is None else _parents(unwrapped(parent), layers)
    most = decisions.KEPT_IMAGES if overrule is None else overrule
    subjects = Subjects(model, loader, list(layers), most, metric, process)
    if probe:
        check_probed(layers, subjects.metric.by_patch, overrule)
    base, seen = observe(model, subjects, layers, seed, "observing the routing" if progress else "")
    if sequences is not None and len(sequences) != base.images:
        raise ConfigError(f"{len(sequences)} sequences of {base.images} images: expected one for each image")
    videos = None if sequences is None else [sequences[place] for place in seen.places.tolist()]
    gates = {name: seen.per_image(name, seen.gates[name]) for name in layers}
    gate_mass = {name: gates[name].sum(axis=0) / seen.experts[name][..., 0].size for name in layers}
    labelled = np.flatnonzero((seen.labels >= 0).any(axis=1)) if seen.by_patch else np.arange(len(seen.labels))
    overruled = min(len(labelled), len(labelled) if overrule is None else overrule)
    rng = np.random.default_rng(seed)
    rows = labelled[np.sort(rng.choice(len(labelled), overruled, replace=False))]  # of an image of void nothing changes
    donors = np.stack([rng.permutation(overruled) for _ in range(draws)], axis=1)  # of the images that are measured
    overruled_units, overruled_sequences = numbered(videos and [videos[row] for row in rows.tolist()])
    task = "overruling the routing" if progress else ""
    subjects.choose(Images(seen.places[rows], seen.signatures[rows]))
    measured = (rows, donors, overruled_units)
    effects = _effects(subjects, layers, seen, gate_mass, *measured, seed, task) if overruled else {}
    if probe:
        tables = {name: ByClass.of(seen, name, len(subjects.metric.classes)).table() for name in layers}
        task = "probing the experts" if progress else ""
        probes = probe_experts(subjects, layers, tables, seen.labels[rows], seed, overruled_units, task)
        effects = {name: {**effects[name], "probe": probes[name].to_dict()} for name in layers}
    facts = {"base": base, "overruled_images": overruled, "draws": draws, "overruled_sequences": overruled_sequences}
    more = (effects, parents, videos, seed, facts)
    return subjects.process.once(_evidence, subjects, layers, seen, gates, gate_mass, *more)


def _evidence(
    subjects: Subjects, layers: Mapping[str, MoE], seen: Decisions, gates: Mapping[str, np.ndarray],
    gate_mass: Mapping[str, np.ndarray], effects: Mapping[str, dict[str, Any]], parents: Mapping[str, nn.Module],
    videos: Sequence[Hashable] | None, seed: int, facts: Mapping[str, Any],
) -> Evidence:  # fmt: skip
    """Return the evidence of what was seen of all images, of the effects by layer, and of facts, which are fields."""
    classes = subjects.metric.classes
    by_class = {name: ByClass.of(seen, name, len(classes)) for name in layers}
    units, how_many = numbered(videos)
    half = halves(np.zeros(len(seen.labels)) if seen.by_patch else seen.labels + 1, seed, units)
    counts = {name: seen.per_image(name) for name in layers}
    tables = {name: found.table() for name, found in by_class.items()}
    drawn = {name: found.table(~half) for name, found in by_class.items()}
    class_order, expert_orders = block_order.orders([tables[name] - drawn[name] for name in layers])
    evidence = []
    for (name, layer), expert_order in zip(layers.items(), expert_orders, strict=True):
        config = layer.config
        evidence.append(
            LayerEvidence(
                name=name,
                routing=config.routing,
                num_experts=config.num_experts,
                top_k=layer.router.slots,
                counts=tables[name],
                drawn=drawn[name],
                expert_order=expert_order,
                gate_mass=gate_mass[name],
                adjusted_mutual_information=by_class[name].dependence(seed, units),
                effective_experts=expert_usage.effective_number(by_class[name].per_image(), seed, units),
                comparison=compare_experts(layer, seen.inputs[name], parents.get(name)).to_dict(),
                diversity=measure_diversity(layer, seen.inputs[name]),
                examples=() if seen.by_patch else seen.examples(gates[name]),
                **effects.get(name, {"draws": 0, "permuted": None, "frozen": None, "dense": {}, "experts": ()}),
            )
        )
    choices = [(_choices(layer, seen.experts[name].shape[1]), layer.router.ragged) for name, layer in layers.items()]
    return Evidence(
        layers=tuple(evidence),
        classes=tuple(classes),
        images=len(seen.labels),
        class_order=class_order,
        pairs=expert_usage.activated_pairs(list(counts.values()), seed, units),
        routes=(*expert_usage.routes(list(seen.experts.values())), expert_usage.possible_routes(choices)),
        agreement=agreement([expert_usage.favourites(counts[n], gates[n]) for n in layers], seed, units),
        sequences=how_many,
        features=subjects.features,
        **facts,
    )


def _choices(layer: MoE, units: int) -> tuple[int, ...]:
    """Return how many sets of experts a token of each kind can get; of a single token, the first one, of its kind."""
    return layer.router.num_decisions[: 1 if units == 1 else None]


def _parents(parent: nn.Module, layers: Mapping[str, MoE]) -> dict[str, nn.Module]:
    """Return the FFN of a dense model in the place of each MoE layer. Raises ConfigError if there is none."""
    dense = {site.name: site.module for site in sites(parent) if ffn.is_ffn(site.module)}
    found = {}
    for name, layer in layers.items():
        dim = layer.experts.kind.dim
        if name not in dense or ffn.describe(dense[name]).dim != dim:
            raise ConfigError(
                f"parent={type(parent).__name__}: it has no FFN of {dim} channels at {name}: expected the dense model "
                f"that was upcycled"
            )
        found[name] = ffn.as_linear(dense[name])
    return found


def _effects(
    subjects: Subjects, layers: Mapping[str, MoE], seen: Decisions, gate_mass: Mapping[str, np.ndarray],
    rows: np.ndarray, donors: np.ndarray, sequences: np.ndarray | None, seed: int, task: str,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The fields of LayerEvidence that tell of interventions, by layer.

    The images that are measured are `rows` of those seen, of these `sequences`. Decisions are permuted between single
    images all the same (`donors`, a column a draw): what `permuted` means should not depend on who is whose neighbour.
    """

    def handed(name: str, some: slice) -> list[Handed]:
        experts, gates = torch.from_numpy(seen.experts[name]), torch.from_numpy(seen.gates[name])
        return [Handed(experts, gates, torch.from_numpy(rows[draw])) for draw in donors.T[some]]

    draws = donors.shape[1]
    first = {name: min(FIRST_DRAWS, draws) if subjects.blocks_after(name) else draws for name in layers}
    first |= {name: 0 for name, layer in layers.items() if not layer.router.overrulable}
    others = {name: _interventions(layer, seen, name, gate_mass[name]) for name, layer in layers.items()}
    plan = {name: [*handed(name, slice(first[name])), *sum(groups.values(), [])] for name, groups in others.items()}
    changes = measure(subjects, plan, task)
    permuted = {name: each.columns(slice(first[name])) for name, each in changes.items()}

    def enough_of(name: str) -> int:
        if first[name] in (0, draws):
            return first[name]
        return enough_draws(permuted[name].loss, donors[:, : first[name]], draws, seed, sequences)

    process = subjects.process  # one of them judges what all do next
    enough = process.once(lambda: {name: enough_of(name) for name in layers})
    more = {name: handed(name, slice(first[name], to)) for name, to in enough.items() if to > first[name]}
    if more:
        for name, also in measure(subjects, more, task and f"{task}, more draws").items():
            permuted[name] = permuted[name].beside(also)

    def fields(name: str) -> dict[str, Any]:
        given = donors[:, : enough[name]]
        effects = iter(Effect.each(changes[name].columns(slice(first[name], None)), seed, sequences))
        found = {key: [next(effects) for _ in group] for key, group in others[name].items()}
        return {
            "draws": enough[name],
            "permuted": Effect.of_draws(permuted[name], given, seed, sequences) if enough[name] else None,
            "frozen": next(iter(found.pop("frozen", ())), None),
            "experts": tuple(found.pop("experts", ())),
            "dense": {how: effect for how, (effect,) in found.items()},
        }

    return process.once(lambda: {name: fields(name) for name in layers})


def _interventions(layer: MoE, seen: Decisions, name: str, gate_mass: np.ndarray) -> dict[str, list[Intervention]]:
    """The interventions on a layer by kind, but for permutations."""
    dense: dict[str, list[Intervention]] = {
        how: [layer.dense(how, torch.from_numpy(gate_mass))] for how in layer.densify_methods
    }
    if not layer.router.overrulable:
        return dense
    n, removable = layer.config.num_experts, layer.router.removable
    return {
        "frozen": [most_frequent(layer, seen.experts[name], seen.gates[name])],
        "experts": [Without(expert) for expert in removable] if len(removable) == n else [],
        **dense,
    }


def most_frequent(layer: MoE, experts: np.ndarray, gates: np.ndarray) -> Frozen:
    """Return the most frequent one of the decisions (I, U, K), or of those that chose any expert of each pool."""
    pools = layer.config.pools
    if len(pools) == 1:
        return Frozen(*map(torch.from_numpy, expert_usage.most_frequent(experts, gates)))
    pool_of = np.append(np.repeat(np.arange(len(pools)), pools), -1)[experts.max(axis=-1)]  # the last of no expert
    nothing = np.full(experts.shape[-1], -1), np.zeros(experts.shape[-1])
    each = [
        expert_usage.most_frequent(experts[own], gates[own]) if (own := pool_of == pool).any() else nothing
        for pool in range(len(pools))
    ]
    return Frozen(*(torch.from_numpy(np.stack(part)) for part in zip(*each, strict=True)))
