"""A study is read and refused; the key of a cell follows settings, data and code, and no path of a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness.plan import Cell, Study, code_version, digest_of_path, given_values
from helpers.studies import TINY, write_study

from vimoe.errors import ConfigError


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


def test_a_path_is_known_by_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat/1.jpg").write_bytes(b"1")
    first = digest_of_path(str(tmp_path / "a"))
    assert first == digest_of_path(str(tmp_path / "b"))  # wherever it lies
    (tmp_path / "b/cat/1.jpg").rename(tmp_path / "b/cat/2.jpg")
    assert first != digest_of_path(str(tmp_path / "b"))
    (tmp_path / "a/cat/1.jpg").write_bytes(b"2")
    assert first != digest_of_path(str(tmp_path / "a"))


def test_the_code_has_a_version() -> None:
    assert code_version() == code_version() and len(code_version()) == 12


def test_analysis_counts_where_something_is_analysed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "vimoe"
    for part in ("analysis", "training", "report"):
        (package / part).mkdir(parents=True)
        (package / part / "one.py").write_text("1")
    (package / "__init__.py").write_text("")
    found = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr("harness.plan.importlib.util.find_spec", lambda name: found)
    before = code_version(False), code_version(True)
    (package / "analysis/one.py").write_text("2")
    assert code_version(False) == before[0] and code_version(True) != before[1]
    between = code_version(True)
    (package / "training/one.py").write_text("2")
    assert code_version(False) != before[0] and code_version(True) not in (before[1], between)
    between = code_version(True)
    (package / "report/one.py").write_text("2")
    assert code_version(True) == between


def test_values_come_from_the_command_line_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITS", "theirs")
    assert given_values([])["DIGITS"] == "theirs" and given_values(["DIGITS=a=b"])["DIGITS"] == "a=b"
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        given_values(["DIGITS"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, "unknown part 'arm': did you mean"), ({"seeds": []}, "no seeds: expected it"),
        ({"search": {"rates": [1], "seeds": [0]}}, r"search.seeds \[0\] are in seeds"),
        ({"data": {"digits": {"more_seeds": {"seeds": [5]}}}}, "digits: more_seeds: expected seeds and arms"),
        ({"data": {"digits": {"more_seeds": {"seeds": [5], "arms": ["dens"]}}}}, "arm 'dens'"),
        ({"control": "dens"}, "arm 'dens'"), ({"arms": {"a.b": {}}}, "name 'a.b': expected letters"),
        ({"arms": {"dense": {"after": ["analyse"]}}}, "after: 'analyse'"),
        ({"contrasts": {"C": {"of": "dense/prune", "against": "dense", "margin": 1}}}, "expected 'prune' in `after`"),
        ({"contrasts": {"C": {"of": "dense", "versus": "dense"}}}, "expected of, against, margin"),
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


def test_an_arm_has_no_rate_of_its_own(tmp_path: Path) -> None:
    study = write_study(tmp_path, arms={"dense": {"train": {"lr": 1.0}}, "vimoe": TINY["arms"]["vimoe"]})
    with pytest.raises(ConfigError, match="dense: train.lr or train.seed"):
        study.search_cells("digits", "dense")


def test_a_missing_path_and_a_contradiction_are_told_before_a_training(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    with pytest.raises(ConfigError, match="expected --set DIGITS=PATH"):
        study.check({})
    arms = {"dense": {}, "vimoe": {**TINY["arms"]["vimoe"], "moe": {"layers": "last:1", "gate_weight": 0.5}}}
    with pytest.raises(ConfigError, match=r"digits, vimoe: gate_weight=0\.5"):
        write_study(tmp_path, arms=arms).check({"DIGITS": "digits"})


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
    with pytest.raises(ConfigError, match="--data photo: expected one of digits, photos; did you mean .photos."):
        Study(tmp_path, ("photo",))


def test_a_data_set_may_have_its_own_margin(tmp_path: Path) -> None:
    study = write_study(tmp_path, data={**TINY["data"], "photos": {"data": {"path": "${PHOTOS}"}, "margin": 2}})
    contrast = study.contrasts["C"]
    assert (study.margin("digits", contrast), study.margin("photos", contrast)) == (0.5, 2)
    assert "margin" not in study.final_cells("photos", "dense", 1e-3)[0].settings
