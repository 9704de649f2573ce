"""What is asked of a study at the command line: compute what is left, one cell of it, or submit jobs that do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import vimoe
from vimoe.config.yaml_reader import write_yaml
from vimoe.errors import ConfigError, choice
from vimoe.files import read_text, write_text
from vimoe.study.one_cell import Environment, Verb, compute
from vimoe.study.plan import Cell, Study, code_version, digest_of_path, given_values
from vimoe.study.queue import Queue, Workers


class Work:
    """The cells of a study with what they are computed with.

    Args:
        study: the study.
        pairs: NAME=VALUE pairs for ${NAME} in its settings.
        runs: folder for run folders and claims.
        verb: `Environment.verb`.
        keep: keep the run folders of finished cells.

    Raises:
        ConfigError: if a variable has no value, or the settings of an arm contradict each other.
    """

    def __init__(self, study: Study, pairs: list[str], runs: Path, verb: Verb, keep: bool = False) -> None:
        values = given_values(pairs, study.paths)
        study.check(values)
        self.cells = {cell.name: cell for cell in study.all_cells()}
        names = sorted({name for cell in self.cells.values() for name in cell.variables})
        inputs = {name: digest_of_path(values[name]) for name in names}
        code = {after: code_version(after) for after in (False, True)}
        self.study, self.keys, self.pairs = study, study.keys(inputs, code), pairs
        self.environment = Environment(values=values, inputs=inputs, code=code, runs=runs, verb=verb, keep=keep)

    def compute(self, name: str, key: str | None = None) -> bool:
        """Compute the cell of this name in this process; return False if another process has it.

        Args:
            name: name of the cell.
            key: key that the cell has to have; by default any.

        Raises:
            ConfigError: if there is no such cell, or it has another key.
        """
        if name not in self.cells:
            raise ConfigError(f"--cell {name}: {choice(name, list(self.cells))}")
        cell = self.cells[name]
        own = self.keys[cell.fingerprint][0]
        if key not in (None, own):  # else its worker would look for another file, and begin it again for ever
            raise ConfigError(
                f"--cell {name}: settings, data or vimoe's code have changed since the workers began: expected the "
                f"same; stop them, and start again"
            )
        return compute(self.study, cell, own, self.environment)

    def queue(self, arms: Sequence[str] = ()) -> Queue:
        """Return the cells that are left of these arms, of all if none is named."""
        for arm in arms:
            if arm not in self.study.arms:
                raise ConfigError(f"--arms {arm}: {choice(arm, list(self.study.arms))}")
        env = self.environment
        return Queue(self.study, self.keys, env.runs, lambda cell: macs(cell, env.values, env.verb), tuple(arms))

    def command(self, *more: str) -> list[str]:
        """Return the command that works on these cells as this one does, with more options."""
        command = [sys.executable, "-m", "vimoe", "study", str(self.study.folder), "--runs", str(self.environment.runs)]
        command += [word for pair in self.pairs for word in ("--set", pair)]
        command += ["--datasets", *self.study.chosen] if self.study.chosen else []
        return [*command, *(["--keep"] if self.environment.keep else []), *more]

    def workers(self, queue: Queue, number: int, say: Callable[[str], Any]) -> Workers:
        """Return workers that compute each cell of a queue in a process of its own, `number` of them at a time.

        Several GPUs are taken in turns. `say` prints a line.
        """
        there = gpus()
        devices = [there[worker % len(there)] if len(there) > 1 else None for worker in range(number)]
        return Workers(queue, Processes(self.command(), self.environment.runs, devices), say)


class Processes:
    """Cells in processes of their own, each with a log in the runs folder, which goes when the cell is there.

    Args:
        command: command to which --cell NAME --key KEY is added.
        runs: folder for run folders and claims.
        devices: for each process that may run at a time the GPU that it sees; None for all that this one sees.
    """

    def __init__(self, command: Sequence[str], runs: Path, devices: Sequence[str | None] = (None,)) -> None:
        self.command, self.runs = list(command), runs
        self._running: set[subprocess.Popen[bytes]] = set()
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for device in devices:
            self._free.put(device)

    def run(self, cell: Cell, key: str) -> str | None:
        """Compute a cell; return None, or the last line of its log if it failed."""
        device = self._free.get()
        try:
            return self._run(cell, key, _environment(device))
        finally:
            self._free.put(device)

    def _run(self, cell: Cell, key: str, environment: dict[str, str]) -> str | None:
        self.runs.mkdir(parents=True, exist_ok=True)
        log = self.runs / f"{cell.name}.{key}.log"
        with log.open("ab") as out:
            # a session of its own: Ctrl-C comes here alone, and ends it once, with a checkpoint
            process = subprocess.Popen(
                [*self.command, "--cell", cell.name, "--key", key],
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        self._running.add(process)
        status = process.wait()
        self._running.discard(process)
        if status == 0:
            log.unlink(missing_ok=True)
            return None
        lines = read_text(log).split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit status {status}")

    def end(self) -> None:
        """Ask those that run to end."""
        for process in list(self._running):
            process.terminate()


def gpus() -> list[str]:
    """Return the names under which CUDA_VISIBLE_DEVICES lists the GPUs that this process sees."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[:count] if listed else [str(number) for number in range(count)]


def _environment(device: str | None) -> dict[str, str]:
    """Return the environment in which this package is found first, wherever the command was started, and one GPU."""
    here = str(Path(vimoe.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}


def macs(cell: Cell, values: Mapping[str, str], verb: Verb) -> float:
    """Return the multiply-adds of an image in a cell's ViT, without the decoder of a segmenter."""
    settings = cell.filled(values)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "cell.yaml")
        asked = {name: dict(settings[name]) for name in ("model", "moe") if name in settings}
        asked.get("model", {}).pop("decoder", None)
        write_text(config, write_yaml(asked))
        return float(verb("count", "--config", str(config))["moe"]["macs"])
