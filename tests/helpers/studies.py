"""A tiny study on digits, and cells of it that nobody computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.found import evidence

from vimoe.config.yaml_reader import write_yaml
from vimoe.files import write_json
from vimoe.study.plan import Cell, Study

TINY: dict[str, Any] = {
    "control": "dense",
    "seeds": [0, 1],
    "search": {"rates": [1e-3, 3e-3], "seeds": [10, 11]},
    "base": {
        "model": {
            "name": "vit_tiny_patch16_224", "pretrained": False, "img_size": 16,
            "args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        "train": {"epochs": 1, "batch_size": 32, "precision": "no"},
        "data": {"workers": 0, "images_per_class": 12},
    },
    "data": {"digits": {"data": {"path": "${DIGITS}"}}},
    "arms": {
        "dense": {"about": "the parent", "moe": {"layers": "none"}},
        "vimoe": {"moe": {"layers": "last:1", "num_experts": 4}, "after": ["analyze", "merge_all"]},
    },
    "contrasts": {
        "C": {"of": "vimoe", "against": "dense", "margin": 0.5, "routes": 0.01},
        "D": {"of": "vimoe/merge_all", "against": "dense", "margin": 0.5},
    },
}  # fmt: skip


def write_study(folder: Path, **changes: Any) -> Study:
    (folder / "study.yaml").write_text(write_yaml({**TINY, **changes}))
    (folder / "README.md").write_text("Before.\n<!-- the table begins -->\n<!-- the table ends -->\nAfter.\n")
    return Study(folder)


def score(top1: float, loss: float = 1.0) -> dict[str, Any]:
    return {"top1": top1, "top5": 0.9, "loss": loss, "images": 400}


def put(study: Study, cell: Cell, top1: float, key: str = "k", **changes: Any) -> Path:
    """Writes the JSON of a cell with this score, as if it had been computed."""
    found = evidence(layers=2)
    cost = {"params": 2e6, "activated_params": 1e6, "macs": 1e9}
    left = {"test": score(top1), "steps": [], "kept": [], "after": cost}  # of a step after the training
    values = {
        "name": cell.name, "data": cell.data, "arm": cell.arm, "rate": cell.rate, "seed": cell.seed,
        "search": cell.search, "key": key, "fingerprint": cell.fingerprint, "settings": cell.settings,
        "inputs": dict.fromkeys(cell.variables, "d"), "code": "c", "val": score(top1), "cost": cost,
        "versions": {"torch": "2", "timm": "1"}, "precision": "no", "seconds": {"train": 9, "after": 1, "cell": 10},
        "machine": {"gpu": None, "cpu": "x"}, "analysis": found if "analyze" in cell.after else None,
        "after": {step: dict(left) for step in cell.after if step != "analyze"},
        **({} if cell.search else {"test": score(top1)}), **changes,
    }  # fmt: skip
    study.results.mkdir(exist_ok=True)
    path = study.results / f"{cell.name}.{key}.json"
    write_json(path, values)
    return path
