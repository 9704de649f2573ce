"""Run folders made by hand: files of a training, an analysis and a pruning, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.found import effect, evidence

from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.run_folder import write_settings


def receipt(top1: float) -> dict[str, Any]:
    return {
        "top1": top1, "top5": 0.9, "loss": 1.5, "images": 400, "params": 2e6, "activated_params": 1e6, "macs": 1e9,
        "moe_layers": ["blocks.1.mlp"], "images_per_second": 100.0,
    }  # fmt: skip


def trained(folder: Path, top1: float = 0.5, **moe: Any) -> Path:
    folder.mkdir()
    write_settings(folder, Settings(moe=MoEConfig(**moe)))
    (folder / "metrics.csv").write_text(f"epoch,train_loss,val_loss,val_top1\n1,2,3,0.25\n2,1,2,{top1}\n")
    (folder / "load.csv").write_text("epoch,layer,expert,share\n1,blocks.0.mlp,0,0.4\n1,blocks.0.mlp,1,0.6\n")
    val = {"top1": top1, "top5": 0.9, "loss": 2.0, "images": 100}
    summary = {
        "epochs": 2,
        "best_epoch": 2,
        "val": val,
        "seconds": 9.0,
        "train_images": 77,
        "alarms": [f"epoch {i}: blocks.0.mlp: the router is <odd>" for i in range(9)],
        "versions": {"torch": "9.9"},
    }
    (folder / "summary.json").write_text(json.dumps({"schema": 1, "command": "train", **summary}))
    return folder


def pruned(folder: Path, recovered: bool = True) -> Path:
    folder.mkdir()
    write_settings(folder, Settings())
    nothing, cost = effect(0.0015, 0.01), effect(0.004, 0.001)
    summary = {
        "tolerance": 0.01,
        "steps": [
            {"layer": "blocks.0.mlp", "expert": None, "how": "shared", "change": nothing, "total": None},
            {"layer": "blocks.1.mlp", "expert": 5, "how": "dropped", "change": cost, "total": effect(0.0055, 0.001)},
        ],
        "kept": [{"layer": "blocks.1.mlp", "how": "merge", "change": effect(0.25), "experts": 7}],
        "split": "test", "before": receipt(0.61), "after": receipt(0.6),
        "recovery_epochs": 3 if recovered else 0, **({"recovered": receipt(0.625)} if recovered else {}),
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({"schema": 1, "command": "prune", **summary}))
    (folder / "routing-before-pruning.json").write_text(json.dumps(evidence(layers=2)))
    return folder


def analysed(folder: Path, **found: Any) -> Path:
    trained(folder)
    (folder / "routing.json").write_text(json.dumps(evidence(**found)))
    return folder
