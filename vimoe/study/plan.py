"""A study as its study.yaml says: settings, data sets, arms, learning rates, seeds and contrasts. Imports no torch.

A cell is one training: (data set, arm, learning rate, seed). Settings are those of `vimoe train`, by section. A text in
them may hold ${NAME}: a path of the machine, given by --set NAME=PATH, by `paths` in study.yaml, or by the environment.
The settings that are stored and hashed keep ${NAME}; the digest of what lies at the path stands beside them.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vimoe.config.command_line import read_settings
from vimoe.config.settings import Settings
from vimoe.config.yaml_reader import read_yaml, write_yaml
from vimoe.data.data_path import check_there
from vimoe.errors import ConfigError, DataError, VimoeError, choice
from vimoe.files import read_text
from vimoe.study.checks import AFTER, OF_ARM, OF_DATA, candidates, check_study
from vimoe.study.digests import digest

FILE = "study.yaml"
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of a study.

    Attributes:
        data, arm: names in study.yaml.
        rate: peak learning rate, `train.lr`.
        seed: `train.seed`.
        search: True if the cell serves the choice of the rate: it has a validation score alone.
        settings: settings by section, with ${NAME} in the place of paths.
        after: steps after the training, of AFTER.
    """

    data: str
    arm: str
    rate: float
    seed: int
    search: bool
    settings: dict[str, dict[str, Any]] = field(hash=False)
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name for a person, which says nothing of other settings."""
        return f"{self.data}.{self.arm}.lr{self.rate:g}.{'search' if self.search else 'seed'}{self.seed}"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that study.yaml says of this cell."""
        return digest([self.settings, list(self.after), self.search])

    @property
    def variables(self) -> list[str]:
        """Names of the paths that the settings need."""
        return sorted(set(VARIABLE.findall(json.dumps(self.settings))))

    def key(self, inputs: Mapping[str, str], code: str) -> str:
        """Return the hash of settings, data and code, by which a result is found again.

        Args:
            inputs: digest of each path (`digest_of_path`) by variable.
            code: digest of the package (`code_version`) for a cell with these steps after the training.
        """
        return digest([self.fingerprint, {name: inputs[name] for name in self.variables}, code])

    def filled(self, values: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return the settings with these values in the place of ${NAME}."""
        filled: dict[str, dict[str, Any]] = _fill(self.settings, values)
        return filled


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A declared comparison of two outcomes, each "ARM", or "ARM/STEP" for the model after a step of STAGES.

    Attributes:
        of: outcome that may be better. Several arms, as a list, are candidates: the one that is best on validation in
            the search is taken.
        against: outcome that it is compared with.
        margin: largest difference that counts as none, in points of the metric, where the data set names no other.
        routes: cost of permuting the routes, in nats, that a win has to exceed besides; None if it has not to.
        question: question in words.
    """

    of: str | tuple[str, ...]
    against: str
    margin: float
    routes: float | None = None
    question: str = ""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Outcomes of which `of` is one."""
        return candidates(self.of)


@dataclass(frozen=True)
class Study:
    """A study folder, of which study.yaml has been read.

    Args:
        folder: folder of the study.
        chosen: names of the data sets to look at; all if empty.

    Raises:
        ConfigError: if study.yaml is missing or mistaken, or has no data set of a chosen name.
    """

    folder: Path
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = list(self._given["data"])  # so the file is read and checked here
        for name in self.chosen:
            if name not in known:
                raise ConfigError(f"--datasets {name}: {choice(name, known)}")

    @cached_property
    def _given(self) -> dict[str, Any]:
        path = self.folder / FILE
        if not path.exists():
            raise ConfigError(f"{self.folder} has no {FILE}: expected a study; begin one with --new, or check the path")
        try:
            given: dict[str, Any] = read_yaml(read_text(path))
        except (yaml.YAMLError, VimoeError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}; expected YAML by name") from error
        try:
            check_study(given)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return given

    @property
    def control(self) -> str:
        """Arm that all others are compared with."""
        return str(self._given["control"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of every arm at its chosen rate."""
        return list(self._given["seeds"])

    def seeds_of(self, data: str, arm: str) -> list[int]:
        """Return the seeds of an arm on a data set: those of every arm, and more for some (`more_seeds`)."""
        more = self._given["data"][data].get("more_seeds", {})
        return self.seeds + (list(more["seeds"]) if arm in more.get("arms", ()) else [])

    @property
    def rates(self) -> list[float]:
        """Learning rates that every arm is searched over."""
        return [float(rate) for rate in self._given["search"]["rates"]]

    @property
    def search_seeds(self) -> list[int]:
        """Seeds of the search, which are no others'."""
        return list(self._given["search"].get("seeds") or ())

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """Settings of each data set, by section, its `margin`, and its `more_seeds`."""
        return {name: of for name, of in self._given["data"].items() if name in self.chosen or not self.chosen}

    def margin(self, data: str, contrast: Contrast) -> float:
        """Return the margin of a contrast on a data set: the data set's own, if it has one."""
        return float(self.data[data].get("margin", contrast.margin))

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Changes of each arm, by section, and its `about` and `after`."""
        return dict(self._given["arms"])

    @cached_property
    def contrasts(self) -> dict[str, Contrast]:
        """Declared contrasts, by name."""
        return self._contrasts("contrasts")

    @cached_property
    def explored(self) -> dict[str, Contrast]:
        """Comparisons that were not declared before the runs, by name. Nothing is chosen or widened by them."""
        return self._contrasts("explored")

    def _contrasts(self, part: str) -> dict[str, Contrast]:
        return {name: Contrast(**values) for name, values in (self._given.get(part) or {}).items()}

    @property
    def paths(self) -> dict[str, str]:
        """Values of variables, which the command line may replace."""
        return dict(self._given.get("paths") or {})

    @property
    def code(self) -> list[str]:
        """Versions of the package (`code_version`) whose cells count, beside the version that computes what is left."""
        return list(self._given.get("code") or ())

    def keys(
        self, inputs: Mapping[str, str], codes: Mapping[bool, str], cells: Sequence[Cell] | None = None
    ) -> dict[str, list[str]]:
        """Return the keys that a finished cell may have, by fingerprint, that of a cell to be computed first.

        Args:
            inputs: digest of each path (`digest_of_path`) by variable.
            codes: `code_version` of this package, with steps after the training and without.
            cells: cells to return the keys of; by default all.
        """
        return {
            cell.fingerprint: [cell.key(inputs, code) for code in (codes[bool(cell.after)], *self.code)]
            for cell in (self.all_cells() if cells is None else cells)
        }

    @property
    def results(self) -> Path:
        """Folder of the cells' JSON files."""
        return self.folder / "results"

    def search_cells(self, data: str, arm: str) -> list[Cell]:
        """Return the cells of an arm's search. With one rate only several candidates of a contrast are searched."""
        several = [each.candidates for each in self.contrasts.values() if len(each.candidates) > 1]
        if len(self.rates) == 1 and arm not in {of.partition("/")[0] for each in several for of in each}:
            return []
        return [self._cell(data, arm, rate, seed, True) for seed in self.search_seeds for rate in self.rates]

    def final_cells(self, data: str, arm: str, rate: float) -> list[Cell]:
        """Return the cells of an arm at the rate that was chosen."""
        return [self._cell(data, arm, rate, seed, False) for seed in self.seeds_of(data, arm)]

    def all_cells(self) -> list[Cell]:
        """Return every cell that the study can have, whatever rates are chosen."""
        found = [self.search_cells(data, arm) for data in self.data for arm in self.arms]
        found += [self.final_cells(d, a, rate) for d in self.data for a in self.arms for rate in self.rates]
        return [cell for cells in found for cell in cells]

    @cached_property
    def by_fingerprint(self) -> dict[str, Cell]:
        """Every cell that the study can have, by fingerprint."""
        return {cell.fingerprint: cell for cell in self.all_cells()}

    def check(self, values: Mapping[str, str]) -> None:
        """Raise ConfigError, before anything is trained, for an arm of contradicting settings, or of another's.

        Or for data that are not there.
        """
        known: dict[str, str] = {}
        for data in self.data:
            for arm in self.arms:
                cell = self.final_cells(data, arm, self.rates[0])[0]
                try:
                    settings = settings_of(cell.filled(values))
                    check_there(settings.data.path)
                    if cell.after and settings.moe.layers == "none":
                        raise ConfigError(
                            f"after: {', '.join(cell.after)} of an arm without MoE layers: expected none; leave it out"
                        )
                    if "epochs" not in cell.settings["train"]:
                        raise ConfigError(
                            "no train.epochs: expected a number, from which times are estimated; set it in base"
                        )
                    other = known.setdefault(digest(cell.settings), f"{data}, {arm}")
                    if other != f"{data}, {arm}":  # their files could not be told apart
                        raise ConfigError(f"the settings are those of {other}: expected others; remove one of both")
                except (ConfigError, DataError) as error:
                    raise ConfigError(f"{self.folder / FILE}: {data}, {arm}: {error}") from error

    def _cell(self, data: str, arm: str, rate: float, seed: int, search: bool) -> Cell:
        own = {"train": {"lr": rate, "seed": seed, "tensorboard": False}}
        of_arm = {name: part for name, part in self.arms[arm].items() if name not in OF_ARM}
        of_data = {name: part for name, part in self.data[data].items() if name not in OF_DATA}
        settings = merged(self._given["base"], of_data, of_arm, own)
        after = () if search else tuple(step for step in AFTER if step in self.arms[arm].get("after", ()))
        return Cell(data=data, arm=arm, rate=rate, seed=seed, search=search, settings=settings, after=after)


def settings_of(values: dict[str, dict[str, Any]]) -> Settings:
    """Return checked settings. Raises ConfigError if a section, a setting or a value is wrong."""
    return read_settings(write_yaml(values))


def merged(*parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings by section, of which later parts replace single ones."""
    result: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            result.setdefault(section, {}).update(copy.deepcopy(values))
    return result


def given_values(pairs: list[str], paths: Mapping[str, str]) -> dict[str, str]:
    """Return the values for ${NAME}: of NAME=VALUE pairs, else of `Study.paths`, else of the environment."""
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair}: expected NAME=VALUE")
    return {**os.environ, **paths, **dict(pair.split("=", 1) for pair in pairs)}


def _fill(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _fill(each, values) for name, each in value.items()}
    if isinstance(value, list):
        return [_fill(each, values) for each in value]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if not values.get(name):
            raise ConfigError(
                f"{value!r} needs {name}: expected --set {name}=PATH, or {name} in the environment or in paths; set it"
            )
    return VARIABLE.sub(lambda found: values[found[1]], value)
