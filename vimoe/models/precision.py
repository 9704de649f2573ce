"""Which number format trains a model fastest on this machine."""

from __future__ import annotations

import functools
import logging
import platform
from dataclasses import replace

import torch
from torch import nn

from vimoe.config.train import Precision, TrainConfig
from vimoe.models.interface import vit
from vimoe.process import Process

logger = logging.getLogger(__name__)


_PROCESSORS = {"cpu": "CPU", "cuda": "GPU"}


NARROW = 192  # channels, those of ViT-Ti: on a CPU, autocast costs narrower ViTs more than bfloat16 saves them


def fastest_precision(model: nn.Module) -> tuple[Precision, str]:
    """Return "bf16" or "no" (float32), whichever is known to train the model faster on this machine, and why."""
    device = _device()
    if device not in ("cpu", "cuda"):
        return "no", f"bfloat16 was not measured on {device}"
    if not has_bfloat16():
        return "no", f"this {_PROCESSORS[device]} has no bfloat16"
    channels = getattr(vit(model), "embed_dim", 0)
    if device == "cpu" and channels < NARROW:
        return "no", f"bfloat16 is no faster on a CPU for a ViT of {channels} channels"
    return "bf16", f"this {_PROCESSORS[device]} has bfloat16"


def resolve(config: TrainConfig, model: nn.Module) -> TrainConfig:
    """Return the settings with `precision` "auto" replaced by what it means for this model on this machine."""
    if config.precision != "auto":
        return config
    precision, why = fastest_precision(model)
    logger.info("train.precision auto: %s, because %s", precision, why)
    return replace(config, precision=precision)


def has_bfloat16() -> bool:
    """False where this machine is known to emulate products of bfloat16, slower than those of float32.

    On a CPU torch's own test is passed by AVX-512 without bfloat16 too, where oneDNN converts each operand.
    """
    device = _device()
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return True
    alike = platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and alike)


@functools.cache  # once is enough
def warn_of_slow_bfloat16(setting: str, remedy: str) -> None:
    """Logs a warning where this machine emulates the bfloat16 that a setting asks for.

    Args:
        setting: what asks for it.
        remedy: what to ask for instead.
    """
    if not has_bfloat16():
        processor = _PROCESSORS[_device()]
        logger.warning("%s is slow: this %s has no bfloat16 and emulates it; %s", setting, processor, remedy)


def _device() -> str:
    return Process().device.type
