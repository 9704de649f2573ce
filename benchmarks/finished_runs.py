"""Cost of the verbs on a finished run: on cached features of its frozen trunk beside the same on images.

    python benchmarks/finished_runs.py RUN OTHER --rounds 3

RUN and OTHER are two runs on one trunk that were trained with `data.cache: features`, such as a mixture and its dense
control; RUN has MoE layers. Every round begins with an empty cache. "evaluate, first" computes the features of test,
"evaluate, second" is of OTHER, and so on; "on images" is the same verb with the cache switched off, which is all that a
run could do before. Analysis and pruning find the features of validation, as after a training. Pruning is with a
receipt, and makes every layer dense. "Processor" is the time of the process on all of its threads: where other jobs
run, it disturbs less than the clock. A round before the others is to warm up. Prints a line an arm and round, then the
table of medians and ranges; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vimoe.bench.result import machine
from vimoe.experiments.finished_run import FinishedRun
from vimoe.tasks.base import task_of


def opened(path: Path, cached: bool) -> FinishedRun:
    """Return a run, which has its model loaded and its images listed, with the features or without."""
    run = FinishedRun(path)
    if not cached:
        settings = run.run.settings
        settings = replace(settings, data=replace(settings.data, cache="none", views=type(settings.data)().views))
        run.run = replace(run.run, settings=settings)
        run.task = task_of(settings)
    assert run.model and run.data
    return run


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Return seconds of some work by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def one_round(run: Path, other: Path, scratch: Path) -> dict[str, dict[str, float]]:
    """Return the times of every arm, in turn, from an empty cache on."""
    shutil.rmtree(scratch, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    copied = shutil.copytree(run, scratch / "run")  # analysis writes into it
    found: dict[str, dict[str, float]] = {}

    def measure(name: str, path: Path, cached: bool, work: Callable[[FinishedRun], object]) -> None:
        ready = opened(path, cached)
        found[name] = timed(lambda: work(ready))
        print(name, found[name], flush=True)

    measure("evaluate, first", copied, True, lambda each: each.score())
    measure("evaluate, second", other, True, lambda each: each.score())
    measure("evaluate, on images", copied, False, lambda each: each.score())
    ready = opened(copied, True)
    ready.task.validation(ready.model, ready.data)  # as a training leaves it
    for cached, where in ((True, "on features"), (False, "on images")):
        measure(f"analyze, {where}", copied, cached, lambda each: each.analyze())
        measure(f"diagnose, {where}", copied, cached, lambda each: each.diagnose())
        out = scratch / where
        measure(f"prune, {where}", copied, cached, lambda each, out=out: each.prune(out, tolerance=1e6))
    return found


RATIOS = {
    "evaluate, second": "evaluate, first",
    "evaluate, second ": "evaluate, on images",
    "analyze, on features": "analyze, on images",
    "diagnose, on features": "diagnose, on images",
    "prune, on features": "prune, on images",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rounds = [one_round(args.run, args.other, Path(scratch) / "round") for _ in range(args.rounds + 1)]
    rounds = rounds[1:]  # the first is to warm up
    table = {}
    for arm, base in RATIOS.items():
        for what in ("processor", "clock"):
            ratios = [each[arm.strip()][what] / each[base][what] for each in rounds]
            seconds = [statistics.median(each[name][what] for each in rounds) for name in (arm.strip(), base)]
            table[f"{arm.strip()} over {base}, {what}"] = {
                "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
                "seconds": seconds,
            }  # fmt: skip
    for name, row in table.items():
        ours, theirs = row["seconds"]
        print(
            f"{name}: {row['ratio']:.3f} ({row['smallest']:.3f} to {row['largest']:.3f}), {ours:.1f} s, {theirs:.1f} s"
        )
    print(json.dumps({"rounds": rounds, "machine": machine()}))


if __name__ == "__main__":
    main()
