"""The tour of classification: a small ViT on handwritten digits becomes a ViMoE, beside equally trained controls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vimoe.analysis.evidence import Evidence
from vimoe.analysis.pruning import Pruning, prune
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.demo.tour import SEEDS, Arm, Findings, Models, Table, Tour
from vimoe.report.html_page import Page
from vimoe.tasks.base import Task

FIRST = TrainConfig(epochs=45, batch_size=30, lr=2e-3, warmup_epochs=4, hflip=0, min_crop=0.8, tensorboard=False)
FURTHER = replace(FIRST, epochs=6, lr=1e-3, warmup_epochs=0.5)
ARMS = (
    Arm("dense, continued", MoEConfig(layers="none"), "the parent, trained further"),
    Arm(
        "dense, second FFN", MoEConfig(layers="all", num_experts=0, num_shared_experts=2),
        "an FFN of twice the width in every block: as many activated parameters as the ViMoE",
    ),
    Arm(
        "ViMoE, no shared expert", MoEConfig(layers="all", num_shared_experts=0, top_k=2),
        "8 experts in every block, 2 of them for each image: as many activated parameters",
    ),
    Arm("ViMoE", MoEConfig(layers="all"), "8 experts in every block, 1 for each image, and a shared expert"),
)  # fmt: skip
VIMOE, PRUNED = ARMS[-1].name, "ViMoE, pruned"


class TourOfDigits(Tour):
    """The tour of classification; it prunes the ViMoEs."""

    def introduction(self, data: Any) -> str:
        return (
            f"A small dense ViT, the parent, was trained on {len(data.train)} images for {self.first.epochs} epochs. "
            f"From it each arm below was trained for {self.further.epochs} further epochs with the same settings, over "
            f"{len(SEEDS)} seeds. Validation ({len(data.val)} images) chose the epoch and decided what to prune; the "
            f"table is of the {len(data.test)} test images."
        )

    def study(self, task: Task[Any], data: Any, models: Models, evidence: Sequence[Evidence]) -> Findings:
        pruned = [copy.deepcopy(model) for model in models[VIMOE]]
        done = [
            prune(model, known, task.validation(model, data)) for model, known in zip(pruned, evidence, strict=True)
        ]
        models[PRUNED] = pruned
        kept = [layers_kept(*each) for each in zip(SEEDS, done, evidence, strict=True)]

        def add_sections(page: Page, _table: Table) -> None:
            page.heading("Layers kept, and why")
            page.items(kept)
            for seed, each in zip(SEEDS, done, strict=True):
                page.text(f"Seed {seed}", note=True)
                page.items(str(each).splitlines())

        return Findings(kept, {"pruned": [each.to_dict() for each in done]}, add_sections)


def layers_kept(seed: int, done: Pruning, evidence: Evidence) -> str:
    """Return a sentence on the layers that a seed kept, the cost of losing each, and experts idle on validation."""
    kept = [f"{step.layer} ({step.change.loss.value:+.3f})" for step in done.kept]
    why = " (nats of validation loss without its routed experts)" if kept else ""
    total = done.steps[-1].total if done.steps else None
    removed = f"; the {len(done.steps)} removed cost {total.loss} together" if total else ""
    idle = sum(int((layer.load == 0).sum()) for layer in evidence.layers)
    experts = sum(len(layer.load) for layer in evidence.layers)
    text = f"seed {seed} keeps {', '.join(kept) or 'no MoE layer'}"
    return f"{text}{why}{removed}; {idle} of {experts} experts were idle on validation"


def tour_of_digits() -> Tour:
    """Return the tour of classification."""
    return TourOfDigits(
        subject="scikit-learn's handwritten digits",
        data=DataConfig(path="digits", images_per_class=30, workers=0),
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            pretrained=False,
            img_size=8,
            args={"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
        ),
        first=FIRST,
        further=FURTHER,
        arms=ARMS,
        shares=("top1",),
    )
