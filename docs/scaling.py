"""Write docs/scaling.md: layouts of ViTs from S to g with 8 to 128 experts, on 1 to 4096 devices. Run it from anywhere.

Everything is arithmetic (`vimoe.training.footprint`, `vimoe.training.layouts`); nothing was trained. The footprints of
one device are kept in docs/scaling.json, of which the page is made.

    python docs/scaling.py          count what the file does not have yet, and write the page
    python docs/scaling.py --all    count everything again; takes minutes
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.models.create import create_without_weights
from vimoe.models.upcycling import build_layers
from vimoe.training.footprint import Exchange, Footprint, Weights, footprint
from vimoe.training.layouts import plan_size
from vimoe.training.stages import Stage

PAGE, FOUND = Path(__file__).with_suffix(".md"), Path(__file__).with_suffix(".json")
MODELS = {
    "ViT-S": "vit_small_patch14_dinov2", "ViT-B": "vit_base_patch14_dinov2", "ViT-L": "vit_large_patch14_dinov2",
    "ViT-g": "vit_giant_patch14_dinov2",
}  # fmt: skip
EXPERTS = (8, 16, 32, 64, 128)
DEVICES = (1, 8, 64, 512, 4096)
IMAGES, MEMORY, FREE = 32, 80e9, 0.1
MOE: dict[str, Any] = {"layers": "every:2", "routing": "token"}
HEAD = f"""# Scaling

**All of this is arithmetic; nothing here was trained or measured.** `python docs/scaling.py` writes this page, by the
same functions as `vimoe plan --devices 8 --memory 80GB`; a test compares it with them. What one device allocates is
that of a real step to a percent where it was measured, with a small ViT on a CPU
([benchmarks](../benchmarks/README.md#memory)). The shares of several devices and the bytes that they send follow from
the formulas in `vimoe/training/layouts.py` and `vimoe/training/gathering.py`; a test holds the latter within 7% of real
steps of 2 and 4 processes.

DINOv2's ViTs (patches of 14 pixels, images of 224) with MoE layers in every second block, token routing, one expert and
the shared one for each token, 1000 classes; AdamW in float32, products in bfloat16, all weights trained, no activation
checkpointing, {IMAGES} images on each device. A device has {MEMORY / 1e9:.0f} GB, of which {FREE:.0%} stay free for
what is not counted: a GPU's context, buffers of communication, and waste of the allocator.

A cell has the smallest mesh that fits, `train.parallel` as data x fsdp x expert, then the memory of a device, and what
a device sends in a step. "Smallest" divides the weights among the fewest devices, and of these meshes it is the one
that sends least. Loads are taken to be even: an expert that gets twice its share makes its device's tokens twice as
many. A step on more devices has more images, {IMAGES} x 4096 = {IMAGES * 4096:,} at the right.

| model | experts | parameters | {" | ".join(f"{n} device{'s' * (n > 1)}" for n in DEVICES)} |
|---|---|---|{"---|" * len(DEVICES)}
"""


def key(model: str, experts: int) -> str:
    """Return the name of a row in the file."""
    return f"{model}, {experts}"


def count(model: str, experts: int) -> dict[str, Any]:
    """Return the footprint of a device as JSON has it."""
    made = create_without_weights(ModelConfig(name=MODELS[model], img_size=224, num_classes=1000))
    build_layers(made, MoEConfig(num_experts=experts, **MOE))
    found = footprint(made, IMAGES, TrainConfig(precision="bf16"))
    return asdict(found)


def read(values: dict[str, Any]) -> Footprint:
    """Return the footprint that `count` gave."""
    kept = {
        "weights": tuple(Weights(**each) for each in values["weights"]),
        "exchanges": tuple(Exchange(**each) for each in values["exchanges"]),
        "experts": tuple(values["experts"]),
        "optimizer": tuple(values["optimizer"]),
        "stages": tuple(
            Stage(**{**each, "start": tuple(each["start"]), "moments": tuple(map(tuple, each["moments"]))})
            for each in values["stages"]
        ),
    }
    return Footprint(**{**values, **kept})


def cell(found: Footprint, devices: int) -> str:
    """Return the smallest layout that fits, in a few words."""
    plan = plan_size(found, ParallelConfig(), devices, MEMORY * (1 - FREE), "bf16")
    if plan.chosen is None:
        return f"does not fit: {plan.shown.total / 1e9:,.0f} GB"
    mesh, sent = plan.chosen.mesh, sum(plan.chosen.sent.values())
    sends = f", sends {sent / 1e9:.2g} GB" if sent else ""
    return f"{mesh.data} x {mesh.fsdp} x {mesh.expert}: {plan.chosen.total / 1e9:.0f} GB{sends}"


def page(kept: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    lines = []
    for name, values in kept.items():
        found = read(values)
        params = (found.sum("dense") + found.sum("expert")) / 4e9
        model, _, experts = name.partition(", ")
        cells = " | ".join(cell(found, devices) for devices in DEVICES)
        lines.append(f"| {model} | {experts} | {params:.2f} G | {cells} |")
    return HEAD + "\n".join(lines) + "\n"


def kept_footprints() -> dict[str, Any]:
    """Return the content of the file, by row."""
    kept: dict[str, Any] = json.loads(FOUND.read_text("utf-8"))
    return kept


def main() -> None:
    """Count what is missing, and write the page."""
    kept = {} if "--all" in sys.argv or not FOUND.exists() else kept_footprints()
    rows = {}
    for model in MODELS:
        for experts in EXPERTS:
            name = key(model, experts)
            rows[name] = kept.get(name) or count(model, experts)
            whole = ",\n".join(f"{json.dumps(each)}: {json.dumps(values)}" for each, values in rows.items())
            FOUND.write_text(f"{{\n{whole}\n}}\n", "utf-8")
            print(name, flush=True)
    PAGE.write_text(page(rows), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
