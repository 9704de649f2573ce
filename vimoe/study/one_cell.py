"""One cell in this process: claimed, trained or gone on with, scored, analysed, and written as one JSON file."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from vimoe import run_folder
from vimoe.config.yaml_reader import write_yaml
from vimoe.errors import DataError
from vimoe.files import discard_file, discard_folder, read_text, write_json, write_text
from vimoe.study.plan import Cell, Study

Verb = Callable[..., dict[str, Any]]  # runs a verb of vimoe, such as ("evaluate", RUN), and returns what --json prints
KEPT = ("val", "best_epoch", "epochs", "stopped_early", "train_images", "classes", "features", "fused", "stages",
        "patch_ceiling", "alarms", "versions")  # of summary.json  # fmt: skip
NO_TEST = (
    "no test images: expected some, which nothing was chosen by; add a folder test to the data, or name one with "
    "data.test_split"
)
LEFT_OUT = ("examples", "comparison", "expert_order", "class_order")  # of an analysis: of images, or large


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Paths, versions and functions that a cell is computed with, beside its settings.

    Attributes:
        values: value of each variable.
        inputs: digest of each path (`digest_of_path`) by variable.
        code: digest of the package (`code_version`), with steps after the training and without.
        runs: folder for run folders and claims.
        verb: function that runs a verb; it is handed in, since the command line knows studies and not they it.
        keep: keep the run folders.
    """

    values: Mapping[str, str]
    inputs: Mapping[str, str]
    code: Mapping[bool, str]
    runs: Path
    verb: Verb
    keep: bool = False


def file_of(study: Study, cell: Cell, key: str) -> Path:
    """Return the path of a cell's JSON."""
    return study.results / f"{cell.name}.{key}.json"


def claim(runs: Path, cell: Cell, key: str) -> filelock.FileLock:
    """Return the lock of a cell, which the system releases when its process ends, however it ends."""
    runs.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(runs / f"{cell.name}.{key}.lock", timeout=0)


def is_claimed(runs: Path, cell: Cell, key: str) -> bool:
    """Return True if a process has the cell."""
    if not (runs / f"{cell.name}.{key}.lock").exists():
        return False
    try:
        with claim(runs, cell, key):
            return False
    except filelock.Timeout:
        return True


def compute(study: Study, cell: Cell, key: str, environment: Environment) -> bool:
    """Compute a cell, unless it is there, and return True; False if another process has claimed it."""
    runs = environment.runs
    try:
        with claim(runs, cell, key):
            if not file_of(study, cell, key).exists():
                study.results.mkdir(exist_ok=True)
                run = runs / f"{cell.name}.{key}"
                result = {
                    "name": cell.name, "data": cell.data, "arm": cell.arm, "rate": cell.rate, "seed": cell.seed,
                    "search": cell.search, "key": key, "fingerprint": cell.fingerprint, "settings": cell.settings,
                    "inputs": {name: environment.inputs[name] for name in cell.variables},
                    "code": environment.code[bool(cell.after)],
                    **_measured(cell, environment, run),
                }  # fmt: skip
                write_json(file_of(study, cell, key), result)
                _set_aside(study, cell, key)
                if not environment.keep:
                    for each in (run, *(_beside(run, step) for step in cell.after)):
                        discard_folder(each)
                    discard_file(run.with_name(f"{run.name}.yaml"))
    except filelock.Timeout:
        return False
    return True


def _set_aside(study: Study, cell: Cell, key: str) -> None:
    """Move the cell's results of other data or code, which no table can show beside the new one, to results/older."""
    for path in study.results.glob(f"{cell.name}.*.json"):
        values = json.loads(read_text(path))
        if values["fingerprint"] == cell.fingerprint and values["key"] != key:
            (study.results / "older").mkdir(exist_ok=True)
            path.replace(study.results / "older" / path.name)


def _measured(cell: Cell, environment: Environment, run: Path) -> dict[str, Any]:
    started, verb = time.monotonic(), environment.verb
    summary = _train(cell, environment, run)
    if not summary["scan"]["test"]:  # told by the first cell of a search, though only later ones are scored on test
        raise DataError(f"{run}: {NO_TEST}")
    found: dict[str, Any] = {key: summary[key] for key in KEPT if key in summary}
    began = time.monotonic()
    steps: dict[str, Any] = {}
    if not cell.search:  # the search decides by validation and never sees test
        found["test"] = verb("evaluate", str(run))
        for step in cell.after:
            steps[step] = STEPS[step](verb, run)
    after = time.monotonic() - began
    # with reading and checking images; of a training that was killed and went on, what this process did not see too
    whole = max(time.monotonic() - started, summary["seconds"] + after)
    return {
        **found,
        "analysis": steps.pop("analyze", None),
        "after": steps,
        "cost": _cost(run),
        "seconds": {"train": summary["seconds"], "after": after, "cell": whole},
        "precision": run_folder.open_run(run).settings.train.precision,
        "machine": machine(),
    }


def _train(cell: Cell, environment: Environment, run: Path) -> dict[str, Any]:
    """Train in a run folder, go on where a killed process stopped, and return the content of summary.json."""
    if not (run / run_folder.SUMMARY).exists():
        if (run / run_folder.CHECKPOINT).exists():
            environment.verb("train", "--resume", str(run))
        else:
            discard_folder(run)  # of a process that was killed before its first checkpoint
            settings = run.with_name(f"{run.name}.yaml")
            write_text(settings, write_yaml(cell.filled(environment.values)))
            environment.verb("train", "--config", str(settings), "--out", str(run))
    summary: dict[str, Any] = json.loads((run / run_folder.SUMMARY).read_text(encoding="utf-8"))
    return summary


def _analyze(verb: Verb, run: Path) -> dict[str, Any]:
    found = verb("analyze", str(run))
    kept = ("base", "images", "overruled_images", "pairs", "routes", "features", "agreement")
    layers = [{k: v for k, v in layer.items() if k not in LEFT_OUT} for layer in found["layers"]]
    return {**{key: found[key] for key in kept}, "layers": layers}


def _prune(verb: Verb, run: Path, *options: str) -> dict[str, Any]:
    out = _beside(run, "merge_all" if options else "prune")
    discard_folder(out)  # of a process that was killed
    found = verb("prune", str(run), "--out", str(out), *options)
    return {
        "test": verb("evaluate", str(out)),
        **{key: found[key] for key in ("tolerance", "steps", "kept", "before", "after", "split")},
    }


def _beside(run: Path, step: str) -> Path:
    """Return the path of the run that a step leaves."""
    return run.with_name(f"{run.name}.{step}")


def _cost(run: Path) -> dict[str, Any]:
    """Return parameters, activated parameters and multiply-adds of a run's model for one image."""
    from vimoe.models.cost import count
    from vimoe.models.model_folder import load

    return asdict(count(load(run / run_folder.MODEL)))


def machine() -> dict[str, Any]:
    """Return what figures and seconds may depend on, without the machine's name."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"system": platform.system(), "cpu": f"{platform.machine()}, {cpu}", "threads": torch.get_num_threads(),
            "gpu": gpu}  # fmt: skip


STEPS: dict[str, Callable[[Verb, Path], dict[str, Any]]] = {
    "analyze": _analyze,
    "prune": _prune,
    "merge_all": lambda verb, run: _prune(verb, run, "--merge_all", "true"),
}
