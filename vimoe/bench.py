"""What an MoE layer, or a model with some, costs beside dense FFNs of the same arithmetic, in time and memory.

All contestants of a comparison run in turn in one process, round by round, and are compared as ratios within a round:
a machine that is slow for a while is slow for all of them.

Axes: B images, T tokens of an image, D channels, F hidden units, N experts, k of them for a token.
"""

from __future__ import annotations

import copy
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError
from vimoe.models.cost import count
from vimoe.models.create import create
from vimoe.models.inference import optimize, set_backend
from vimoe.models.interface import find_backbone
from vimoe.models.precision import has_bfloat16, warn_of_slow_bfloat16
from vimoe.models.upcycling import upcycle
from vimoe.moe import MoE
from vimoe.moe.ffn import macs
from vimoe.moe.grouped_linear import BACKENDS, Backend, unfit_for_grouped_mm
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import TokenLayout
from vimoe.moe.routing import Routing, record
from vimoe.run_folder import versions
from vimoe.terminal import track

DRAWS = 2000
LONG = 300.0  # seconds that the rounds of a comparison may take
logger = logging.getLogger(__name__)
Contestants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Of one contestant.

    Attributes:
        name: of the contestant.
        seconds: median of the rounds.
        ratio: median over rounds of its time over the floor's in the same round.
        low, high: 95% interval of the ratio, by bootstrap over rounds.
        rounds: how many there were.
        gflops: activated multiply-adds a second, times two, in units of 1e9; None where they are not known.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    gflops: float | None = None

    def __str__(self) -> str:
        speed = "" if self.gflops is None else f"{self.gflops:9.0f} GFLOP/s"
        return (
            f"{self.name:<36}{1e3 * self.seconds:10.2f} ms {self.ratio:7.3f} [{self.low:.3f}, {self.high:.3f}]{speed}"
        )


def interleaved(contestants: Contestants, rounds: int, warmup: int = 2, what: str = "") -> dict[str, np.ndarray]:
    """Seconds of each contestant in each round, (rounds,). The order changes from round to round.

    Args:
        contestants: functions by name.
        rounds: in each of them every contestant runs once; fewer, at least 2, where all would take more than `LONG`.
        warmup: rounds before them, at least 1, which are not timed.
        what: a name for the bar that shows progress; without one there is none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = np.random.default_rng(0)

    def turn() -> float:
        for name in order.permutation(list(contestants)):
            start = time.perf_counter()
            contestants[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
        return sum(taken[-1] for taken in seconds.values())

    first = turn()
    if first * (warmup + rounds) > LONG:
        asked, rounds, warmup = rounds, max(2, min(rounds, int(LONG / first) - warmup)), 1
        logger.warning(
            "%s: all take %.0f s a round, so %d of %d rounds are timed, in about %.0f minutes; make it smaller",
            what or "benchmark", first, rounds, asked, first * rounds / 60,
        )  # fmt: skip
    turns = range(1, warmup + rounds)
    for _ in track(turns, what):
        turn()
    return {name: np.array(taken[warmup:]) for name, taken in seconds.items()}


def compare(seconds: Mapping[str, np.ndarray], floor: tuple[str, ...], flops: Mapping[str, float]) -> list[Timing]:
    """Each contestant against the one of `floor` with the least median, in pairs of a round."""
    fastest = min(floor, key=lambda name: float(np.median(seconds[name])))
    rounds = len(seconds[fastest])
    draws = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
    timings = []
    for name, taken in seconds.items():
        ratios = taken / seconds[fastest]
        low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
        middle = float(np.median(taken))
        speed = flops[name] / middle / 1e9 if name in flops else None
        timings.append(Timing(name, middle, float(np.median(ratios)), float(low), float(high), rounds, speed))
    return timings


def activations(compute: Callable[[], Tensor], without: list[Tensor], casts: bool = False) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, `without` e.g. weights.

    With `casts` nothing counts either that has a shape of theirs: an autocast keeps its copies of weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    shapes = {tuple(sorted(tensor.shape)) for tensor in without} if casts else set()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tuple(sorted(tensor.shape)) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()  # held, so that no storage is freed and its address used again
    del result
    return sum(kept.values())


def peak_gemm(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a plain product of square matrices, the best of five."""
    size = 8192 if device.type != "cpu" else 2048 if dtype != torch.bfloat16 or has_bfloat16() else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / float(interleaved({"": lambda: a @ b}, 5)[""].min()) / 1e9


def wanted(load: Literal["balanced", "zipf"], units: int, num_experts: int, top_k: int) -> Tensor:
    """(R, K) experts for the units: all alike often, or expert i with 1 / (i + 1) of the share of expert 0."""
    draw = np.random.default_rng(0)
    if load == "balanced":
        first = draw.permutation(np.arange(units) % num_experts)
        return torch.from_numpy((first[:, None] + np.arange(top_k)) % num_experts)
    shares = 1 / np.arange(1, num_experts + 1)
    return torch.from_numpy(
        np.stack([draw.choice(num_experts, top_k, replace=False, p=shares / shares.sum()) for _ in range(units)])
    )


def steer(layer: MoE, experts_RK: Tensor) -> None:
    """From now on these experts are chosen, with the gates of those that the router would; it costs what it does."""

    def overrule(router: nn.Module, args: Any, routing: Routing) -> Routing:
        return replace(routing, experts=experts_RK)

    layer.router.register_forward_hook(overrule)


class Beside(nn.Module):
    """FFNs side by side, as many as a token passes in an MoE layer, added up."""

    def __init__(self, dense: nn.Module, times: int) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(copy.deepcopy(dense) for _ in range(times))

    def forward(self, x_BTD: Tensor) -> Tensor:
        first, *others = self.ffns
        return sum((ffn(x_BTD) for ffn in others), first(x_BTD))


@dataclass(frozen=True)
class LayerCase:
    """What is compared in the shape of a layer: the input, the floor, and our layer with each backend.

    Attributes:
        x: (B, T, D).
        experts: (R, K) who computes what.
        layers: by name; all are in `x`'s type and on its device.
        floor: names of those that do the activated arithmetic without any routing.
        macs: activated multiply-adds of one token.
        autocast: whether the layers compute under autocast.
        left_out: by name, why torch cannot compute it so here.
    """

    x: Tensor
    experts: Tensor
    layers: dict[str, nn.Module]
    floor: tuple[str, ...]
    macs: int
    autocast: bool = False
    left_out: dict[str, str] = field(default_factory=dict)


def layer_case(bench: LayerBench, moe: MoEConfig, backends: Sequence[Backend] = BACKENDS) -> LayerCase:
    """Builds what `bench` asks for.

    Raises:
        ConfigError: for an MoE config without experts.
    """
    if not moe.num_experts:
        raise ConfigError("moe.num_experts=0: expected experts to time; the dense control is in the table anyway")
    torch.manual_seed(0)
    dtype, device = getattr(torch, bench.dtype), _device()
    dense = Mlp(bench.dim, bench.hidden).to(device, dtype)
    times = moe.top_k + moe.num_shared_experts
    floor = {"dense FFNs side by side": Beside(dense, times)}
    if times > 1:
        floor["one dense FFN of that width"] = Mlp(bench.dim, times * bench.hidden).to(device, dtype)
    units = bench.images * (bench.tokens if moe.routing == "token" else 1)
    experts_RK = wanted(bench.load, units, moe.num_experts, moe.top_k).to(device)
    x = torch.randn(bench.images, bench.tokens, bench.dim, device=device).to(dtype)
    computed = x.new_empty(0, dtype=_type_of_products(bench))
    ours: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for backend in backends:
        layer = MoE(copy.deepcopy(dense), moe, TokenLayout(1, True))
        if backend == "grouped_mm" and (
            why := unfit_for_grouped_mm(computed, layer.experts.weights(0)["fc1.weight"][None])
        ):
            left_out[f"vimoe {backend}"] = why
            continue
        steer(layer, experts_RK)
        ours[f"vimoe {backend}"] = set_backend(layer, backend)
    layers, autocast = {**floor, **ours}, bench.precision != "no"
    return LayerCase(x, experts_RK, layers, tuple(floor), times * macs(dense), autocast, left_out)


def layer_seconds(case: LayerCase, training: bool, rounds: int) -> dict[str, np.ndarray]:
    """Of each layer in each round: the forward pass without gradient, or with the backward pass to all weights and x.

    Forward, our layer and a floor run in their optimised form too.
    """
    x = case.x.clone().requires_grad_(training)
    dy = torch.randn_like(case.x, dtype=torch.bfloat16 if case.autocast else None)
    fast = {} if training or case.autocast else optimised(case.layers, case.floor[0], "vimoe auto")
    layers = case.layers | fast
    steps = {
        name: _step(layer, (x,), training, case.autocast, lambda y: y.backward(dy)) for name, layer in layers.items()
    }
    return interleaved(steps, rounds, what="training" if training else "forward")


def time_layers(case: LayerCase, training: bool, rounds: int) -> list[Timing]:
    """The layers against the floor."""
    seconds = layer_seconds(case, training, rounds)
    flops = 2 * case.macs * case.x.shape[:2].numel() * (3 if training else 1)
    return compare(seconds, case.floor, dict.fromkeys(seconds, flops))


def layer_memory(case: LayerCase) -> dict[str, int]:
    """Bytes that each layer keeps for its backward pass, its input among them."""
    # no leaf, as what a norm before the layer gives: an autocast would keep one copy of a leaf for all who read it
    x = case.x.clone().requires_grad_() * 1
    with _computing(case.autocast):
        return {
            name: activations(lambda layer=layer: layer.train()(x), list(layer.parameters()), case.autocast)  # type: ignore[misc]
            for name, layer in case.layers.items()
        }


def time_models(
    models: Mapping[str, nn.Module], floor: str, images: Tensor, training: bool, rounds: int, autocast: bool = False
) -> list[Timing]:
    """Whole models in the same way; the loss is the cross-entropy, and no optimiser steps."""
    labels = torch.arange(len(images), device=images.device)

    def descend(logits: Tensor) -> None:
        nn.functional.cross_entropy(logits, labels % logits.shape[-1]).backward()

    flops = {name: 2.0 * (3 if training else 1) * len(images) * count(model).macs for name, model in models.items()}
    contestants = models if training or autocast else {**models, **optimised(models, *models)}
    steps = {name: _step(model, (images,), training, autocast, descend) for name, model in contestants.items()}
    return compare(interleaved(steps, rounds, what="training" if training else "forward"), (floor,), flops)


def model_case(bench: ModelBench, model: ModelConfig, moe: MoEConfig) -> tuple[dict[str, nn.Module], Tensor]:
    """The dense parent and the ViMoE made of it, with random weights and balanced loads, and images for both.

    Raises:
        ConfigError: where no layer would become sparse.
    """
    if moe.layers == "none" or not moe.num_experts:
        setting = f"moe.layers={moe.layers!r}" if moe.num_experts else "moe.num_experts=0"
        raise ConfigError(f"{setting}: expected MoE layers to time beside the dense model; leave it out")
    torch.manual_seed(0)
    dtype, device = getattr(torch, bench.dtype), _device()
    dense = create(replace(model, pretrained=False)).to(device, dtype)
    sparse = upcycle(copy.deepcopy(dense), moe)
    size = find_backbone(dense).input_size
    images = torch.randn(bench.images, *size, device=device).to(dtype)
    with torch.no_grad(), record(sparse) as routings:
        sparse(images)
    for layer, routing in zip(moe_layers(sparse).values(), routings, strict=True):
        steer(layer, wanted("balanced", len(routing.experts), moe.num_experts, moe.top_k).to(device))
    return {"dense": dense, "vimoe": sparse}, images


def optimised(modules: Mapping[str, nn.Module], *names: str) -> dict[str, nn.Module]:
    """Copies of the named modules after `vimoe.optimize`."""
    return {f"{name}, optimised": optimize(copy.deepcopy(modules[name])) for name in names}


def _step(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    training: bool,
    autocast: bool,
    backward: Callable[[Tensor], None],
) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad(), _computing(autocast):  # no inference mode: what a layer keeps could not be trained then
            module(*inputs)

    def step() -> None:
        for tensor in (*inputs, *module.parameters()):
            tensor.grad = None
        with _computing(autocast):
            result = module(*inputs)
        backward(result)

    module.train(training)
    return step if training else forward


def _computing(autocast: bool) -> torch.autocast:
    return torch.autocast(_device().type, torch.bfloat16, enabled=autocast)


def _warn_where_slow(bench: ModelBench) -> None:
    if _type_of_products(bench) == torch.bfloat16:
        setting = "bench.precision=bf16" if bench.precision == "bf16" else "bench.dtype=bfloat16"
        warn_of_slow_bfloat16(setting, "leave it out to time float32")


def _type_of_products(bench: ModelBench) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, bench.dtype) if bench.precision == "no" else torch.bfloat16
    return dtype


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured in one go, and on what.

    Attributes:
        of: what was timed, in words.
        timings: by "forward" and "training" (forward and backward, without an optimiser).
        bytes_kept: by contestant, for the backward pass; empty where it was not looked at.
        peak_gflops: of a plain square product of the same type.
        machine: device, threads, versions.
        left_out: by contestant, why it could not be timed.
    """

    of: str
    timings: dict[str, list[Timing]]
    bytes_kept: dict[str, int]
    peak_gflops: float
    machine: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            self.of,
            f"a plain matrix product reaches {self.peak_gflops:.0f} GFLOP/s; ratios are to the faster floor",
        ]
        for what, timings in self.timings.items():
            lines += ["", f"{what}, {timings[0].rounds} rounds", *map(str, timings)]
        if self.bytes_kept:
            least = min(self.bytes_kept.values())
            lines += ["", "kept for the backward pass"]
            lines += [f"{name:<36}{n / 1e6:10.2f} MB {n / least:7.3f}" for name, n in self.bytes_kept.items()]
        if self.left_out:
            lines += ["", *(f"left out: {name}, with {why}" for name, why in self.left_out.items())]
        return "\n".join(lines)


def bench_layer(bench: LayerBench, moe: MoEConfig, backends: Sequence[Backend] = BACKENDS) -> Benchmark:
    """What `vimoe bench layer` shows; "auto" must be among the backends."""
    _warn_where_slow(bench)
    case = layer_case(bench, moe, backends)
    shape = (
        f"{bench.images} x {bench.tokens} tokens, D {bench.dim}, F {bench.hidden}, N {moe.num_experts}, k {moe.top_k}"
    )
    return Benchmark(
        of=f"{shape}, {moe.num_shared_experts} shared, {moe.routing} routing, {bench.load} load, {bench.words}",
        timings={name: time_layers(case, name == "training", bench.rounds) for name in ("forward", "training")},
        bytes_kept=layer_memory(case),
        peak_gflops=peak_gemm(_type_of_products(bench), case.x.device),
        machine=machine(),
        left_out=case.left_out,
    )


def bench_model(bench: ModelBench, model: ModelConfig, moe: MoEConfig) -> Benchmark:
    """What `vimoe bench model` shows."""
    _warn_where_slow(bench)
    models, images = model_case(bench, model, moe)
    return Benchmark(
        of=f"{model.name}, {moe.routing} routing, {bench.images} images of {tuple(images.shape[1:])}, {bench.words}",
        timings={
            name: time_models(models, "dense", images, name == "training", bench.rounds, bench.precision != "no")
            for name in ("forward", "training")
        },
        bytes_kept={},
        peak_gflops=peak_gemm(_type_of_products(bench), images.device),
        machine=machine(),
    )


def machine() -> dict[str, Any]:
    """Device, threads and versions that figures depend on."""
    device = _device()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {"device": name, "threads": torch.get_num_threads(), **versions()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
