"""This checkout against another one: the layer's rows and training steps, in turns in one run.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before --rounds 8 --photos FOLDER

Both are called by their command line, which does not change. A round runs each of them once, in an order that
alternates. Shown is the ratio of this checkout to the other: median over rounds, and a 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
TRAIN = (
    "train --data.path digits --data.workers 0 --model.name vit_tiny_patch16_224 --model.pretrained false "
    "--model.img_size 8 --moe.layers all "
    "--train.epochs 4 --train.batch_size 64 --train.precision no --train.min_crop 1 --train.hflip 0 "
    "--train.tensorboard false"
)
CACHED = (  # the last two of twelve blocks, on features that the first round has computed
    "train --data.workers 0 --data.cache features --data.views 1 --model.name vit_small_patch14_dinov2 "
    "--model.pretrained false --model.img_size 224 --moe.layers last:2 --train.train_only moe --train.epochs 3 "
    "--train.batch_size 16 --train.precision no --train.tensorboard false"
)
SHAPE = ("--model.args", "{patch_size: 2, embed_dim: 64, depth: 4, num_heads: 4}")


def call(checkout: Path, *arguments: str) -> dict:
    """Run a verb of a checkout and return its JSON."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vimoe.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(checkout: Path, photos: Path | None) -> dict[str, float]:
    """Return the figures of one round, in seconds; those of a layer over the floor of the same process."""
    found = {}
    for routing in ("image", "token"):
        arguments = f"bench layer --moe.routing {routing} --bench.images 4 --bench.rounds 8".split()
        for kind, rows in call(checkout, *arguments)["timings"].items():
            found[f"layer, {routing} routing, {kind}"] = next(r["ratio"] for r in rows if r["name"] == "vimoe auto")
    with tempfile.TemporaryDirectory() as folder:
        run = call(checkout, *TRAIN.split(), *SHAPE, "--out", f"{folder}/run")
        found["training steps of the demo's ViMoE"] = run["seconds"]
        if photos:
            call(checkout, *CACHED.split(), "--data.path", str(photos), "--out", f"{folder}/cached")
            with Path(folder, "cached/metrics.csv").open(encoding="utf-8") as file:
                rates = [float(row["images_per_second"]) for row in csv.DictReader(file)]
            found["an epoch on cached features"] = 1 / max(rates)
    return found


def main() -> None:
    """Print a row for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--photos", type=Path, help="folder of class folders, to train on its cached features too")
    parser.add_argument("--out", type=Path, help="file for the figures of all rounds, as JSON")
    options = parser.parse_args()
    checkouts = [HERE, options.other.resolve()]
    rounds = []
    for number in range(options.rounds):
        order = checkouts if number % 2 else checkouts[::-1]
        found = {checkout: measure(checkout, options.photos) for checkout in order}
        rounds.append({name: [found[checkout][name] for checkout in checkouts] for name in found[HERE]})
        if options.out:
            options.out.write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rng = np.random.default_rng(0)
    for name in rounds[0]:
        ratios = np.array([ours / theirs for ours, theirs in (each[name] for each in rounds)])
        medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        print(f"{name}: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
