"""What the tours share: a parent, arms that start from it with equal further training, what their seeds support, and
how the routing of the ViMoE is told.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from scipy import stats

from vimoe import run_folder
from vimoe.analysis.evidence import Evidence
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.train import run_training
from vimoe.report.curves import curves, loads
from vimoe.report.html_page import Page
from vimoe.report.routing_section import add_routing_section, routing_summary
from vimoe.report.run_files import LOAD, METRICS

SEEDS = (0, 1, 2)
PARENT = "parent"
DRAWS = 5  # permutations in an analysis
DISCLAIMER = (
    "This is a tour: a tiny model on tiny images, to show what the tool does. It says nothing about ViMoE on real data."
)


@dataclass(frozen=True)
class Arm:
    """One way to spend the further epochs."""

    name: str
    moe: MoEConfig
    note: str

    def run(self, seed: int) -> str:
        """The folder of its run, within that of the tour."""
        return f"{self.name.replace(',', '').replace(' ', '-').lower()}-seed{seed}"


@dataclass(frozen=True)
class Tour:
    """A parent from scratch, and arms.

    Args:
        data, model, first: what the parent is and learns, and how.
        further: how each arm goes on, once a seed.
        arms: the first is the control.
    """

    data: DataConfig
    model: ModelConfig
    first: TrainConfig
    further: TrainConfig
    arms: tuple[Arm, ...]

    def train(self, folder: Path, console: Console) -> dict[str, list[Path]]:
        """Trains all of it into run folders within a folder; returns those of the parent, and of each arm by seed."""
        parent = folder / PARENT
        self._train(parent, self.model, MoEConfig(layers="none"), self.first)
        done: dict[str, list[Path]] = {PARENT: [parent], **{arm.name: [] for arm in self.arms}}
        start = ModelConfig(name=f"local-dir:{parent / run_folder.MODEL}")
        for seed in SEEDS:
            for arm in self.arms:
                console.print(f"seed {seed}: {arm.name}")
                self._train(folder / arm.run(seed), start, arm.moe, replace(self.further, seed=seed))
                done[arm.name].append(folder / arm.run(seed))
        return done

    def _train(self, out: Path, model: ModelConfig, moe: MoEConfig, config: TrainConfig) -> None:
        run_training(Settings(model=model, moe=moe, data=self.data, train=config), out)


def tour_folder(out: str | None) -> Path:
    """Makes the folder of a tour, runs/demo-DATE-TIME where none is named. Raises FolderError where it cannot."""
    return run_folder.new_run(out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")


@contextmanager
def tiny_models() -> Iterator[None]:
    """One thread, for more would wait for one another, long on a busy machine; idle experts are told at the end."""
    threads, log = torch.get_num_threads(), logging.getLogger("vimoe")
    level = log.level
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(level)


def compare(
    shares: Mapping[str, Sequence[float]], name: str, control: str, comparisons: int, images: int, what: str
) -> str:
    """What the seeds support of one arm against another, for this one parent: the paired difference of their scores.

    With its 95% interval (Student's t), widened for as many comparisons as are made (Bonferroni). A difference cannot
    be known better than to one image, so seeds that agree by chance do not make it certain.

    Args:
        shares: scores in 0..1 of each arm, by seed.
        name, control: which two.
        comparisons: how many are made in all.
        images: that each score is of.
        what: the name of the score.
    """
    differences = [100 * (a - b) for a, b in zip(shares[name], shares[control], strict=True)]
    mean, seeds = statistics.fmean(differences), len(differences)
    error = max(statistics.stdev(differences), 100 / images) / seeds**0.5
    half = float(stats.t.ppf(1 - 0.025 / comparisons, seeds - 1)) * error
    verdict = "cannot be told apart" if abs(mean) <= half else "better" if mean > 0 else "worse"
    return (
        f"{name} against {control}: {mean:+.2f} points of {what}, 95% interval {mean - half:+.2f} to "
        f"{mean + half:+.2f} over {seeds} seeds and {comparisons} comparisons: {verdict}"
    )


def analysed(trained: Sequence[Path]) -> list[Evidence]:
    """The evidence of runs, of which each folder gets its own."""
    return [FinishedRun(run).analyze(draws=DRAWS) for run in trained]


def by_seed(evidence: Sequence[Evidence]) -> list[str]:
    """What the routing of each seed comes to."""
    return [
        f"seed {seed}: {line}"
        for seed, one in zip(SEEDS, evidence, strict=True)
        for line in routing_summary(one.to_dict())
    ]


def add_routing_and_training(page: Page, arm: Arm, folder: Path, evidence: Sequence[Evidence]) -> None:
    """Adds the routing and the training of an arm's first run, within the folder of the tour, and `by_seed` of all."""
    seed = SEEDS[0]
    add_routing_section(page, evidence[0].to_dict(), "Routing")
    page.subheading("Over seeds")
    page.text(f"The routing shown is that of seed {seed}; each run's folder has its own report. In short, all seeds:")
    page.items(by_seed(evidence))
    page.heading(f"Training of the {arm.name}, seed {seed}")
    run = folder / arm.run(seed)
    page.figure(curves(run / METRICS), "curves", "Loss and score by epoch.")
    page.figure(loads(run / LOAD), "load", "Share of each expert in training, by epoch.")


def told(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text."""
    lines = [header, *rows]
    first, *others = (max(map(len, column)) + 2 for column in zip(*lines, strict=True))
    return "\n".join(
        f"{row[0]:<{first}}" + "".join(f"{cell:>{wide}}" for cell, wide in zip(row[1:], others, strict=True))
        for row in lines
    )
