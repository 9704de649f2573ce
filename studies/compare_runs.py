"""A table of runs that are named ARM-SEED: mean and standard deviation over seeds, each arm against the first.

    python studies/compare_runs.py runs --arms dense vimoe frozen-trunk small-data --seeds 0 1 2

Scores are those of `vimoe evaluate`; the rise is that of the validation loss from its best epoch to the last.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

from arms_over_seeds import difference, spread, vimoe


def rise(run: Path) -> float:
    """Return the validation loss of the last epoch above the lowest one."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    return losses[-1] - min(losses)


def table(runs: Path, arms: list[str], seeds: list[int]) -> str:
    """Return rows of Markdown."""
    head = ("arm", "test top-1, %", "test loss", f"against {arms[0]}, points", "best epoch", "epochs trained",
            "val loss, last minus best epoch's", "seconds")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    control: list[float] = []
    for arm in arms:
        folders = [runs / f"{arm}-{seed}" for seed in seeds]
        scores = [vimoe("evaluate", str(run)) for run in folders]
        summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in folders]
        top1 = [100 * score["top1"] for score in scores]
        control = control or top1
        paired = [ours - theirs for ours, theirs in zip(top1, control, strict=True)]
        cells = (
            arm, spread(top1, ".2f"), spread([score["loss"] for score in scores], ".3f"),
            "" if arm == arms[0] else difference(paired, len(arms) - 1),
            *(", ".join(str(summary[key]) for summary in summaries) for key in ("best_epoch", "epochs")),
            f"{statistics.fmean(map(rise, folders)):+.3f}", f"{statistics.fmean(s['seconds'] for s in summaries):.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    args = parser.parse_args()
    print(table(args.runs, args.arms, args.seeds))


if __name__ == "__main__":
    main()
