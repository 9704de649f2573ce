"""Layout of a training over processes: the sizes of the mesh (data, fsdp, expert)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from vimoe.config.checks import bounded, check_fields
from vimoe.errors import ConfigError, counted


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh of processes, one to a device; data x fsdp x expert is their number.

    Each process computes an equal part of the global batch, whatever the sizes are.

    Args:
        data: number of groups that each hold all weights; by default what fsdp and expert leave of the processes.
        fsdp: number of processes that divide every weight, gradient and optimiser state among them (FSDP), and gather
            a block's weights when it computes.
        expert: number of processes that divide the experts of each MoE layer among them, and exchange tokens.

    Raises:
        ConfigError: if a size is no whole number of at least 1.
    """

    data: int | None = bounded(None, 1)
    fsdp: int = bounded(1, 1)
    expert: int = bounded(1, 1)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def processes(self) -> int:
        """Number of processes, with one group where `data` is open."""
        return (self.data or 1) * self.fsdp * self.expert

    @property
    def spreads(self) -> bool:
        """True if a process holds less than the whole model."""
        return self.fsdp * self.expert > 1

    def over(self, processes: int) -> ParallelConfig:
        """Return the mesh of so many processes, with `data` filled in.

        Raises:
            ConfigError: if the sizes do not multiply to the number of processes.

        >>> ParallelConfig(expert=2).over(8)
        ParallelConfig(data=4, fsdp=1, expert=2)
        """
        mesh = self if self.data else replace(self, data=max(1, processes // self.processes))
        if mesh.processes != processes:
            raise ConfigError(
                f"train.parallel={self} with {counted(processes, 'process', 'processes')}: "
                f"expected sizes whose product is {processes}; "
                f"change them, or the number of processes"
            )
        return mesh

    def check(self, batch_size: int, num_experts: int) -> None:
        """Raise ConfigError if the global batch, or the experts of a layer, cannot be divided equally.

        Args:
            batch_size: `train.batch_size`, of all processes together.
            num_experts: `moe.num_experts`; 0 for a model without MoE layers.
        """
        if batch_size % self.processes:
            raise ConfigError(
                f"train.batch_size={batch_size} over {self.processes} processes: expected a multiple of "
                f"{self.processes}; set {max(1, batch_size // self.processes) * self.processes}"
            )
        if self.expert > 1 and not num_experts:
            raise ConfigError(
                f"train.parallel.expert={self.expert} without MoE layers: expected 1; leave it out, or set moe.layers"
            )
        if num_experts % self.expert:
            fitting = math.gcd(num_experts, self.expert)
            raise ConfigError(
                f"train.parallel.expert={self.expert} with moe.num_experts={num_experts}: expected a divisor of "
                f"{num_experts}; set such as {fitting}"
            )

    def __str__(self) -> str:
        sizes = [("data", self.data), ("fsdp", self.fsdp), ("expert", self.expert)]
        return "{" + ", ".join(f"{name}: {'open' if size is None else size}" for name, size in sizes) + "}"


def bytes_of(text: str) -> float:
    """Return the bytes that a text names, with a unit of 1000 (GB) or 1024 (GiB) bytes to each power.

    Raises:
        ConfigError: if it names none.

    >>> bytes_of("80GB"), bytes_of("1.5 MiB")
    (80000000000.0, 1572864.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    if not found or not float(found[1]):
        raise ConfigError(f"memory={text!r}: expected the memory of a device with its unit, such as 80GB or 512MiB")
    power = 1 + "KMGT".index(found[2])
    return float(found[1]) * (1024 if found[3] else 1000) ** power
