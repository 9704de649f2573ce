"""Layouts of a training over devices: what each holds and sends, and the smallest that fits. Arithmetic alone.

A layout is a mesh (data, fsdp, expert) = (d, f, e) of processes, one to a device. Each has an equal part of the global
batch. Experts of a layer are divided over e and f, all other weights over f; the other dimensions hold copies. With G
the bytes of gradients, each device has:

    weights, state of the optimiser and moving average: dense / f + experts / (e f)
    peak of a step: the largest sum over its moments of all tensors, with
        f e > 1: what is gathered at the moment, and gradients that are divided block by block
            (`vimoe.training.gathering`)
        f = e = 1, several copies: gradients once more, in the buckets of the all-reduce

Bytes that a device sends in a step that updates the weights, by the ring algorithms (n - 1) / n of the data for an
all-gather or a reduce-scatter among n, twice that for an all-reduce:

    data: all-reduce of the gradients: G_dense / f among d e, G_experts / (e f) among d
    fsdp: all-gather of the weights in the forward pass, and again in the backward pass from the first trained block on
        (what is outside of blocks stays gathered); reduce-scatter of the gradients
    expert: all-to-alls of tokens, two forward and two backward for each MoE layer, of which (e - 1) / e leave

The context of a GPU, buffers of communication libraries and what an allocator wastes are left out: about a tenth of the
memory should stay free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vimoe.config.parallel import ParallelConfig
from vimoe.errors import ConfigError, counted
from vimoe.files import in_units
from vimoe.training.footprint import Footprint
from vimoe.training.gathering import spread_peak

PARTS = {
    "weights": "weights and buffers", "optimizer": "state of AdamW", "ema": "moving average",
    "step": "peak of a step, with what is gathered at the time", "gradients": "  gradients",
    "activations": "  activations", "temporary": "  temporary tensors",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Bytes of one device in a mesh.

    Attributes:
        mesh: the mesh.
        memory: bytes by the names in PARTS; `step` is the largest sum of gradients, activations and temporary tensors.
        sent: bytes sent in a step by each dimension of the mesh, "data", "fsdp" and "expert".
    """

    mesh: ParallelConfig
    memory: dict[str, float]
    sent: dict[str, float]

    @property
    def total(self) -> float:
        """Largest memory at any moment."""
        return sum(self.memory[part] for part in ("weights", "optimizer", "ema", "step"))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        return {**asdict(self.mesh), "memory": {**self.memory, "total": self.total}, "sent": self.sent}


@dataclass(frozen=True)
class SizePlan:
    """Layouts of a training over a number of devices. Print it.

    Attributes:
        devices: number of devices.
        limit: memory of each in bytes.
        images: number of images of a device in a step.
        precision: number format of the products.
        layouts: all layouts that divide evenly, or the one that was asked for.
    """

    devices: int
    limit: float
    images: int
    precision: str
    layouts: tuple[Layout, ...]

    @property
    def chosen(self) -> Layout | None:
        """The layout that fits and divides weights among the fewest devices; of these, the one that sends least."""
        return min((each for each in self.layouts if each.total <= self.limit), key=_order, default=None)

    @property
    def shown(self) -> Layout:
        """The chosen layout, or the smallest where none fits."""
        return self.chosen or min(self.layouts, key=lambda layout: layout.total)

    def _rank(self, layout: Layout) -> tuple[float, ...]:
        return layout.total > self.limit, *_order(layout)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it; `layout` is None where none fits."""
        return {
            "devices": self.devices,
            "limit": self.limit,
            "images": self.images,
            "precision": self.precision,
            "layout": self.chosen and self.chosen.to_dict(),
            "layouts": [layout.to_dict() for layout in sorted(self.layouts, key=_order)],
        }

    def __str__(self) -> str:
        shown, chosen = self.shown, self.chosen
        verdict = "fits" if chosen else "the smallest, and it does not fit"
        lines = [
            f"{counted(self.devices, 'device')} of {in_units(self.limit)}, {counted(self.images, 'image')} each, "
            f"weights in float32{'' if self.precision == 'no' else f', products in {self.precision}'}:",
            f"train.parallel={shown.mesh} {verdict}: {in_units(shown.total)} a device",
        ]
        lines += [f"  {text:<50}{in_units(shown.memory[part]):>12}" for part, text in PARTS.items()]
        lines += [f"  {'sent in a step, ' + name:<50}{in_units(size):>12}" for name, size in shown.sent.items()]
        if chosen is None:
            lines.append("lower train.batch_size and raise train.accumulation, or use more devices")
        best = [min(same, key=self._rank) for same in _by_shared(self.layouts)]
        lines += [
            "",
            f"  {'data':>6}{'fsdp':>6}{'expert':>8}{'a device':>12}{'sent: data':>12}{'fsdp':>12}{'expert':>12}",
        ]
        for each in best:
            sent = "".join(f"{in_units(size):>12}" for size in each.sent.values())
            mesh = f"  {each.mesh.data:>6}{each.mesh.fsdp:>6}{each.mesh.expert:>8}"
            lines.append(f"{mesh}{in_units(each.total):>12}{sent}{'' if each.total > self.limit else '  fits'}")
        return "\n".join(lines)


def plan_size(
    found: Footprint, asked: ParallelConfig, devices: int, limit: float, precision: str,
    trains: Callable[[ParallelConfig], bool] = lambda mesh: True,
) -> SizePlan:  # fmt: skip
    """Return the layouts of a training over devices.

    Args:
        found: footprint of the images of one device.
        asked: `train.parallel`; all layouts are tried where it is the default.
        devices: number of devices.
        limit: memory of each in bytes.
        precision: number format of the products.
        trains: function of a mesh; False for one that a training would refuse, which is left out.

    Raises:
        ConfigError: if the layout that was asked for does not divide evenly.
    """
    meshes = [asked.over(devices)] if asked != ParallelConfig() else [*_meshes(devices)]
    fitting = [mesh for mesh in meshes if (mesh.expert == 1 or _can_divide(found, mesh.expert)) and trains(mesh)]
    if not fitting:
        raise ConfigError(
            f"train.parallel.expert={asked.expert}: expected 1, or a divisor of the number of experts of every MoE "
            f"layer, whose router sends tokens to experts; change it"
        )
    layouts = tuple(layout(found, mesh) for mesh in fitting)
    return SizePlan(devices, limit, found.images, precision, layouts)


def layout(found: Footprint, mesh: ParallelConfig) -> Layout:
    """Return what each device of a mesh holds and sends, by the formulas at the top of this module."""
    assert mesh.data is not None
    copies, fsdp, expert = mesh.data * mesh.expert, mesh.fsdp, mesh.fsdp * mesh.expert

    def divided(dense: float, of_experts: float) -> float:
        return dense / fsdp + of_experts / expert

    weights = divided(found.sum("dense"), found.sum("expert")) + found.buffers
    dense = found.sum("trained_dense") / fsdp
    experts = found.sum("trained_expert") / expert
    received = sum(each.bytes for each in found.exchanges) if mesh.expert > 1 else 0
    if mesh.spreads:
        step = spread_peak(found, mesh)
    else:
        step = found.peak + (dense + experts if copies > 1 else 0)
    return Layout(
        mesh,
        {
            "weights": weights,
            "optimizer": divided(*found.optimizer),
            "ema": weights * found.ema,
            "step": step,
            "gradients": dense + experts,
            "activations": found.activations + received,
            "temporary": found.temporary,
        },
        {
            "data": 2 * (_leaving(copies) * dense + _leaving(mesh.data) * experts),
            "fsdp": _leaving(fsdp) * (_gathered(found, mesh.expert) + fsdp * (dense + experts)),
            "expert": _leaving(mesh.expert) * sum(each.bytes * each.times for each in found.exchanges),
        },
    )


def _gathered(found: Footprint, expert: int) -> float:
    """Return the bytes of weights that FSDP gathers in a step."""
    *blocks, rest = [each.dense + each.expert / expert for each in found.weights]
    trained = [bool(each.trained_dense or each.trained_expert) for each in found.weights[:-1]]
    first = trained.index(True) if any(trained) else len(blocks)
    return sum(blocks) + rest + sum(blocks[first:])


def _leaving(devices: int) -> float:
    """Return the share of data that leaves a device, evenly divided among so many."""
    return (devices - 1) / devices


def _can_divide(found: Footprint, expert: int) -> bool:
    return bool(found.experts) and all(number % expert == 0 for number in found.experts)


def _meshes(devices: int) -> Iterator[ParallelConfig]:
    """Yield all meshes of so many devices."""
    for data in (n for n in range(1, devices + 1) if devices % n == 0):
        rest = devices // data
        for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield ParallelConfig(data=data, fsdp=fsdp, expert=rest // fsdp)


def _by_shared(layouts: tuple[Layout, ...]) -> list[list[Layout]]:
    """Return the layouts by the number of devices that divide the experts among them."""
    groups: dict[int, list[Layout]] = {}
    for each in sorted(layouts, key=_order):
        groups.setdefault(each.mesh.fsdp * each.mesh.expert, []).append(each)
    return list(groups.values())


def _order(layout: Layout) -> tuple[float, ...]:
    return layout.mesh.fsdp * layout.mesh.expert, sum(layout.sent.values())
