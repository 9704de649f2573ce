"""The tour: a small ViT on handwritten digits becomes a ViMoE, beside equally trained controls, over seeds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from vimoe import run_folder
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.pruning import Pruning, Receipt, prune, receipts
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.data.classification import Data, load_data
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.demo.tour import DISCLAIMER, PARENT, SEEDS, Arm, Tour, add_routing_and_training, analysed, compare, told
from vimoe.models.model_folder import load
from vimoe.report.html_page import Page
from vimoe.report.table_cells import RECEIPT_HEADER, receipt_row

FIRST = TrainConfig(epochs=45, batch_size=30, lr=2e-3, warmup_epochs=4, hflip=0, min_crop=0.8, tensorboard=False)
FURTHER = replace(FIRST, epochs=6, lr=1e-3, warmup_epochs=0.5)

ARMS = (
    Arm("dense, continued", MoEConfig(layers="none"), "the parent, trained on"),
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
VIMOE, PRUNED = ARMS[-1], "ViMoE, pruned"
TOUR = Tour(
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
)


def tour_of_digits(folder: Path) -> tuple[str, dict[str, Any]]:
    """Runs the tour in a new folder. Returns what to print and the figures."""
    start = time.perf_counter()
    console = Console(stderr=True)
    data = load_data(TOUR.data)
    console.print(f"A tour on scikit-learn's handwritten digits: {data}")
    trained = TOUR.train(folder, console)
    models = {name: [load(run / run_folder.MODEL) for run in group] for name, group in trained.items()}

    console.print("analysing and pruning the ViMoEs")
    evidence = analysed(trained[VIMOE.name])
    decided: list[Pruning] = []
    models[PRUNED] = []
    for run, known in zip(trained[VIMOE.name], evidence, strict=True):
        pruned = load(run / run_folder.MODEL)
        decided.append(prune(pruned, known, _loader(pruned, data.val)))
        models[PRUNED].append(pruned)

    everything = [model for group in models.values() for model in group]
    measured = iter(receipts(everything, _loader(everything[0], data.test)))
    table = {name: [next(measured) for _ in group] for name, group in models.items()}
    shares = {name: [receipt.score.rank[0] for receipt in group] for name, group in table.items()}
    control = ARMS[0].name
    others = [name for name in table if name not in (PARENT, control)]
    comparisons = [compare(shares, name, control, len(others), len(data.test), "top-1") for name in others]
    kept = [keeps(*each) for each in zip(SEEDS, decided, evidence, strict=True)]

    seconds = time.perf_counter() - start
    report = _report(folder, data, table, comparisons, kept, decided, evidence, seconds)
    summary = {
        "table": {name: [receipt.to_dict() for receipt in group] for name, group in table.items()},
        "comparisons": comparisons,
        "pruned": [done.to_dict() for done in decided],
        "seconds": seconds,
        "report": str(report),
    }
    run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "demo", **summary})
    lines = ["", told(RECEIPT_HEADER, rows_of(table)), "", *comparisons, "", *kept, "", DISCLAIMER]
    return "\n".join([*lines, f"{seconds:.0f} s; report: {report}"]), summary


def rows_of(table: dict[str, list[Receipt]]) -> list[tuple[str, ...]]:
    """The table's rows under RECEIPT_HEADER."""
    return [receipt_row(name, [receipt.to_dict() for receipt in group]) for name, group in table.items()]


def keeps(seed: int, done: Pruning, evidence: Evidence) -> str:
    """Which layers a seed kept, what losing each would have cost, and how many experts no validation image chose."""
    kept = [f"{step.layer} ({step.change.loss.value:+.3f})" for step in done.kept]
    why = " (nats of validation loss without its routed experts)" if kept else ""
    total = done.steps[-1].total if done.steps else None
    removed = f"; the {len(done.steps)} removed cost {total.loss} together" if total else ""
    idle = sum(int((layer.load == 0).sum()) for layer in evidence.layers)
    experts = sum(len(layer.load) for layer in evidence.layers)
    text = f"seed {seed} keeps {', '.join(kept) or 'no MoE layer'}"
    return f"{text}{why}{removed}; {idle} of {experts} experts were idle on validation"


def _loader(model: nn.Module, samples: Any) -> Any:
    return eval_loader(samples, preprocessing(model), batch_size=100, workers=0)


def _report(
    folder: Path, data: Data, table: dict[str, list[Receipt]], comparisons: list[str], kept: list[str],
    decided: list[Pruning], evidence: list[Evidence], seconds: float,
) -> Path:  # fmt: skip
    page = Page("vimoe: a tour on handwritten digits", folder / "figures")
    page.text(
        f"A small dense ViT, the parent, was trained on {len(data.train)} images for {FIRST.epochs} epochs. From it "
        f"each arm below was trained for {FURTHER.epochs} further epochs with the same settings, over {len(SEEDS)} "
        f"seeds. Validation ({len(data.val)} images) chose the epoch and decided what to prune; the table is of the "
        f"{len(data.test)} test images. It took {seconds:.0f} seconds."
    )
    page.text(DISCLAIMER)
    page.heading("Results")
    page.table(RECEIPT_HEADER, rows_of(table))
    page.items([f"{arm.name}: {arm.note}" for arm in ARMS])
    page.text(
        f"Mean ± standard deviation over seeds, all from one parent. MACs are multiply-adds of one image; images/s was "
        f"measured in turns on this machine. What {len(SEEDS)} seeds support:"
    )
    page.items(comparisons)
    page.heading("Layers kept, and why")
    page.items(kept)
    for seed, done in zip(SEEDS, decided, strict=True):
        page.text(f"Seed {seed}", note=True)
        page.items(str(done).splitlines())
    add_routing_and_training(page, VIMOE, folder, evidence)
    return page.write(folder / "report.html")
