"""Options of tiny segmentation runs."""

from __future__ import annotations

from helpers.commands import QUICK, TINY

SCENES = ["--data.task=segmentation", *TINY, *QUICK, "--train.batch_size=3"]


MOE = ["--moe.layers=last:1", "--moe.routing=token", "--moe.num_experts=3"]
