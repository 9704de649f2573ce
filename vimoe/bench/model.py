"""Cost of a model with MoE layers beside its dense parent."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vimoe import process
from vimoe.bench.result import Benchmark, machine, peak_gemm
from vimoe.bench.step import force_routing, forced_experts, optimised, step_of, type_of_products, warn_if_slow
from vimoe.bench.timing import Timing, compare, interleaved
from vimoe.config.bench import ModelBench
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError
from vimoe.models.cost import count
from vimoe.models.create import create
from vimoe.models.interface import find_backbone
from vimoe.models.reading import ignoring_hooks, set_reading, tokens_read
from vimoe.models.upcycling import build_layers
from vimoe.moe.layer import moe_layers
from vimoe.moe.routing import record


def time_models(
    models: Mapping[str, nn.Module], floor: str, images: Tensor, training: bool, rounds: int, autocast: bool = False
) -> list[Timing]:
    """Return the timing of each model against the floor.

    Args:
        models: contestants by name; in the forward pass their optimised forms run too.
        floor: name of the dense model.
        images: (B, 3, H, W).
        training: True for forward and backward pass of the cross-entropy, without an optimiser's step.
        rounds: number of rounds.
        autocast: True to compute under autocast to bfloat16.
    """
    labels = torch.arange(len(images), device=images.device)

    def descend(logits: Tensor) -> None:
        nn.functional.cross_entropy(logits, labels % logits.shape[-1]).backward()

    flops = {
        name: 2.0 * (3 if training else 1) * len(images) * count(model).computed_macs for name, model in models.items()
    }
    contestants = models if training or autocast else {**models, **optimised(models, *models)}
    steps = {name: step_of(model, (images,), training, autocast, descend) for name, model in contestants.items()}
    with ignoring_hooks():  # that force the loads
        times = interleaved(steps, rounds, what="training" if training else "forward")
    return compare(times, (floor,), flops)


def model_case(bench: ModelBench, model: ModelConfig, moe: MoEConfig) -> tuple[dict[str, nn.Module], Tensor]:
    """Return a dense model and the ViMoE made of it, with random weights and balanced loads, and images for both.

    The dense model is as its library computes it. Where `model.read` saves work, it stands there once more with that.

    Raises:
        ConfigError: if no layer would become sparse.
    """
    if moe.layers == "none" or not moe.num_experts:
        setting = f"moe.layers={moe.layers!r}" if moe.num_experts else "moe.num_experts=0"
        raise ConfigError(f"{setting}: expected MoE layers to time beside the dense model; leave it out")
    torch.manual_seed(0)
    dtype, device = getattr(torch, bench.dtype), process.device()
    dense = create(replace(model, pretrained=False, read="all")).to(device, dtype)
    narrow = set_reading(copy.deepcopy(dense), model.read)
    sparse = copy.deepcopy(narrow)
    build_layers(sparse, moe)
    size = find_backbone(dense).input_size
    images = torch.randn(bench.images, *size, device=device).to(dtype)
    with torch.no_grad(), record(sparse) as routings:
        sparse(images)
    for layer, routing in zip(moe_layers(sparse).values(), routings, strict=True):
        force_routing(layer, forced_experts("balanced", len(routing.experts), moe.num_experts, moe.top_k).to(device))
    parents = {"dense": dense} if tokens_read(narrow) is None else {"dense": dense, "dense, read tokens": narrow}
    return {**parents, "vimoe": sparse}, images


def bench_model(bench: ModelBench, model: ModelConfig, moe: MoEConfig) -> Benchmark:
    """Return the result of `vimoe bench model`."""
    warn_if_slow(bench)
    models, images = model_case(bench, model, moe)
    return Benchmark(
        of=f"{model.name}, {moe.routing} routing, {bench.images} images of {tuple(images.shape[1:])}, {bench.words}",
        timings={
            name: time_models(models, "dense", images, name == "training", bench.rounds, bench.precision != "no")
            for name in ("forward", "training")
        },
        bytes_kept={},
        peak_gflops=peak_gemm(type_of_products(bench), images.device),
        machine=machine(),
    )
