r"""Train every arm of a study over seeds at one rate, and write the scores on test as a table of the study's README.

    python studies/arms_over_seeds.py studies/camvid --seeds 0 1 2 -- --data.path camvid \
        --model.name local-dir:runs/mae/model

STUDY/base.yaml is what all arms share, STUDY/arms/NAME.yaml what an arm changes; what follows "--" goes to every
`vimoe train`. A result is one JSON file in STUDY/results, made once: to make it again remove it. A training that was
killed goes on. With data.cache=features in base.yaml, arms that are cut at the same block have one trunk, also where
several train at a time and where each is scored. The table stands between two marks in STUDY/README.md, and nothing in
it is typed by hand. For a search of rates, contrasts and several processes see
`vimoe study`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vimoe.files import write_json
from vimoe.metrics.registry import shown
from vimoe.models.cost import count
from vimoe.models.model_folder import load
from vimoe.study.paired import interval
from vimoe.study.report import put_between_marks

KEPT = ("val", "best_epoch", "epochs", "seconds", "train_images", "classes", "versions")  # of summary.json


def vimoe(*argv: str) -> dict[str, Any]:
    """Run a verb and return its JSON; its log goes to our standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "vimoe.cli", *argv, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"vimoe {' '.join(argv)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run_one(study: Path, arm: Path, seed: int, runs: Path, extra: Sequence[str]) -> None:
    """Train and score one arm with one seed, as STUDY/results/ARM-seedN.json."""
    result = study / "results" / f"{arm.stem}-seed{seed}.json"
    if result.exists():
        return
    run = runs / f"{arm.stem}-seed{seed}"
    if (run / "config.yaml").exists() and not (run / "summary.json").exists():
        vimoe("train", "--resume", str(run))
    elif not run.exists():
        configs = ["--config", str(study / "base.yaml"), "--config", str(arm)]
        vimoe("train", *configs, *extra, "--train.seed", str(seed), "--out", str(run))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    score = vimoe("evaluate", str(run))
    if score["split"] != "test":
        raise SystemExit(f"{run}: a score on {score['split']}: expected one on test; add test images, or name them")
    settings = (study / "base.yaml").read_bytes() + arm.read_bytes() + "\n".join(extra).encode()
    write_json(result, {
        "arm": arm.stem,
        "seed": seed,
        "test": score,
        **{key: summary[key] for key in KEPT},
        "patch_ceiling": summary.get("patch_ceiling"),
        "cost": cost(run),
        "settings": hashlib.sha256(settings).hexdigest()[:12],
        "machine": f"{platform.machine()}, {platform.system()}",
    })  # fmt: skip
    print(result, flush=True)


def cost(run: Path) -> dict[str, float]:
    """Return parameters, activated parameters and multiply-adds of a run's model for one training crop."""
    return asdict(count(load(run / "model")))


def table(results: list[dict[str, Any]], control: str) -> str:
    """Return mean and standard deviation over seeds by arm, and each arm against the control, paired by seed."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], {})[result["seed"]] = result
    names = shown(results[0]["test"])
    key = names.judge
    order = sorted(arms, key=lambda arm: (arm != control, arm))
    lines = [
        f"| arm | seeds | {names.judge_name}, % on test | against {control}, points | loss | on validation "
        "| activated, M | MACs, G |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in order:
        mine = list(arms[arm].values())
        scores, losses = [100 * r["test"][key] for r in mine], [r["test"]["loss"] for r in mine]
        decided = [100 * r["val"][key] for r in mine]
        paired = [
            100 * (r["test"][key] - arms[control][seed]["test"][key])
            for seed, r in arms[arm].items()
            if seed in arms.get(control, {})
        ]
        lines.append(
            f"| {arm} | {len(mine)} | {spread(scores, '.2f')} | "
            f"{'' if arm == control else difference(paired, len(arms) - 1)} | {spread(losses, '.4f')} | "
            f"{spread(decided, '.2f')} | "
            f"{mine[0]['cost']['activated_params'] / 1e6:.2f} | {mine[0]['cost']['macs'] / 1e9:.3f} |"
        )
    first = results[0]
    notes = [
        f"{first['test']['images']} test images; mean ± standard deviation over seeds. Differences are paired by seed, "
        f"with a 95% interval of Student's t, widened for {len(arms) - 1} comparisons (Bonferroni). MACs are of one "
        f"training crop. Versions: torch {first['versions']['torch']}, timm {first['versions']['timm']}."
    ]
    if first["patch_ceiling"]:
        notes.append(f"One right label for each patch would reach {100 * first['patch_ceiling']:.2f}% on validation.")
    if key == "miou":
        notes += ["", *per_class(arms, order, first["classes"])]
    return "\n".join([*lines, "", *notes])


def per_class(arms: dict[str, dict[int, dict[str, Any]]], order: list[str], classes: list[str]) -> list[str]:
    """Return the IoU by class on test, as the mean over seeds."""
    lines = [f"| IoU, % | {' | '.join(order)} |", "|---" * (len(order) + 1) + "|"]
    for c, name in enumerate(classes):
        cells = []
        for arm in order:
            found = [r["test"]["per_class_iou"][c] for r in arms[arm].values()]
            cells.append("–" if None in found else f"{100 * statistics.fmean(found):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """Return mean ± standard deviation as text; for one value without the deviation."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def difference(paired: list[float], comparisons: int) -> str:
    """Return the mean of paired differences and its interval as text."""
    if len(paired) < 2:
        return "too few seeds"
    mean = interval(paired, comparisons)
    return f"{mean.value:+.2f} [{mean.low:+.2f}, {mean.high:+.2f}]"


def write_table(study: Path, control: str) -> None:
    """Put the table between the marks of the study's README."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((study / "results").glob("*.json"))]
    for arm in {result["arm"] for result in results}:
        if len({result["settings"] for result in results if result["arm"] == arm}) > 1:
            place = study / "results"
            raise SystemExit(f"{place}: the seeds of {arm} had different settings: expected the same; remove the older")
    put_between_marks(study / "README.md", table(results, control) if results else "No result yet.")


def main() -> None:
    """Read the command line."""
    given = sys.argv[1:]
    mine, extra = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="to train; none writes the table alone")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders go")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--control", default="dense", help="the arm that others are compared with")
    args = parser.parse_args(mine)
    arms = sorted((args.study / "arms").glob("*.yaml"))
    (args.study / "results").mkdir(exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:  # seed by seed, so that what is there can be compared
        jobs = [pool.submit(run_one, args.study, a, s, args.runs, extra) for s in args.seeds for a in arms]
        for job in jobs:
            job.result()
    write_table(args.study, args.control)


if __name__ == "__main__":
    main()
