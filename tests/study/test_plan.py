"""A study is read and refused; the key of a cell follows settings, data and code, and no path of a machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import TINY, write_study

from vimoe.errors import ConfigError
from vimoe.study.plan import Cell, Study, given_values, settings_of


def final(study: Study, arm: str = "vimoe") -> Cell:
    return study.final_cells("digits", arm, 1e-3)[0]


def test_cells_of_an_arm(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    assert [cell.name for cell in study.search_cells("digits", "dense")] == [
        f"digits.dense.lr{rate}.search{seed}" for seed in (10, 11) for rate in ("0.001", "0.003")
    ]
    cell = final(study)
    assert cell.name == "digits.vimoe.lr0.001.seed0" and cell.after == ("analyze", "merge_all")
    assert not study.search_cells("digits", "vimoe")[0].after  # the search sees no test
    assert cell.settings["train"] == {**TINY["base"]["train"], "lr": 1e-3, "seed": 0, "tensorboard": False}
    assert cell.settings["data"]["path"] == "${DIGITS}" and cell.variables == ["DIGITS"]
    assert cell.filled({"DIGITS": "digits"})["data"]["path"] == "digits"
    assert cell.settings["data"]["path"] == "${DIGITS}"
    assert len({each.fingerprint for each in study.all_cells()}) == len(study.all_cells()) == 16


def test_one_rate_needs_no_search(tmp_path: Path) -> None:
    study = write_study(tmp_path, search={"rates": [1e-3], "seeds": [10]})
    assert study.search_cells("digits", "dense") == []
    assert write_study(tmp_path, search={"rates": [1e-3]}).search_cells("digits", "dense") == []


def test_candidates_are_searched_at_one_rate_too(tmp_path: Path) -> None:
    of = {"C": {"of": ["dense", "vimoe/merge_all"], "against": "smear", "margin": 0.5}}
    arms = {**TINY["arms"], "smear": {"moe": {"layers": "last:1", "router": "smear"}}}
    study = write_study(tmp_path, search={"rates": [1e-3], "seeds": [10]}, contrasts=of, arms=arms)
    names = [cell.name for arm in study.arms for cell in study.search_cells("digits", arm)]
    assert names == ["digits.dense.lr0.001.search10", "digits.vimoe.lr0.001.search10"]


@pytest.mark.parametrize("change", ["settings", "after", "data", "code"])
def test_what_changes_gets_another_key(tmp_path: Path, change: str) -> None:
    cell, inputs, code = final(write_study(tmp_path)), {"DIGITS": "d", "OTHER": "o"}, "c"
    key = cell.key(inputs, code)
    assert key == cell.key({**inputs, "OTHER": "p"}, code)  # which the cell does not read
    arms: dict[str, Any] = {"dense": TINY["arms"]["dense"], "vimoe": dict(TINY["arms"]["vimoe"])}
    if change == "settings":
        arms["vimoe"]["moe"] = {"layers": "last:1", "num_experts": 3}
    if change == "after":
        arms["vimoe"]["after"] = ["analyze", "prune", "merge_all"]
    other = final(write_study(tmp_path, arms=arms))
    inputs = {"DIGITS": "e"} if change == "data" else inputs
    assert key != other.key(inputs, "k" if change == "code" else code)


def test_values_come_from_the_command_line_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITS", "theirs")
    paths = {"DIGITS": "last", "OTHER": "mine"}
    assert given_values([], {})["DIGITS"] == "theirs" and given_values([], paths) == {**os.environ, **paths}
    assert given_values(["DIGITS=a=b"], paths)["DIGITS"] == "a=b"
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        given_values(["DIGITS"], {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, "unknown part 'arm': did you mean"), ({"seeds": []}, "seeds is empty: expected a list"),
        ({"search": {"rates": [1], "seeds": [0]}}, r"search.seeds \[0\] are in seeds"),
        ({"data": {"digits": {"more_seeds": {"seeds": [5]}}}}, "digits.more_seeds: expected seeds and arms"),
        ({"data": {"digits": {"more_seeds": {"seeds": [5], "arms": ["dens"]}}}}, "arm 'dens'"),
        ({"control": "dens"}, "arm 'dens'"), ({"arms": {"a.b": {}}}, "name 'a.b': expected letters"),
        ({"arms": {"dense": {"after": ["analyse"]}}}, "after: 'analyse'"),
        ({"contrasts": {"C": {"of": "dense/prune", "against": "dense", "margin": 1}}}, "expected 'prune' in `after`"),
        ({"contrasts": {"C": {"of": "dense", "against": "dense"}}}, "C: no margin: expected of, against, margin"),
        ({"contrasts": {"C": {"of": "dense", "versus": "dense"}}}, "contrasts.C: unknown part 'versus'"),
        ({"contrasts": {"C": None}}, "contrasts.C is empty: expected values by name"),
        ({"contrasts": ["C"]}, "contrasts is .'C'.: expected values by name"),
        ({"contrasts": {"C": {"of": [], "against": "dense", "margin": 1}}}, "contrasts.C: of=.*: expected an arm"),
        ({"contrasts": {"C": {"of": [["dense"]], "against": "dense", "margin": 1}}}, "contrasts.C: arm .'dense'."),
        ({"contrasts": {"C": {"of": "dense", "against": "vimoe", "margin": "x"}}}, "contrasts.C.margin='x'"),
        ({"contrasts": {"C": {"of": "dense", "against": "vimoe", "margin": 1, "routes": 0.01}}},
         "contrasts.C: routes=0.01 of 'dense': expected an arm with analyze in `after`"),
        ({"contrasts": {"C": {"of": "vimoe/merge_all", "against": "dense", "margin": 1, "routes": 0}}},
         "routes=0 of 'vimoe/merge_all': expected an arm"),
        ({"arms": {"dense": None}}, "arms.dense is empty: expected values by name; fill it in, or write {}"),
        ({"arms": {"dense": {"moe": None}}}, "arms.dense.moe is empty: expected values by name"),
        ({"arms": {"dense": {"moo": {}}}}, "arms.dense: unknown part 'moo': did you mean 'moe'"),
        ({"arms": {"dense": {"after": None}}}, "arms.dense.after is empty: expected a list"),
        ({"arms": {"dense": {"after": "analyze"}}}, "arms.dense.after is 'analyze': expected a list"),
        ({"arms": {1: {}}}, "arms: name 1: expected letters"), ({"arms": ["dense"]}, "arms is .'dense'.: expected"),
        ({"arms": {"dense": {"train": {"lr": 1.0}}}}, "arms.dense: train.lr or train.seed: expected none"),
        ({"base": {"train": {"seed": 1}}}, "base: train.lr or train.seed"),
        ({"base": {"train": None}}, "base.train is empty"),
        ({"data": {"digits": None}}, "data.digits is empty"),
        ({"data": {"digits": {"data": "x"}}}, "digits.data is 'x'"),
        ({"data": {"digits": {"margin": "x"}}}, "data.digits.margin='x': expected at least 0"),
        ({"data": {"digits": {"more_seeds": None}}}, "digits.more_seeds is empty: expected values by name"),
        ({"data": {"digits": {"more_seeds": {"seeds": None, "arms": ["dense"]}}}}, "more_seeds.seeds is empty"),
        ({"data": {"digits": {"more_seeds": {"seeds": [5], "arms": []}}}}, "more_seeds.arms is empty: expected a list"),
        ({"data": {"digits": {"more_seeds": {"seeds": [5], "arms": ["vimoe/merge_all"]}}}}, "arm 'vimoe/merge_all'"),
        ({"data": {"digits": {"more_seeds": {"seeds": [1], "arms": ["dense"]}}}}, r"seeds \[1\] are in seeds"),
        ({"search": {"rates": [1e-3, 3e-3]}}, "search.seeds is empty: expected a list in brackets, such as"),
        ({"search": {"rates": [1e-3, 3e-3], "seeds": []}}, "search.seeds is empty: expected"),
        ({"search": {"rates": [1e-3]}, "contrasts": {"C": {"of": ["dense", "vimoe"], "against": "dense", "margin": 1}}},
         "search.seeds is empty: expected"),
        ({"search": {"seeds": [10]}}, "search.rates is empty"),
        ({"search": [1e-3]}, "search is .*: expected values by name"),
        ({"search": {"rates": 1e-3, "seeds": [10]}}, "search.rates is 0.001: expected a list"),
        ({"search": {"rates": ["high"], "seeds": [10]}}, "search.rates='high': expected at least 0"),
        ({"search": {"rates": [1e-3], "seed": [10]}}, "search: unknown part 'seed': did you mean 'seeds'"),
        ({"seeds": 3}, "seeds is 3: expected a list"), ({"seeds": [0, 0]}, "each value once"),
        ({"seeds": [0.5]}, "seeds=0.5: expected a whole number"), ({"control": ["dense"]}, "control: arm .'dense'."),
        ({"code": "a8c346183dc1"}, "code is 'a8c346183dc1': expected a list"),
        ({"code": [123]}, "code: 123: expected digests"),
        ({"contrasts": {"C": {"of": "dense", "against": "dense", "margin": 1}}}, "contrasts.C: dense against itself"),
        ({"search": {"rates": [0], "seeds": [10]}}, "search.rates=0: expected learning rates above 0"),
        ({"search": {"rates": [1e-3, 1.000001e-3], "seeds": [10]}}, "search.rates is .*: expected rates of different"),
        ({"paths": {"DIGITS": 123}}, "paths: 123: expected paths by name"), ({"paths": ["a"]}, "paths is .*by name"),
        ({"explored": {"E": {"of": "dens", "against": "dense", "margin": 1}}}, "explored.E: arm 'dens'"),
        ({"explored": {"E": {"of": ["vimoe"], "against": "dense", "margin": 1}}}, "explored.E: .*: expected one arm"),
    ],
)  # fmt: skip
def test_a_mistaken_study_is_refused_in_one_line(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        write_study(tmp_path, **change)
    assert "\n" not in str(raised.value)


def test_some_arms_have_more_seeds_on_a_data_set(tmp_path: Path) -> None:
    study = write_study(tmp_path, data={**TINY["data"], "other": {"more_seeds": {"seeds": [7, 8], "arms": ["vimoe"]}}})
    both = [*study.seeds, 7, 8]
    assert [cell.seed for cell in study.final_cells("other", "vimoe", 1.0)] == both
    assert study.seeds_of("other", "dense") == study.seeds_of("digits", "vimoe") == study.seeds
    assert "more_seeds" not in study.final_cells("other", "vimoe", 1.0)[0].settings


def test_cells_of_versions_that_the_study_names_count(tmp_path: Path) -> None:
    study = write_study(tmp_path, code=["older"])
    inputs, codes = {"DIGITS": "d"}, {True: "whole", False: "part"}
    search, final = study.search_cells("digits", "vimoe")[0], study.final_cells("digits", "vimoe", 1e-3)[0]
    assert final.after and not search.after
    for cell, own in ((search, "part"), (final, "whole")):
        assert study.keys(inputs, codes)[cell.fingerprint] == [cell.key(inputs, own), cell.key(inputs, "older")]


def test_a_missing_path_and_a_contradiction_are_told_before_a_training(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    with pytest.raises(ConfigError, match="expected --set DIGITS=PATH"):
        study.check({})
    arms = {"dense": {}, "vimoe": {**TINY["arms"]["vimoe"], "moe": {"layers": "last:1", "gate_weight": 0.5}}}
    with pytest.raises(ConfigError, match=r"digits, vimoe: gate_weight=0\.5"):
        write_study(tmp_path, arms=arms).check({"DIGITS": "digits"})
    base = {**TINY["base"], "train": {"batch_size": 32}}
    with pytest.raises(ConfigError, match="digits, dense: no train.epochs: expected a number.*set it in base"):
        write_study(tmp_path, base=base).check({"DIGITS": "digits"})
    with pytest.raises(ConfigError, match="digits, dense: data.path='nowhere': no such folder"):
        write_study(tmp_path).check({"DIGITS": "nowhere"})
    arms = {**TINY["arms"], "dense": {"moe": {"layers": "none"}, "after": ["analyze", "prune"]}}
    with pytest.raises(ConfigError, match="digits, dense: after: analyze, prune of an arm without MoE layers"):
        write_study(tmp_path, arms=arms).check({"DIGITS": "digits"})


def test_two_arms_of_the_same_settings_are_refused(tmp_path: Path) -> None:
    arms = {**TINY["arms"], "again": {"moe": dict(TINY["arms"]["vimoe"]["moe"])}}  # without its steps
    with pytest.raises(ConfigError, match="digits, again: the settings are those of digits, vimoe: expected others"):
        write_study(tmp_path, arms=arms).check({"DIGITS": "digits"})


def test_a_path_that_looks_like_a_number_is_a_text_and_is_found_in_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "12e4").mkdir()
    monkeypatch.chdir(tmp_path)
    base = {**TINY["base"], "model": {**TINY["base"]["model"], "args": {"files": ["${DIGITS}", "1e-3"]}}}
    study = write_study(tmp_path, base=base)
    study.check({"DIGITS": "12e4"})
    filled = final(study).filled({"DIGITS": "12e4"})
    assert settings_of(filled).data.path == "12e4"
    assert settings_of(filled).model.args == filled["model"]["args"] == {"files": ["12e4", "1e-3"]}


def test_the_registered_study_is_one(tmp_path: Path) -> None:
    study = Study(Path(__file__).parents[2] / "studies/vimoe")
    study.check(dict.fromkeys(("DINOV2", "CUB100", "DOMAINS"), str(tmp_path)))
    assert len(study.seeds) >= 7 and len(study.rates) >= 3
    page = (study.folder / "README.md").read_text("utf-8")
    assert all(f"`{arm}`" in page for arm in study.arms) and all(f"\n| {name} |" in page for name in study.contrasts)
    cells = len(study.search_cells("cub100", "dense")) + len(study.seeds)
    assert f"An arm has {cells} cells" in page and f"{len(study.arms)} arms have {cells * len(study.arms)}" in page


def test_some_data_sets_alone_need_their_own_paths_alone(tmp_path: Path) -> None:
    data = {**TINY["data"], "photos": {"data": {"path": "${PHOTOS}"}, "margin": 2}}
    write_study(tmp_path, data=data)
    study = Study(tmp_path, ("photos",))
    assert {cell.data for cell in study.all_cells()} == {"photos"}
    assert {name for cell in study.all_cells() for name in cell.variables} == {"PHOTOS"}
    with pytest.raises(ConfigError, match="--datasets photo: expected one of digits, photos; did you mean .photos."):
        Study(tmp_path, ("photo",))


def test_a_data_set_may_have_its_own_margin(tmp_path: Path) -> None:
    study = write_study(tmp_path, data={**TINY["data"], "photos": {"data": {"path": "${PHOTOS}"}, "margin": 2}})
    contrast = study.contrasts["C"]
    assert (study.margin("digits", contrast), study.margin("photos", contrast)) == (0.5, 2)
    assert "margin" not in study.final_cells("photos", "dense", 1e-3)[0].settings
