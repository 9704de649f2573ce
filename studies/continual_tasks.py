"""Tasks one after the other on real images: dense against mixtures, with and without routers that stop.

    python studies/renderings.py tinyimagenet100 --out renderings --apart --held_out none --classes 25
    python studies/continual_tasks.py --classes cub100 --renderings renderings --model local-dir:dinov2 --seeds 0 1 2

`classes` are tasks of drawn classes, `renderings` are all classes in one rendering after the other. Every arm has the
same steps; "joint" has all images at once. What is scored are validation images, at the end and after each task. A
result is one JSON file in studies/continual/results, made once: to make it again remove it. The tables stand between
two marks in studies/continual/README.md. The seed draws the tasks (of renderings: only the validation images), the
training, and nothing else. `--report` writes the tables alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.task_sequence import OWN, SEEN, TaskSequence
from vimoe.files import read_text, write_json
from vimoe.study.paired import interval
from vimoe.study.report import put_between_marks

FOLDER = Path(__file__).parent / "continual"
SHARED = {
    "config": "frozen-trunk", "model.img_size": 84, "data.val_fraction": 0.2, "data.cache": "features", "data.views": 1,
    "data.workers": 0, "train.precision": "no", "train.batch_size": 32, "train.epochs": 3, "train.warmup_epochs": 0.5,
    "train.tensorboard": "false", "train.checkpoint_minutes": 60,
}  # fmt: skip
RENDERINGS = "photograph+edges+posterised+inverted"
TASKS: dict[str, dict[str, Any]] = {
    "classes": {"data.tasks": 5},
    "renderings": {"data.tasks": "splits", "data.train_split": RENDERINGS, "data.images_per_class": 80},
}
_DENSE = {"moe.layers": "none", "train.train_only": "last:2", "moe.expert_dropout": 0}
ARMS: dict[str, dict[str, Any]] = {
    "dense": _DENSE,
    "mixture": {},
    "router stops after task 1": {"train.router_freeze_epochs": 3},
    "router stops by margin": {"train.router_freeze_margin": 0.5},
    "locality loss": {"train.locality_loss": 0.1},
    "joint dense": _DENSE,
    "joint mixture": {},
}
COLUMNS = ("learnt", "own", "own forgotten", "seen", "seen forgotten", "lift")


def result_of(tasks: str, arm: str, seed: int) -> Path:
    """Return the path of a result."""
    return FOLDER / "results" / f"{tasks}.{arm.replace(' ', '-')}.seed{seed}.json"


def run_one(tasks: str, arm: str, seed: int, data: Path, model: str) -> None:
    """Train one arm with one seed, and write its result."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = {**SHARED, **TASKS[tasks], **ARMS[arm], "train.seed": seed, "data.seed": seed}
        if arm.startswith("joint"):  # the same images, not divided
            del options["data.tasks"]
        paths = {"data.path": data, "model.name": model, "out": run}
        words = [word for name, value in {**options, **paths}.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "vimoe", "train", *words], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads(read_text(run / "summary.json"))
        if arm.startswith("joint"):
            found = _joint(run, tasks)
        else:
            found = {name: summary["tasks"][name] for name in (OWN, SEEN)}
            found["lift"] = {layer: each["lift"] for layer, each in summary["tasks"]["routing"].items()}
            found["router_freeze"] = summary.get("router_freeze")
    result_of(tasks, arm, seed).parent.mkdir(parents=True, exist_ok=True)
    write_json(result_of(tasks, arm, seed), {
        "tasks": tasks, "arm": arm, "seed": seed, "options": options, **found,
        "versions": summary["versions"], "machine": f"{platform.machine()}, {platform.system()}",
    })  # fmt: skip
    print(result_of(tasks, arm, seed), flush=True)


def _joint(run: Path, tasks: str) -> dict[str, Any]:
    """Return the mean accuracy of a model that learnt all at once, on the images of the tasks that it did not have."""
    finished = FinishedRun(run)
    kind = finished.task
    kind.settings = replace(kind.settings, data=replace(kind.settings.data, tasks=TASKS[tasks]["data.tasks"]))
    parts = kind.divided(finished.data)
    row, _ = TaskSequence(kind, parts, run).row(finished.model, len(parts) - 1)
    return {name: {"mean": statistics.fmean(each[name] for each in row)} for name in (OWN, SEEN)}


def figures(result: dict[str, Any]) -> dict[str, float | None]:
    """Return a result's figures by column: accuracies and what was forgotten in points, and the mean lift of two tasks.

    The lift is that of different tasks, as a mean over pairs and layers; a model without routes has none.
    """
    lifts = [
        value
        for rows in result.get("lift", {}).values()
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if i != j
    ]
    then = [row[-1] for row in result[OWN].get("accuracy", [])]
    points = {
        "learnt": statistics.fmean(then) if then else None,
        "own": result[OWN]["mean"],
        "own forgotten": result[OWN].get("forgetting"),
        "seen": result[SEEN]["mean"],
        "seen forgotten": result[SEEN].get("forgetting"),
    }
    return {
        **{name: None if value is None else 100 * value for name, value in points.items()},
        "lift": statistics.fmean(lifts) if lifts else None,
    }


def table(tasks: str) -> str:
    """Return the tables of the arms, and of the differences to the mixture, over the seeds that there are."""
    found: dict[str, dict[int, dict[str, float | None]]] = {}
    for arm in ARMS:
        files = sorted(FOLDER.glob(f"results/{tasks}.{arm.replace(' ', '-')}.seed*.json"))
        results = [json.loads(read_text(file)) for file in files]
        if results:
            found[arm] = {each["seed"]: figures(each) for each in results}
    names = [name for name in COLUMNS if tasks == "classes" or not name.startswith("seen")]

    def lines(cell: Callable[[str, str], str], arms: Sequence[str]) -> list[str]:
        head = ["| arm | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        return head + ["| " + " | ".join([arm, *(cell(arm, name) for name in names)]) + " |" for arm in arms]

    def mean(arm: str, name: str) -> str:
        values = [each[name] for each in found[arm].values()]
        known = [value for value in values if value is not None]
        return f"{statistics.fmean(known):.{2 if name == 'lift' else 1}f}" if known else ""

    def against(arm: str, name: str) -> str:
        both = found[arm].keys() & found["mixture"].keys()
        pairs = [(found[arm][seed][name], found["mixture"][seed][name]) for seed in sorted(both)]
        known = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if len(known) < 2:
            return ""
        gap = interval(known)
        digits = 2 if name == "lift" else 1
        return f"{gap.value:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"

    seeds = sorted({seed for each in found.values() for seed in each})
    count = f"{len(seeds)} seeds, {min(map(len, found.values()))} to {max(map(len, found.values()))} an arm"
    others = [arm for arm in found if arm != "mixture" and not arm.startswith("joint")]
    return "\n".join([
        f"### {tasks.capitalize()}", "", f"Means of {count}:", "", *lines(mean, list(found)), "",
        "Differences to the mixture, paired by seed, with Student's 95% interval, not widened for their number:",
        "", *lines(against, others),
    ])  # fmt: skip


def report() -> None:
    """Write the tables into the README.md of the study."""
    there = [tasks for tasks in TASKS if list(FOLDER.glob(f"results/{tasks}.mixture.*.json"))]
    put_between_marks(FOLDER / "README.md", "\n\n".join(map(table, there)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=Path, help="folder of photographs, for tasks of classes")
    parser.add_argument("--renderings", type=Path, help="folder of photographs in four renderings, each a split")
    parser.add_argument("--model", help="dense model, as of `vimoe train --model.name`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="write the tables alone")
    options = parser.parse_args()
    if not options.report:
        paths = {tasks: getattr(options, tasks) for tasks in TASKS if getattr(options, tasks)}
        if not paths or not options.model:
            parser.error("expected --model, and --classes or --renderings")
        for seed in options.seeds:
            for tasks, data in paths.items():
                for arm in ARMS:
                    if not result_of(tasks, arm, seed).exists():
                        run_one(tasks, arm, seed, data, options.model)
    report()


if __name__ == "__main__":
    main()
