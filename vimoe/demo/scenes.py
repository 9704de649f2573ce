"""The tour of segmentation: a ViT that names digits in scenes becomes a ViMoE, beside equally trained controls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vimoe import run_folder
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.expert_maps import expert_maps
from vimoe.analysis.pruning import images_per_second
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.data.scenes import Scenes
from vimoe.demo.composed_scenes import compose_scenes
from vimoe.demo.tour import DISCLAIMER, SEEDS, Arm, Tour, add_routing_and_training, analysed, by_seed, compare, told
from vimoe.metrics.segmentation import ceiling
from vimoe.models.cost import count
from vimoe.models.model_folder import load
from vimoe.models.segmenter import Segmenter
from vimoe.report.html_page import Page
from vimoe.report.table_cells import RECEIPT_HEADER, over_seeds
from vimoe.tasks.segmentation import SHOWN, Segmentation

Table = Mapping[str, Sequence[dict[str, Any]]]  # of each arm, what was measured by seed
HEADER = ("", "mean IoU, %", "pixel accuracy, %", *RECEIPT_HEADER[2:])
SIZE, PATCH = 48, 6
KNOWN = 5  # digits: of all ten, a model of this size hardly tells any apart in the time
TRAIN, VAL, TEST = 800, 100, 250  # scenes
FIRST = TrainConfig(
    epochs=15, batch_size=16, lr=2e-3, warmup_epochs=2, hflip=0, color_jitter=0, min_scale=1, max_scale=1,
    class_weights="median_frequency", tensorboard=False,
)  # fmt: skip
FURTHER = replace(FIRST, epochs=2, lr=1e-3, warmup_epochs=0.25)
ARMS = (
    Arm("dense, continued", MoEConfig(layers="none"), "the parent, trained on"),
    Arm(
        "dense, second FFN", MoEConfig(layers="last:2", num_experts=0, num_shared_experts=2),
        "an FFN of twice the width in the last two blocks: as many activated parameters as the ViMoE",
    ),
    Arm(
        "ViMoE", MoEConfig(layers="last:2", routing="token"),
        "8 experts in each of the last two blocks, 1 for each patch, and a shared expert",
    ),
)  # fmt: skip
VIMOE = ARMS[-1]


def tour_of_scenes(folder: Path) -> tuple[str, dict[str, Any]]:
    """Runs the tour in a new folder. Returns what to print and the figures."""
    start = time.perf_counter()
    console = Console(stderr=True)
    tour = _tour(compose_scenes(folder / "scenes", TRAIN, VAL, TEST, SIZE, known=KNOWN))
    problem = Segmentation(Settings(data=tour.data, train=tour.first))
    scenes = problem.data
    console.print(f"A tour on scenes of scikit-learn's handwritten digits: {scenes}")
    trained = tour.train(folder, console)
    models = {name: [load(run / run_folder.MODEL) for run in group] for name, group in trained.items()}
    console.print("analysing the ViMoEs")
    evidence = analysed(trained[VIMOE.name])
    table = _measure(problem, models)
    shares = {name: [measured["miou"] for measured in group] for name, group in table.items()}
    control, *others = (arm.name for arm in ARMS)
    comparisons = [compare(shares, name, control, len(others), len(scenes.test), "mean IoU") for name in others]
    masks = (torch.from_numpy(scenes.legend.read(mask)).long() for _, mask in scenes.test)
    best = ceiling(masks, PATCH, len(scenes.classes)).miou

    seconds = time.perf_counter() - start
    routing = by_seed(evidence)
    summary = {
        "table": table, "comparisons": comparisons, "routing": routing, "patch_ceiling": best, "seconds": seconds
    }  # fmt: skip
    report = _report(folder, scenes, models[VIMOE.name][0], evidence, summary)
    summary = {**summary, "report": str(report)}
    run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "demo", **summary})
    lines = ["", told(HEADER, rows_of(table)), "", *comparisons, "", *routing, "", _ceiling(best), "", DISCLAIMER]
    return "\n".join([*lines, f"{seconds:.0f} s; report: {report}"]), summary


def rows_of(table: Table) -> list[tuple[str, ...]]:
    """The table's rows under HEADER."""
    cells = (
        ("miou", 0.01, "{:.2f}"), ("pixel_accuracy", 0.01, "{:.2f}"), ("loss", 1, "{:.4f}"), ("params", 1e6, "{:.3f}"),
        ("activated_params", 1e6, "{:.3f}"), ("macs", 1e9, "{:.4f}"), ("images_per_second", 1, "{:.0f}"),
    )  # fmt: skip
    return [(name, *(over_seeds([one[key] for one in group], unit, form) for key, unit, form in cells))
            for name, group in table.items()]  # fmt: skip


def _tour(scenes: Path) -> Tour:
    args = {"patch_size": PATCH, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return Tour(
        data=DataConfig(path=str(scenes), task="segmentation", workers=0),
        model=ModelConfig(
            name="vit_small_patch16_rope_224", pretrained=False, img_size=SIZE, decoder="linear4", args=args
        ),
        first=FIRST,
        further=FURTHER,
        arms=ARMS,
    )


def _measure(problem: Segmentation, models: Mapping[str, Sequence[nn.Module]]) -> dict[str, list[dict[str, Any]]]:
    """Score on test, costs, and images a second in turns, of each model."""
    everything = [model for group in models.values() for model in group]
    loader = problem.loader(everything[0], problem.data.test)
    speeds = iter(images_per_second(everything, next(iter(loader))[0]))
    return {
        name: [
            {
                **problem.evaluate(model, loader).to_dict(),
                **asdict(count(model)),
                "images_per_second": next(speeds),
            }
            for model in group
        ]
        for name, group in models.items()
    }


def _report(
    folder: Path, scenes: Scenes, vimoe: nn.Module, evidence: Sequence[Evidence], found: dict[str, Any]
) -> Path:
    table: Table = found["table"]
    page = Page("vimoe: a tour on scenes of handwritten digits", folder / run_folder.FIGURES)
    page.text(
        f"Scenes of {SIZE}x{SIZE} pixels were composed of scikit-learn's handwritten digits, 0 to {KNOWN - 1}, for "
        f"every pixel to be named. A small "
        f"dense ViT with a linear decoder on its four blocks, the parent, was trained on {len(scenes.train)} of them "
        f"for {FIRST.epochs} epochs. From it each arm below was trained for {FURTHER.epochs} further epochs with the "
        f"same settings, over {len(SEEDS)} seeds. Validation ({len(scenes.val)} scenes) chose the epoch; the table is "
        f"of the {len(scenes.test)} test scenes, whose digits are in no other. It took {found['seconds']:.0f} seconds."
    )
    page.text(DISCLAIMER)
    page.heading("Results")
    page.table(HEADER, rows_of(table))
    page.items([f"{arm.name}: {arm.note}" for arm in ARMS])
    page.text(
        f"Mean ± standard deviation over seeds, all from one parent. MACs are multiply-adds of one image; images/s was "
        f"measured in turns on this machine. What {len(SEEDS)} seeds support:"
    )
    page.items(found["comparisons"])
    page.text(_ceiling(found["patch_ceiling"]), note=True)
    page.heading("Classes")
    page.table(("IoU on test, %", *table), _by_class(table, scenes.classes))
    page.heading("Experts over the image")
    page.text(
        f"The first {SHOWN} test scenes and the {VIMOE.name} of seed 0: for each MoE layer, the expert that was each "
        f"patch's first choice. Expert numbers mean nothing between layers. Patches of one kind in one colour are a "
        f"sign that the router follows what is seen; whether it does so by class, and whether that matters, comes next."
    )
    assert isinstance(vimoe, Segmenter)
    maps = expert_maps(vimoe, scenes.test[:SHOWN], scenes.legend, preprocessing(vimoe))
    page.figure(maps, "expert-maps", "Image, truth (void is white), prediction, and the expert of each patch.")
    add_routing_and_training(page, VIMOE, folder, evidence)
    page.text("scenes/ has the scenes, to look at and to train on.", note=True)
    return page.write(folder / "report.html")


def _ceiling(best: float) -> str:
    return f"One right label for each patch of {PATCH}x{PATCH} pixels would reach a mean IoU of {best:.2%} on test."


def _by_class(table: Table, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """The IoU of each class by arm; a dash where test has no pixel of it."""
    ious = {name: list(zip(*(one["per_class_iou"] for one in group), strict=True)) for name, group in table.items()}
    return [
        (name, *("–" if None in each[c] else over_seeds(each[c], 0.01, "{:.2f}") for each in ious.values()))
        for c, name in enumerate(classes)
    ]
