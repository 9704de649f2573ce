"""Choice of the number format that trains a model fastest on this machine."""

from __future__ import annotations

import functools
import logging
import platform
from dataclasses import replace

import torch
from torch import nn

from vimoe.config.train import Precision, TrainConfig
from vimoe.models.interface import find_backbone
from vimoe.process import device

logger = logging.getLogger(__name__)


_PROCESSORS = {"cpu": "CPU", "cuda": "GPU"}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # type of products by setting
NARROW = 192  # channels of ViT-Ti: on a CPU, autocast costs narrower ViTs more time than bfloat16 saves


def fastest_precision(model: nn.Module) -> tuple[Precision, str]:
    """Return "bf16" or "no" (float32), whichever is known to train the model faster on this machine, and why."""
    device = _device()
    if device not in ("cpu", "cuda"):
        return "no", f"bfloat16 was not measured on {device}"
    if not has_bfloat16():
        return "no", f"this {_PROCESSORS[device]} has no bfloat16"
    channels = find_backbone(model).width or 0
    if device == "cpu" and channels < NARROW:
        return "no", f"bfloat16 is no faster on a CPU for a ViT of {channels} channels"
    return "bf16", f"this {_PROCESSORS[device]} has bfloat16"


def resolve(config: TrainConfig, model: nn.Module) -> TrainConfig:
    """Return the settings with `precision` "auto" replaced by the format for this model on this machine."""
    if config.precision != "auto":
        return config
    precision, why = fastest_precision(model)
    logger.info("train.precision auto: %s, because %s", precision, why)
    return replace(config, precision=precision)


def has_bfloat16() -> bool:
    """Return False if this machine is known to emulate products of bfloat16, which is slower than float32.

    On a CPU torch's own test also passes for AVX-512 without bfloat16, where oneDNN converts each operand.
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
    """Log a warning if this machine emulates the bfloat16 that a setting asks for.

    Args:
        setting: the setting, with its value.
        remedy: the advice at the end of the warning.
    """
    if not has_bfloat16():
        processor = _PROCESSORS[_device()]
        logger.warning("%s is slow: this %s has no bfloat16 and emulates it; %s", setting, processor, remedy)


def _device() -> str:
    return device().type
