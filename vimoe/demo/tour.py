"""A tour: a parent, arms that start from it with equal further training, a comparison over seeds, and a page."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from scipy import stats
from torch import nn

from vimoe import run_folder
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.pruning import receipts
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.train import run_training
from vimoe.metrics.registry import SCORES, Shown
from vimoe.models.model_folder import load
from vimoe.report.curves import curves, loads
from vimoe.report.html_page import Page
from vimoe.report.routing_section import add_routing_in_short, add_routing_section, routing_summary
from vimoe.report.run_files import LOAD, METRICS
from vimoe.report.table_cells import COSTS, over_seeds
from vimoe.tasks.base import Task, task_of

SEEDS = (0, 1, 2)
PARENT = "parent"
DRAWS = 5  # permutations in an analysis
DISCLAIMER = (
    "This is a tour: a tiny model on tiny images, to show what the tool does. It says nothing about ViMoE on real data."
)
CELLS = (  # key, unit and format of each of the costs
    ("loss", 1, "{:.4f}"), ("params", 1e6, "{:.3f}"), ("activated_params", 1e6, "{:.3f}"), ("macs", 1e9, "{:.4f}"),
    ("images_per_second", 1, "{:.0f}"),
)  # fmt: skip

Models = dict[str, list[nn.Module]]  # by arm, one a seed
Table = Mapping[str, Sequence[dict[str, Any]]]  # figures by arm, one dict a seed


@dataclass(frozen=True)
class Arm:
    """One way to spend the further epochs."""

    name: str
    moe: MoEConfig
    note: str

    def run(self, seed: int) -> str:
        """Return the name of its run folder within the folder of the tour."""
        return f"{self.name.replace(',', '').replace(' ', '-').lower()}-seed{seed}"


class Findings(NamedTuple):
    """Results of one tour beyond the table: lines to print, figures for summary.json, and sections of the page."""

    lines: list[str]
    figures: dict[str, Any]
    add_sections: Callable[[Page, Table], None]


@dataclass(frozen=True)
class Tour(ABC):
    """A parent from scratch, and arms.

    Args:
        subject: images of the tour, in words.
        data: images to learn from.
        model: model of the parent.
        first: training of the parent.
        further: training of each arm, once a seed.
        arms: arms to compare; the first is the control, the last the ViMoE.
        shares: keys of the shares in the table; the first is compared.
    """

    subject: str
    data: DataConfig
    model: ModelConfig
    first: TrainConfig
    further: TrainConfig
    arms: tuple[Arm, ...]
    shares: tuple[str, ...]

    @abstractmethod
    def introduction(self, data: Any) -> str:
        """Return the first sentences of the page."""

    @abstractmethod
    def study(self, task: Task[Any], data: Any, models: Models, evidence: Sequence[Evidence]) -> Findings:
        """Look at the trained models, and add further ones to `models` if they are to be measured too."""

    def run(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """Run the tour in a new folder, and return the text to print and the figures."""
        start, console = time.perf_counter(), Console(stderr=True)
        task = task_of(Settings(data=self.data, train=self.first))
        data = task.find(self.data)
        console.print(f"A tour on {self.subject}: {data}")
        trained = self._train(folder, console)
        models = {name: [load(run / run_folder.MODEL) for run in group] for name, group in trained.items()}
        console.print("analysing the ViMoEs")
        evidence = [FinishedRun(run).analyze(draws=DRAWS) for run in trained[self.arms[-1].name]]
        findings = self.study(task, data, models, evidence)
        table = _measure(task, data, models)
        scores = {arm: [measured[self.shares[0]] for measured in group] for arm, group in table.items()}
        control, *others = (arm for arm in table if arm != PARENT)
        comparisons = [
            compare(scores, arm, control, len(others), len(data.test), self._names.shares[self.shares[0]])
            for arm in others
        ]
        seconds = time.perf_counter() - start

        page = Page(f"vimoe: a tour on {self.subject}", folder / run_folder.FIGURES)
        page.text(f"{self.introduction(data)} It took {seconds:.0f} seconds.")
        page.text(DISCLAIMER)
        self._add_results(page, table, comparisons)
        page.text(f"The routing of the {self.arms[-1].name}, seed {SEEDS[0]}:")
        add_routing_in_short(page, evidence[0].to_dict())
        findings.add_sections(page, table)
        self._add_routing_and_training(page, folder, evidence)
        report = page.write(folder / "report.html")
        summary = {"table": table, "comparisons": comparisons, **findings.figures, "seconds": seconds}
        summary["report"] = str(report)
        run_folder.write_json(folder / run_folder.SUMMARY, {"schema": run_folder.SCHEMA, "command": "demo", **summary})
        lines = ["", as_text(self._header(), self._rows(table)), "", *comparisons, "", *findings.lines, "", DISCLAIMER]
        return "\n".join([*lines, f"{seconds:.0f} s; report: {report}"]), summary

    def _train(self, folder: Path, console: Console) -> dict[str, list[Path]]:
        """Train into run folders within a folder, and return those of the parent, and of each arm by seed."""
        parent = folder / PARENT
        run_training(Settings(model=self.model, moe=MoEConfig(layers="none"), data=self.data, train=self.first), parent)
        done: dict[str, list[Path]] = {PARENT: [parent], **{arm.name: [] for arm in self.arms}}
        start = ModelConfig(name=f"local-dir:{parent / run_folder.MODEL}")
        for seed in SEEDS:
            for arm in self.arms:
                console.print(f"seed {seed}: {arm.name}")
                settings = Settings(model=start, moe=arm.moe, data=self.data, train=replace(self.further, seed=seed))
                run_training(settings, folder / arm.run(seed))
                done[arm.name].append(folder / arm.run(seed))
        return done

    @property
    def _names(self) -> Shown:
        names: Shown = SCORES.find(self.data.task)
        return names

    def _header(self) -> tuple[str, ...]:
        return ("", *(f"{self._names.shares[key]}, %" for key in self.shares), *COSTS)

    def _rows(self, table: Table) -> list[tuple[str, ...]]:
        cells = (*((key, 0.01, "{:.2f}") for key in self.shares), *CELLS)
        return [
            (name, *(over_seeds([one[key] for one in group], unit, form) for key, unit, form in cells))
            for name, group in table.items()
        ]

    def _add_results(self, page: Page, table: Table, comparisons: list[str]) -> None:
        page.heading("Results")
        page.table(self._header(), self._rows(table))
        page.items([f"{arm.name}: {arm.note}" for arm in self.arms])
        page.text(
            f"Mean ± standard deviation over seeds, all from one parent. MACs are multiply-adds of one image; images/s "
            f"was measured in turns on this machine. What {len(SEEDS)} seeds support:"
        )
        page.items(comparisons)

    def _add_routing_and_training(self, page: Page, folder: Path, evidence: Sequence[Evidence]) -> None:
        """Add routing and training of the ViMoE's first run, and the routing of all seeds in short."""
        seed, arm = SEEDS[0], self.arms[-1]
        add_routing_section(page, evidence[0].to_dict(), "Routing", in_short=False)
        page.subheading("Over seeds")
        page.text(
            f"The routing shown is that of seed {seed}; each run's folder has its own report. In short, all seeds:"
        )
        page.items(by_seed(evidence))
        page.heading(f"Training of the {arm.name}, seed {seed}")
        run = folder / arm.run(seed)
        page.figure(curves(run / METRICS), "curves", "Loss and score by epoch.")
        page.figure(loads(run / LOAD), "load", "Share of each expert in training, by epoch.")


def _measure(task: Task[Any], data: Any, models: Models) -> dict[str, list[dict[str, Any]]]:
    """Return score on test, costs, and images a second measured in turns, of each model."""
    everything = [model for group in models.values() for model in group]
    loader = task.loader(everything[0], data, data.test)
    measured = iter(receipts(everything, loader, task.evaluate))
    return {name: [next(measured).to_dict() for _ in group] for name, group in models.items()}


def compare(
    shares: Mapping[str, Sequence[float]], name: str, control: str, comparisons: int, images: int, what: str
) -> str:
    """Return a sentence on one arm against another, for this one parent: the paired difference of their scores.

    With its 95% interval (Student's t), widened for the number of comparisons (Bonferroni). A difference is known to
    one image at best, so seeds that agree by chance do not make it certain.

    Args:
        shares: scores in 0..1 of each arm, by seed.
        name: arm to judge.
        control: arm to compare with.
        comparisons: number of comparisons in all.
        images: number of images behind each score.
        what: name of the score.
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


def by_seed(evidence: Sequence[Evidence]) -> list[str]:
    """Return the routing in short, by seed."""
    return [
        f"seed {seed}: {line}"
        for seed, one in zip(SEEDS, evidence, strict=True)
        for line in routing_summary(one.to_dict())
    ]


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text."""
    lines = [header, *rows]
    first, *others = (max(map(len, column)) + 2 for column in zip(*lines, strict=True))
    return "\n".join(
        f"{row[0]:<{first}}" + "".join(f"{cell:>{wide}}" for cell, wide in zip(row[1:], others, strict=True))
        for row in lines
    )
