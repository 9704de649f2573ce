"""Work on a study from the command line: all cells that are left, one cell, or commands for jobs that do it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import vimoe
from vimoe.config.data import DataConfig
from vimoe.config.yaml_reader import write_yaml
from vimoe.errors import ConfigError, DataError, VimoeError, choice
from vimoe.files import discard_file, read_text, temporary_folder, write_text
from vimoe.study.digests import code_version, digest_of_path
from vimoe.study.one_cell import NO_TEST, Environment, Verb, compute
from vimoe.study.plan import FILE, Cell, Study, given_values, settings_of
from vimoe.study.queue import Queue, Workers


class Work:
    """The cells of a study with what they are computed with.

    Args:
        study: the study.
        pairs: NAME=VALUE pairs for ${NAME} in its settings.
        runs: folder for run folders and claims.
        verb: `Environment.verb`.
        keep: keep the run folders of finished cells.
        one: name of the only cell to compute, whose data alone are read; all if None.

    Raises:
        ConfigError: if there is no such cell, a variable has no value, or the settings of an arm contradict each other.
    """

    def __init__(
        self, study: Study, pairs: list[str], runs: Path, verb: Verb, keep: bool = False, one: str | None = None
    ) -> None:
        values = given_values(pairs, study.paths)
        study.check(values)
        cells = {cell.name: cell for cell in study.all_cells()}
        if one is not None and one not in cells:
            raise ConfigError(f"--cell {one}: {choice(one, list(cells))}")
        self.one = None if one is None else cells[one]
        names = sorted({name for cell in ([self.one] if self.one else cells.values()) for name in cell.variables})
        inputs = {name: digest_of_path(values[name]) for name in names}
        code = {after: code_version(after) for after in (False, True)}
        self.study, self.pairs = study, pairs
        self.keys = study.keys(inputs, code, [self.one] if self.one else None)
        self.environment = Environment(values=values, inputs=inputs, code=code, runs=runs, verb=verb, keep=keep)

    def compute(self, key: str | None = None) -> bool:
        """Compute the one cell in this process; return False if another process has it.

        Args:
            key: key that the cell has to have; by default any.

        Raises:
            ConfigError: if it has another key.
        """
        assert self.one is not None
        own = self.keys[self.one.fingerprint][0]
        if key not in (None, own):  # else its worker would look for another file, and begin it again for ever
            raise ConfigError(
                f"--cell {self.one.name}: settings, data or vimoe's code have changed since the workers began: "
                f"expected the same; stop them, and start again"
            )
        return compute(self.study, self.one, own, self.environment)

    def check_trainings(self, cells: Iterable[Cell]) -> None:
        """Raise VimoeError for an arm that cannot be trained, or data without test images, before anything is trained.

        Else the arm whose cells are dearest, and so are the last, would fail after all others.

        Args:
            cells: cells to be computed, of which one is checked for each arm and data set.
        """
        from vimoe.experiments.train import check_training

        listed: dict[DataConfig, Any] = {}
        for cell in {(cell.data, cell.arm): cell for cell in cells}.values():
            settings = settings_of(cell.filled(self.environment.values))
            with self._named(cell):
                listed[settings.data] = check_training(settings, listed.get(settings.data))
                if not listed[settings.data].test:
                    raise DataError(NO_TEST)

    def queue(self, arms: Sequence[str] = ()) -> Queue:
        """Return the cells that are left of these arms, of all if none is named."""
        for arm in arms:
            if arm not in self.study.arms:
                raise ConfigError(f"--arms {arm}: {choice(arm, list(self.study.arms))}")
        return Queue(self.study, self.keys, self.environment.runs, self._macs, tuple(dict.fromkeys(arms)))

    def _macs(self, cell: Cell) -> float:
        with self._named(cell):
            return macs(cell, self.environment.values, self.environment.verb)

    @contextmanager
    def _named(self, cell: Cell) -> Iterator[None]:
        """Add file, data set and arm to an error."""
        try:
            yield
        except VimoeError as error:
            raise type(error)(f"{self.study.folder / FILE}: {cell.data}, {cell.arm}: {error}") from error

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
        self._ended = False
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
        if self._ended:  # while it was started
            process.terminate()
        status = process.wait()
        self._running.discard(process)
        if status == 0:
            discard_file(log)
            return None
        if status < 0:
            return f"ended by {signal.Signals(-status).name}; the log is {log}"
        lines = read_text(log).split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit status {status}")

    def end(self) -> None:
        """Ask those that run to end."""
        self._ended = True
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
    with temporary_folder(Path(tempfile.gettempdir())) as folder:
        config = folder / "cell.yaml"
        asked = {name: dict(settings[name]) for name in ("model", "moe") if name in settings}
        asked.get("model", {}).pop("decoder", None)
        write_text(config, write_yaml(asked))
        return float(verb("count", "--config", str(config))["moe"]["macs"])
