"""How well given routes tell classes apart before any training, on test images that they were not made from.

    python studies/routes_at_start.py --model local-dir:dinov2 --data cub100 --img_size 112 --layers last:2

For each block and kind of router there are four figures. One is the adjusted mutual information of class and expert (0
is the chance level), with its interval over images. Two are numbers of experts in effect, exp of the entropy: those of
a class, as a mean over classes, and those of all images. The last is the mean probability of the chosen expert.
"even" sends images to experts at random. "softmax" is the mean of fresh rows of five seeds, with the range of the five
in place of an interval. The dense model runs once over `--images` training images and once over test. So each block's
figures are those of a ViMoE at step 0 that keeps the dense model's function.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from torch import nn

from vimoe.analysis.dependence import dependence
from vimoe.analysis.expert_usage import effective_number
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import ROUTERS, MoEConfig
from vimoe.config.settings import Settings
from vimoe.errors import VimoeError
from vimoe.experiments.train import CalibrationImages
from vimoe.files import write_json
from vimoe.models.calibration import calibrate
from vimoe.models.interface import find_backbone
from vimoe.models.upcycling import sites
from vimoe.moe import ffn
from vimoe.moe.router import Router
from vimoe.moe.start import Calibration
from vimoe.tasks.base import task_class

KINDS = ("softmax", "centroids", "superclass")
FRESH = 5  # draws of rows that are not computed from images


@dataclass(frozen=True)
class Row:
    """Figures of one router at one block.

    Attributes:
        ami: adjusted mutual information of class and expert, on test images.
        ami_interval: low and high of its 95% interval over images; where rows are drawn, the range of the draws.
        experts_of_a_class: exp of the entropy of a class's experts, a mean over classes.
        experts: exp of the entropy of the load.
        confidence: mean probability of the chosen expert.
    """

    layer: str
    router: str
    ami: float
    ami_interval: tuple[float, float]
    experts_of_a_class: float
    experts: float
    confidence: float


def measure(layer: str, router: str, expert_I: np.ndarray, label_I: np.ndarray, n: int, confidence: float) -> Row:
    """Return the figures for the expert of each image."""
    counts_IN = np.eye(n, dtype=np.int64)[expert_I]
    table_CN = np.stack([counts_IN[label_I == label].sum(axis=0) for label in np.unique(label_I)])
    ami = dependence(label_I, counts_IN)
    used, load = np.exp(entropy(table_CN, axis=1)).mean(), effective_number(counts_IN).value
    return Row(layer, router, ami.value, (ami.low, ami.high), float(used), load, confidence)


def at_layer(layer: str, start: Calibration, test: Calibration, make: Any, n: int, kinds: tuple[str, ...]) -> list[Row]:
    """Return a row for each kind of router.

    Args:
        layer: name of the FFN.
        start: what routers are computed from.
        test: what they are measured on.
        make: function that returns a new router of a kind.
        n: number of experts.
        kinds: names in `moe.router`.
    """
    assert test.labels is not None
    label_I = test.labels.numpy()
    rows = [measure(layer, "even", np.random.default_rng(0).integers(n, size=len(label_I)), label_I, n, 1 / n)]
    for kind in kinds:
        draws = []
        for seed in range(1 if ROUTERS.find(kind).needs_images else FRESH):
            torch.manual_seed(seed)
            router: Router = make(kind)
            router.calibrate(start)
            with torch.no_grad():
                scores_IN = router.score(test.features)
                chosen_I = router.route(scores_IN, (len(label_I), 1)).experts[:, 0]
            sure = float(router.probabilities(scores_IN).gather(1, chosen_I[:, None]).mean())
            draws.append(measure(layer, kind, chosen_I.numpy(), label_I, n, sure))
        figures = ("ami", "experts_of_a_class", "experts", "confidence")
        means = {name: float(np.mean([getattr(row, name) for row in draws])) for name in figures}
        amis = [row.ami for row in draws]
        spread = (min(amis), max(amis)) if len(draws) > 1 else draws[0].ami_interval
        rows.append(Row(layer, kind, ami_interval=spread, **means))
    return rows


def study(settings: Settings, kinds: tuple[str, ...] = KINDS) -> list[Row]:
    """Return the rows of all blocks that `settings.moe` names."""
    kind = task_class(settings)
    data, task = kind.find(settings.data), kind(settings)
    torch.manual_seed(settings.train.seed)
    model = kind.dense_model(settings.model, data)
    backbone, chosen = find_backbone(model), settings.moe.selection.select(sites(model))

    def make(name: str, dense: nn.Module) -> Router:
        router: Router = ROUTERS.find(name)(
            ffn.describe(dense).dim, MoEConfig(**{**settings.moe.to_dict(), "router": name}), backbone.layout,
            like=next(dense.parameters()),
        )  # fmt: skip
        return router

    readers = {site.name: make("softmax", site.module) for site in chosen}
    start = calibrate(model, readers, CalibrationImages(task, model, data))
    test = calibrate(model, readers, task.one_size(model, data, data.test or data.val))
    n, rows = settings.moe.num_experts, []
    for site in chosen:
        rows += at_layer(
            site.name, start[site.name], test[site.name], lambda name, site=site: make(name, site.module), n, kinds
        )
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| block's FFN | router | AMI, 95% interval | experts of a class | experts in use | confidence |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        low, high = row.ami_interval
        lines.append(
            f"| {row.layer} | {row.router} | {row.ami:.3f} [{low:.3f}, {high:.3f}] | {row.experts_of_a_class:.2f} | "
            f"{row.experts:.2f} | {row.confidence:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as model.name")
    parser.add_argument("--data", required=True, help="as data.path")
    parser.add_argument("--img_size", type=int)
    parser.add_argument("--layers", nargs="+", default=["last:2"], help="as moe.layers, or numbers of blocks")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--images", type=int, default=MoEConfig.calibration_images, help="training images to start from"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    numbers = all(layer.lstrip("-").isdigit() for layer in args.layers)
    layers = tuple(map(int, args.layers)) if numbers else args.layers[0]
    try:
        settings = Settings(
            model=ModelConfig(name=args.model, img_size=args.img_size),
            moe=MoEConfig(layers=layers, num_experts=args.experts, calibration_images=args.images),
            data=DataConfig(path=args.data),
        )
        rows = study(settings)
    except VimoeError as error:
        raise SystemExit(f"routes_at_start: {error}") from None
    print(table(rows))
    if args.out:
        write_json(args.out, [vars(row) for row in rows])


if __name__ == "__main__":
    main()
