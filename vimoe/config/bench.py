"""Settings of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vimoe.config.checks import bounded, check_fields
from vimoe.errors import ConfigError

BenchType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """Settings of `vimoe bench model`.

    Args:
        images: number of images in a batch.
        dtype: type of weights and images.
        precision: "bf16" for autocast with weights in float32, as `TrainConfig.precision`; models of `vimoe.optimize`
            have one type only, and are then left out.
        rounds: number of rounds, in each of which every contestant runs once; lowered, with a warning, if they would
            take long.
    """

    images: int = bounded(16, 1)
    dtype: BenchType = "float32"
    precision: Literal["no", "bf16"] = "no"
    rounds: int = bounded(30, 2)  # one round gives no interval

    def __post_init__(self) -> None:
        check_fields(self)
        if self.precision != "no" and self.dtype != "float32":
            raise ConfigError(
                f"precision={self.precision!r} with dtype={self.dtype!r}: expected dtype='float32', the weights' type "
                f"under autocast; leave one of them out"
            )

    @property
    def words(self) -> str:
        """Words for the types that are used."""
        return self.dtype if self.precision == "no" else "bfloat16 autocast of float32"


@dataclass(frozen=True, kw_only=True)
class LayerBench(ModelBench):
    """Settings of `vimoe bench layer`.

    Args:
        images: number of images in a batch.
        dtype: type of weights and images.
        precision: "bf16" for autocast with weights in float32, as `TrainConfig.precision`.
        rounds: number of rounds, in each of which every contestant runs once; lowered, with a warning, if they would
            take long.
        tokens: number of tokens of an image.
        dim: number of channels.
        hidden: number of hidden units of an FFN.
        load: "balanced" for equal shares, or "zipf" for 1 / (i + 1) of expert 0's share for expert i.
    """

    tokens: int = bounded(257, 1)
    dim: int = bounded(384, 1)
    hidden: int = bounded(1536, 1)
    load: Literal["balanced", "zipf"] = "balanced"
