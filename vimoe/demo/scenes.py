"""The tour of segmentation: a ViT that names digits in scenes becomes a ViMoE, beside equally trained controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vimoe.analysis.evidence import Evidence
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.data.scenes import Scenes
from vimoe.demo.composed_scenes import compose_scenes
from vimoe.demo.tour import SEEDS, Arm, Findings, Models, Table, Tour, by_seed
from vimoe.metrics.segmentation import ceiling
from vimoe.report.html_page import Page
from vimoe.report.table_cells import over_seeds
from vimoe.tasks.base import Task
from vimoe.tasks.expert_maps import expert_maps
from vimoe.tasks.segmentation import SHOWN

SIZE, PATCH = 48, 6
KNOWN = 5  # digits; of all ten, a model of this size learns to tell hardly any apart in the time
TRAIN, VAL, TEST = 800, 100, 250  # numbers of scenes
FIRST = TrainConfig(
    epochs=15, batch_size=16, lr=2e-3, warmup_epochs=2, hflip=0, color_jitter=0, min_scale=1, max_scale=1,
    class_weights="median_frequency", tensorboard=False,
)  # fmt: skip
FURTHER = replace(FIRST, epochs=2, lr=1e-3, warmup_epochs=0.25)
ARMS = (
    Arm("dense, continued", MoEConfig(layers="none"), "the parent, trained further"),
    Arm(
        "dense, second FFN", MoEConfig(layers="last:2", num_experts=0, num_shared_experts=2),
        "an FFN of twice the width in the last two blocks: as many activated parameters as the ViMoE",
    ),
    Arm(
        "ViMoE, experts of low rank",
        MoEConfig(layers="last:2", routing="token", gate="choice", gate_weight=0.5, experts="lora", rank=4),
        "8 experts that are changes of rank 4 of the shared one, 1 for each patch at a weight of one half",
    ),  # the form that beat its dense ViT in studies/scenes
    Arm(
        "ViMoE", MoEConfig(layers="last:2", routing="token"),
        "8 experts in each of the last two blocks, 1 for each patch, and a shared expert",
    ),
)  # fmt: skip
VIMOE = ARMS[-1].name


class TourOfScenes(Tour):
    """The tour of segmentation; it shows the experts over the image."""

    def introduction(self, data: Any) -> str:
        return (
            f"Scenes of {SIZE}x{SIZE} pixels were composed of scikit-learn's handwritten digits, 0 to {KNOWN - 1}, for "
            f"every pixel to be named. A small dense ViT with a linear decoder on its four blocks, the parent, was "
            f"trained on {len(data.train)} of them for {self.first.epochs} epochs. From it each arm below was trained "
            f"for {self.further.epochs} further epochs with the same settings, over {len(SEEDS)} seeds. Validation "
            f"({len(data.val)} scenes) chose the epoch; the table is of the {len(data.test)} test scenes, whose digits "
            f"are in no other."
        )

    def study(self, task: Task[Any], data: Any, models: Models, evidence: Sequence[Evidence]) -> Findings:
        scenes: Scenes = data
        masks = (torch.from_numpy(scenes.legend.read(mask)).long() for _, mask in scenes.test)
        best = ceiling(masks, (PATCH, PATCH), len(scenes.classes)).miou
        limit = (
            f"One right label for each patch of {PATCH}x{PATCH} pixels would reach a mean IoU of {best:.2%} on test."
        )
        routing = by_seed(evidence)
        shown: Any = models[VIMOE][0]

        def add_sections(page: Page, table: Table) -> None:
            page.text(limit, note=True)
            page.heading("Classes")
            page.table(("IoU on test, %", *table), _by_class(table, scenes.classes))
            page.heading("Experts over the image")
            page.text(
                f"The first {SHOWN} test scenes and the {VIMOE} of seed 0: for each MoE layer, the expert that was "
                f"each patch's first choice. Expert numbers mean nothing between layers. Patches of one kind in one "
                f"colour are a sign that the router follows what is seen; whether it does so by class, and whether "
                f"that matters, comes next."
            )
            maps = expert_maps(shown, scenes.test[:SHOWN], scenes.legend, preprocessing(shown))
            page.figure(maps, "expert-maps", "Image, truth (void is white), prediction, and the expert of each patch.")
            page.text("scenes/ has the scenes, to look at and to train on.", note=True)

        return Findings([*routing, "", limit], {"routing": routing, "patch_ceiling": best}, add_sections)


def _by_class(table: Table, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the IoU of each class by arm; a dash where test has no pixel of it."""
    ious = {name: list(zip(*(one["per_class_iou"] for one in group), strict=True)) for name, group in table.items()}
    return [
        (name, *("–" if None in each[c] else over_seeds(each[c], 0.01, "{:.2f}") for each in ious.values()))
        for c, name in enumerate(classes)
    ]


def tour_of_scenes(folder: Path) -> Tour:
    """Compose scenes into a folder, and return the tour of segmentation on them."""
    scenes = compose_scenes(folder / "scenes", TRAIN, VAL, TEST, SIZE, known=KNOWN)
    args = {"patch_size": PATCH, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return TourOfScenes(
        subject="scenes of scikit-learn's handwritten digits",
        data=DataConfig(path=str(scenes), task="segmentation", workers=0),
        model=ModelConfig(
            name="vit_small_patch16_rope_224", pretrained=False, img_size=SIZE, decoder="linear4", args=args
        ),
        first=FIRST,
        further=FURTHER,
        arms=ARMS,
        shares=("miou", "pixel_accuracy"),
    )
