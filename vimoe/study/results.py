"""Cells that were computed, read from their JSON files, and what is chosen by them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimoe.errors import ConfigError, FolderError
from vimoe.files import read_text
from vimoe.metrics.registry import shown
from vimoe.study.paired import Name, mean_ranks
from vimoe.study.plan import Cell, Study


def best(val: Mapping[Name, Mapping[int, dict[str, Any]]]) -> Name:
    """Return the candidate with the best mean rank on validation; of equal ones that with the lowest mean loss.

    The rank is by the metric that judges epochs (top-1, mean IoU), among all candidates of one seed.

    Args:
        val: validation score of each candidate by seed.
    """
    judge = shown(next(iter(next(iter(val.values())).values()))).judge
    ranks = mean_ranks({name: {seed: v[judge] for seed, v in scores.items()} for name, scores in val.items()})
    losses = {name: statistics.fmean(v["loss"] for v in scores.values()) for name, scores in val.items()}
    return min(val, key=lambda name: (ranks[name], losses[name]))


@dataclass(frozen=True)
class Results:
    """Cells of a study that are there.

    Attributes:
        study: the study.
        cells: JSON of each cell by fingerprint, with the names that its data set and arm have now. Cells whose settings
            study.yaml no longer has are left out.

    Raises:
        ConfigError: if two files have the same settings, or a data set's cells were computed on different files.
    """

    study: Study
    cells: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, study: Study, keys: Mapping[str, Collection[str]] | None = None) -> Results:
        """Read the results of a study.

        Args:
            study: the study.
            keys: keys that the cell of each fingerprint may have, where code and data are known; else all are taken.
        """
        known = study.by_fingerprint
        cells: dict[str, dict[str, Any]] = {}
        origin: dict[str, Path] = {}
        for path in sorted(study.results.glob("*.json")):
            values = _result(path)
            mark = values["fingerprint"]
            if mark not in known or (keys is not None and values["key"] not in keys.get(mark, ())):
                continue
            if mark in cells:
                raise ConfigError(
                    f"{origin[mark]} and {path} are of the same settings, with other data or code: expected one of "
                    f"them; remove the older"
                )
            cells[mark], origin[mark] = {**values, "data": known[mark].data, "arm": known[mark].arm}, path
        _check_inputs(list(cells.values()))
        return cls(study, cells)

    def of(self, cells: list[Cell]) -> dict[int, dict[str, Any]]:
        """Return the JSON of those of these cells that are there, by seed."""
        return {cell.seed: self.cells[cell.fingerprint] for cell in cells if cell.fingerprint in self.cells}

    def searched(self, data: str, arm: str) -> dict[float, dict[int, dict[str, Any]]]:
        """Return the validation scores of an arm's search, by rate and seed; {} until it is complete."""
        wanted = self.study.search_cells(data, arm)
        if any(cell.fingerprint not in self.cells for cell in wanted):
            return {}
        found: dict[float, dict[int, dict[str, Any]]] = {}
        for cell in wanted:
            found.setdefault(cell.rate, {})[cell.seed] = self.cells[cell.fingerprint]["val"]
        return found

    def rate(self, data: str, arm: str) -> float | None:
        """Return the rate that the search of an arm chose; None until it is complete."""
        if len(self.study.rates) == 1:
            return self.study.rates[0]
        found = self.searched(data, arm)
        return best(found) if found else None

    def final(self, data: str, arm: str) -> dict[int, dict[str, Any]]:
        """Return the cells of an arm at its chosen rate, by seed."""
        rate = self.rate(data, arm)
        return {} if rate is None else self.of(self.study.final_cells(data, arm, rate))

    def outcome(self, data: str, outcome: str) -> dict[int, dict[str, Any]]:
        """Return the test scores of "ARM", or of "ARM/STEP", by seed."""
        arm, _, step = outcome.partition("/")
        cells = self.final(data, arm)
        return {seed: cell["after"][step]["test"] if step else cell["test"] for seed, cell in cells.items()}

    def candidate(self, data: str, outcomes: tuple[str, ...]) -> str | None:
        """Return the outcome whose arm was best on validation in the search; None until all are searched."""
        if len(outcomes) == 1:
            return outcomes[0]
        scores: dict[str, dict[int, dict[str, Any]]] = {}
        for outcome in outcomes:
            arm = outcome.partition("/")[0]
            rate = self.rate(data, arm)
            found = self.searched(data, arm)
            if rate is None or not found:
                return None
            scores[outcome] = found[rate]
        return best(scores)


def _result(path: Path) -> dict[str, Any]:
    """Return a cell's JSON. Raises FolderError if the file is none."""
    with suppress(ValueError):
        values = json.loads(read_text(path))
        if isinstance(values, dict) and {"fingerprint", "key"} <= set(values):
            return values
    raise FolderError(f"{path} is no result of a study: expected results alone in this folder; move it elsewhere")


def _check_inputs(cells: list[dict[str, Any]]) -> None:
    """Raise ConfigError if cells of one data set were computed on different files."""
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for cell in cells:
        for name, digest in cell["inputs"].items():
            first, other = known.setdefault((cell["data"], name), (digest, cell["name"]))
            if first != digest:
                raise ConfigError(
                    f"{cell['name']} had other files at {name} than {other}: expected the same; remove the older"
                )
