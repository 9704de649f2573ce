"""Checks of the content of study.yaml: a mistake is one line before anything is computed. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vimoe.config.checks import LARGEST_SEED, check_count, check_range
from vimoe.config.settings import SECTIONS
from vimoe.errors import ConfigError, choice, nearest

PARTS = ("control", "seeds", "search", "base", "data", "arms", "contrasts", "explored", "code", "paths")
NEEDED = PARTS[:-4]
NAME = re.compile(r"[\w-]+")  # no dot: it separates the parts of a cell's name
AFTER = ("analyze", "prune", "merge_all")  # in this order; vimoe.study.one_cell computes them
STAGES = ("prune", "merge_all")  # steps that leave another model, whose score "ARM/STEP" is
OF_DATA = ("margin", "more_seeds")  # of a data set, beside its settings
OF_ARM = ("about", "after")  # of an arm, beside its settings
OF_CONTRAST = ("of", "against", "margin", "routes", "question")


def check_study(given: Any) -> None:
    """Raise ConfigError if the content of a study.yaml is mistaken."""
    _check_names("content", given, PARTS)
    for name in NEEDED:
        if given.get(name) is None or (name != "base" and given[name] == {}):
            raise ConfigError(f"no {name}: expected it; vimoe study FOLDER --new writes an example")
    _check_settings("base", given["base"])
    for part, beside in (("data", OF_DATA), ("arms", OF_ARM)):
        for name, values in _by_name(part, given[part]).items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(f"{part}: name {name!r}: expected letters, digits, - and _ alone; choose another")
            _check_settings(f"{part}.{name}", values, beside)
    _check_steps(given["arms"])
    _check_outcome("control", given["control"], given["arms"])
    for part in ("contrasts", "explored"):
        for name, contrast in _by_name(part, given.get(part) or {}).items():
            _check_contrast(f"{part}.{name}", contrast, given["arms"])
            if part == "explored" and isinstance(contrast["of"], list):
                raise ConfigError(f"explored.{name}: of={contrast['of']}: expected one arm; name one")
    _check_seeds(given, _check_rates(given))
    _check_texts("code", _list("code", given.get("code") or []), "digests of the package")
    _check_texts("paths", _by_name("paths", given.get("paths") or {}).values(), "paths by name")


def _check_texts(where: str, values: Iterable[Any], what: str) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {value!r}: expected {what}, as texts; put it in quotes")


def candidates(of: Any) -> tuple[Any, ...]:
    """Return the outcomes of which `of` of a contrast is one."""
    return tuple(of) if isinstance(of, (list, tuple)) else (of,)


def _check_steps(arms: dict[str, Any]) -> None:
    for name, arm in arms.items():
        for step in _list(f"arms.{name}.after", arm.get("after", [])):
            if step not in AFTER:
                raise ConfigError(f"arms.{name}: after: {step!r}: {nearest(step, AFTER)}")


def _check_rates(given: dict[str, Any]) -> bool:
    """Raise ConfigError for rates that are none; return whether something is chosen by a search."""
    _check_names("search", given["search"], ("rates", "seeds"))
    rates = _filled("search.rates", given["search"].get("rates"), "[3e-4, 1e-3]")
    for rate in rates:
        check_range("search.rates", rate, 0)
        if rate == 0:
            raise ConfigError("search.rates=0: expected learning rates above 0; leave it out")
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ConfigError(f"search.rates is {rates}: expected rates of different first six digits; remove one")
    return len(rates) > 1 or any(len(candidates(each["of"])) > 1 for each in (given.get("contrasts") or {}).values())


def _check_seeds(given: dict[str, Any], searched: bool) -> None:
    """Raise ConfigError for seeds that are none, are in two places, or are missing where something is searched."""
    seeds = set(_seeds("seeds", given["seeds"]))
    for name, of in given["data"].items():
        if "margin" in of:
            check_range(f"data.{name}.margin", of["margin"], 0)
        if "more_seeds" in of:
            seeds.update(_more_seeds(f"data.{name}.more_seeds", of["more_seeds"], given))
    of_search = given["search"].get("seeds")
    if (searched or of_search) and (both := seeds & set(_seeds("search.seeds", of_search))):
        raise ConfigError(f"search.seeds {sorted(both)} are in seeds: expected others; choose other ones")


def _more_seeds(where: str, more: Any, given: dict[str, Any]) -> list[int]:
    if set(_by_name(where, more)) != {"seeds", "arms"}:
        raise ConfigError(f"{where}: expected seeds and arms, and nothing else; give both")
    for arm in _filled(f"{where}.arms", more["arms"], "[dense]"):
        if arm not in list(given["arms"]):
            raise ConfigError(f"{where}: arm {arm!r}: {choice(arm, list(given['arms']))}")
    seeds = _seeds(f"{where}.seeds", more["seeds"])
    if both := set(seeds) & set(given["seeds"]):
        raise ConfigError(f"{where}: seeds {sorted(both)} are in seeds: expected more; choose other ones")
    return seeds


def _check_contrast(where: str, contrast: Any, arms: dict[str, Any]) -> None:
    _check_names(where, contrast, OF_CONTRAST)
    for name in OF_CONTRAST[:3]:
        if name not in contrast:
            raise ConfigError(f"{where}: no {name}: expected of, against, margin; add it")
    of = candidates(contrast["of"])
    if not of:
        raise ConfigError(f"{where}: of=[]: expected an arm, or several as a list; name one")
    for outcome in (*of, contrast["against"]):
        _check_outcome(where, outcome, arms)
    if of == (contrast["against"],):
        raise ConfigError(f"{where}: {contrast['against']} against itself: expected two outcomes; name another")
    check_range(f"{where}.margin", contrast["margin"], 0)
    if contrast.get("routes") is not None:
        check_range(f"{where}.routes", contrast["routes"], 0)
        for outcome in of:  # else no difference could ever count as better
            if "analyze" not in arms.get(outcome, {}).get("after", ()):
                raise ConfigError(
                    f"{where}: routes={contrast['routes']:g} of {outcome!r}: expected an arm with analyze in `after`, "
                    f"which measures its routes; add it, or leave routes out"
                )


def _check_outcome(where: str, outcome: Any, arms: dict[str, Any]) -> None:
    """Raise ConfigError unless an outcome is "ARM", or "ARM/STEP" with a step after the training of that arm."""
    arm, slash, step = outcome.partition("/") if isinstance(outcome, str) else (outcome, "", "")
    if arm not in list(arms):
        raise ConfigError(f"{where}: arm {arm!r}: {choice(arm, list(arms))}")
    if slash and (step not in STAGES or step not in arms[arm].get("after", ())):
        raise ConfigError(f"{where}: {outcome!r}: expected {step!r} in `after` of the arm; add it")


def _check_settings(where: str, values: Any, beside: tuple[str, ...] = ()) -> None:
    """Raise ConfigError unless these are settings by section, and the names that may stand beside sections."""
    _check_names(where, values, (*SECTIONS, *beside))
    for section, settings in values.items():
        if section not in beside:
            _by_name(f"{where}.{section}", settings)
    if values.get("train", {}).keys() & {"lr", "seed"}:
        raise ConfigError(
            f"{where}: train.lr or train.seed: expected none, since the study gives each cell its own; leave it out"
        )


def _check_names(where: str, values: Any, known: tuple[str, ...]) -> None:
    for name in _by_name(where, values):
        if name not in known:
            raise ConfigError(f"{where}: unknown part {name!r}: {nearest(name, known)}")


def _by_name(where: str, values: Any) -> dict[Any, Any]:
    if not isinstance(values, dict):
        given = "empty" if values is None else repr(values)
        raise ConfigError(f"{where} is {given}: expected values by name; fill it in, or write {{}} for none")
    return values


def _list(where: str, values: Any) -> list[Any]:
    """Return a list. Raises ConfigError if it is none, or holds something twice."""
    if not isinstance(values, list) or any(value in values[:at] for at, value in enumerate(values)):
        given = "empty" if values is None else repr(values)
        raise ConfigError(f"{where} is {given}: expected a list in brackets, each value once; write [] for none")
    return values


def _filled(where: str, values: Any, example: str) -> list[Any]:
    """Return a list that is not empty."""
    if not values:
        raise ConfigError(f"{where} is empty: expected a list in brackets, such as {example}; fill it in")
    return _list(where, values)


def _seeds(where: str, values: Any) -> list[int]:
    for seed in _filled(where, values, "[0, 1, 2]"):
        check_count(where, seed, 0, LARGEST_SEED)
    return list(values)
