"""Result of a benchmark: timings, memory, and the machine."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vimoe import process
from vimoe.bench.timing import Timing, interleaved
from vimoe.models.precision import has_bfloat16
from vimoe.run_folder import versions


@dataclass(frozen=True)
class Benchmark:
    """Result of one benchmark. Print it.

    Attributes:
        of: shape and settings, in words.
        timings: timings by "forward" and "training" (forward and backward pass, without an optimiser).
        bytes_kept: bytes kept for the backward pass, by contestant; empty where they were not measured.
        peak_gflops: speed of a plain square matrix product of the same type, in GFLOP/s.
        machine: device, threads, versions.
        left_out: reason why a contestant could not be timed, by name.
    """

    of: str
    timings: dict[str, list[Timing]]
    bytes_kept: dict[str, int]
    peak_gflops: float
    machine: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON has it."""
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


def peak_gemm(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of a plain product of square matrices, the best of five."""
    size = 8192 if device.type != "cpu" else 2048 if dtype != torch.bfloat16 or has_bfloat16() else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / float(interleaved({"": lambda: a @ b}, 5)[""].min()) / 1e9


def machine() -> dict[str, Any]:
    """Return the device, threads and versions that figures depend on."""
    device = process.device()
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
