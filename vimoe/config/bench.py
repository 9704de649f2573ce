"""What benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from vimoe.config.checks import check_choice, check_count
from vimoe.errors import ConfigError

BenchType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """What `vimoe bench model` times.

    Args:
        images: of a batch.
        dtype: of weights and images.
        precision: "bf16" computes under autocast, as `TrainConfig.precision`, with weights in float32; what
            `vimoe.optimize` makes, of one type, is then left out.
        rounds: in each of them every contestant runs once; fewer, with a warning, where they would take long.
    """

    images: int = 16
    dtype: BenchType = "float32"
    precision: Literal["no", "bf16"] = "no"
    rounds: int = 30

    def __post_init__(self) -> None:
        for field_ in fields(self):
            if isinstance(field_.default, int):  # of one round there is no interval
                check_count(field_.name, getattr(self, field_.name), 2 if field_.name == "rounds" else 1)
        check_choice("dtype", self.dtype, get_args(BenchType))
        check_choice("precision", self.precision, ("no", "bf16"))
        if self.precision != "no" and self.dtype != "float32":
            raise ConfigError(
                f"precision={self.precision!r} with dtype={self.dtype!r}: expected dtype='float32', the weights' type "
                f"under autocast; leave one of them out"
            )

    @property
    def words(self) -> str:
        """In which type it computes."""
        return self.dtype if self.precision == "no" else "bfloat16 autocast of float32"


@dataclass(frozen=True, kw_only=True)
class LayerBench(ModelBench):
    """What `vimoe bench layer` times.

    Args:
        images, dtype, precision, rounds: as for a model.
        tokens: of an image.
        dim: channels.
        hidden: hidden units of an FFN.
        load: all experts alike, or expert i with 1 / (i + 1) of the share of expert 0 ("zipf").
    """

    tokens: int = 257
    dim: int = 384
    hidden: int = 1536
    load: Literal["balanced", "zipf"] = "balanced"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("load", self.load, ("balanced", "zipf"))
