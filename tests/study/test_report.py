"""Choices from validation, tables and figures, from cells that nobody computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.found import effect, evidence
from helpers.studies import TINY, put, score, write_study
from matplotlib.figure import Figure
from matplotlib.text import Text

from vimoe.errors import ConfigError, FolderError
from vimoe.study.contrasts import answer, routes_cost
from vimoe.study.figures import draw
from vimoe.study.plan import Study
from vimoe.study.report import write_report
from vimoe.study.results import Results, best
from vimoe.study.tables import at_an_end, contrast_row, notes

TOP1 = {"dense": (0.50, 0.52), "vimoe": (0.53, 0.56)}  # of the seeds 0 and 1


def fill(study: Study) -> Study:
    for arm in study.arms:
        for cell in study.search_cells("digits", arm):
            put(study, cell, {1e-3: 0.6, 3e-3: 0.7}[cell.rate])
        for cell in study.final_cells("digits", arm, 3e-3):
            put(study, cell, TOP1[arm][cell.seed]) if cell.seed < 2 else None
    return study


def row(text: str, *starts: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_best_has_the_best_mean_rank_then_the_lowest_loss() -> None:
    assert best({"a": {0: score(0.5, 1.2)}, "b": {0: score(0.5, 1.1)}}) == "b"
    often = {seed: score(top1) for seed, top1 in enumerate((0.1, 0.6, 0.7))}  # better on two seeds, worse in the mean
    assert best({1e-3: {seed: score(0.5) for seed in range(3)}, 3e-3: often}) == 3e-3


def test_a_rate_is_chosen_when_the_search_is_complete(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    *cells, last = study.search_cells("digits", "dense")
    for cell in cells:
        put(study, cell, {1e-3: 0.7, 3e-3: 0.6}[cell.rate])
    assert Results.read(study).rate("digits", "dense") is None
    put(study, last, 0.6)
    assert Results.read(study).rate("digits", "dense") == 1e-3


def test_tables_pair_by_seed_and_regenerate_without_a_difference(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path))
    write_report(study)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    # differences 3 and 4 points; two contrasts: t(1 - 0.025 / 2, 1) = 25.452, half = 25.452 * 0.7071 / sqrt(2) = 12.726
    contrast = row(text, "C", "vimoe", "dense", "2")
    assert contrast[4:6] == ["+3.50 [-9.23, +16.23]", "0.500"] and contrast[-2:] == ["0.5", "not decided"]
    assert row(text, "D", "vimoe/merge_all", "dense")[4] == contrast[4]
    assert row(text, "vimoe", "0.003", "2")[3:5] == ["54.50 ± 2.12", contrast[4]]
    assert row(text, "dense", "0.003", "2")[3:5] == ["51.00 ± 1.41", ""]
    assert row(text, "vimoe", "60.00 ± 0.00")[2:] == ["70.00 ± 0.00", "0.003"]
    assert "\nChosen at an end of the grid, beyond which a rate may be better: dense (0.003), vimoe (0.003).\n" in text
    assert row(text, "vimoe", "blocks.1.mlp", "2")[3] == "0.900 [0.900, 0.900]"
    assert row(text, "vimoe", "blocks.1.mlp", "routes permuted", "2")[4:] == [
        "+0.300 [+0.300, +0.300]", "-3.00 [-3.00, -3.00]",
    ]  # fmt: skip
    assert "| overruled | seeds | loss, nats | top-1, points |\n" in text  # files that have no calibrated loss
    figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(figures) == {"digits-cost.svg", "digits-routes.svg"}
    write_report(study)
    assert (tmp_path / "README.md").read_text("utf-8") == text
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == figures


def test_what_was_not_declared_stands_apart_and_widens_nothing(tmp_path: Path) -> None:
    explored = {"E": {"of": "vimoe", "against": "dense", "margin": 0.5}}
    study = fill(write_study(tmp_path, explored=explored))
    write_report(study)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert row(text, "C", "vimoe", "dense", "2")[4] == "+3.50 [-9.23, +16.23]"
    # one comparison: t(0.975, 1) = 12.706, half = 12.706 * 0.7071 / sqrt(2) = 6.353
    assert row(text, "E", "vimoe", "dense", "2")[4] == "+3.50 [-2.85, +9.85]"
    assert text.index("Not declared before the runs") > text.index("| C |")


def test_calibration_stands_in_the_table_where_evaluate_gives_it(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path))
    write_report(study)
    assert "calibration" not in (tmp_path / "README.md").read_text("utf-8")
    for arm in study.arms:
        for cell in study.final_cells("digits", arm, 3e-3):
            test = {**score(0.5), "ece": 0.1 + 0.1 * (arm == "vimoe"), "loss_at_temperature": 0.8}
            merged = {"test": test, "after": {"activated_params": 1, "macs": 1}}
            put(study, cell, 0.5, test=test, after={"merge_all": merged})
    write_report(study)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "| calibration error | difference | loss at the best temperature | difference |" in text
    assert "+0.1000 [+0.1000, +0.1000]" in row(text, "vimoe", "0.003", "2")


def test_the_calibrated_loss_stands_in_the_table_where_an_analysis_has_it(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path))
    found = evidence(layers=2)
    found["layers"][1]["dense"]["merge"] = effect(-0.06, calibrated=0.01)
    del found["layers"][1]["dense"]["shared"]  # as of experts without a shared one
    for cell in study.final_cells("digits", "vimoe", 3e-3):
        put(study, cell, 0.5, analysis=found)
    write_report(study)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "| overruled | seeds | loss, nats | top-1, points | calibrated loss, nats |" in text
    assert row(text, "vimoe", "blocks.1.mlp", "merged", "2")[4:] == [
        "-0.060 [-0.060, -0.060]", "+0.60 [+0.60, +0.60]", "+0.010 [+0.010, +0.010]",
    ]  # fmt: skip
    assert row(text, "vimoe", "blocks.1.mlp", "routes permuted", "2")[-1] == ""
    assert "| blocks.1.mlp | shared expert alone" not in text and "| blocks.0.mlp | shared expert alone" in text


def test_a_layer_that_nothing_makes_dense_is_not_pruned(tmp_path: Path) -> None:
    arms = {**TINY["arms"], "vimoe": {**TINY["arms"]["vimoe"], "after": ["analyze", "prune", "merge_all"]}}
    study = fill(write_study(tmp_path, arms=arms))
    for cell in study.final_cells("digits", "vimoe", 3e-3):
        dropped = [{"layer": "blocks.0.mlp", "expert": 1}, {"layer": "blocks.1.mlp", "expert": None}][cell.seed :]
        step = {"test": score(0.5), "steps": dropped, "kept": [], "after": {"activated_params": 1, "macs": 1}}
        put(study, cell, 0.5, after={"prune": step, "merge_all": step})
    write_report(study)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert row(text, "vimoe", "blocks.0.mlp", "2")[-1] == "0 of 2"  # without a method, or of which one expert went
    assert row(text, "vimoe", "blocks.1.mlp", "2")[-1] == "2 of 2"


def test_cells_at_a_rate_that_was_not_chosen_are_not_counted_as_such(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path))
    put(study, study.final_cells("digits", "dense", 1e-3)[0], 0.5)
    write_report(study)
    assert "8 cells of the search, 4 of 4 cells" in (tmp_path / "README.md").read_text("utf-8")


def test_a_rate_between_others_or_alone_is_at_no_end(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for folder, rates, chosen in ((tmp_path, [1e-3, 3e-3, 9e-3], 3e-3), (tmp_path / "one", [3e-3], 3e-3)):
        study = write_study(folder, search={"rates": rates, "seeds": [10]})
        for cell in study.search_cells("digits", "dense"):
            put(study, cell, 0.7 if cell.rate == chosen else 0.6)
        assert not at_an_end(Results.read(study), "digits")


def test_candidates_at_one_rate_are_chosen_on_validation(tmp_path: Path) -> None:
    contrasts = {"C": {"of": ["dense", "vimoe"], "against": "dense", "margin": 0.5}}
    study = write_study(tmp_path, search={"rates": [3e-3], "seeds": [10]}, contrasts=contrasts)
    for arm in study.arms:
        for cell in study.final_cells("digits", arm, 3e-3):
            put(study, cell, 0.5)
    assert Results.read(study).candidate("digits", ("dense", "vimoe")) is None
    for arm, top1 in (("dense", 0.6), ("vimoe", 0.7)):
        for cell in study.search_cells("digits", arm):
            put(study, cell, top1)
    assert answer(Results.read(study), "digits", "C", study.contrasts["C"]).of == "vimoe"


def test_no_text_of_a_figure_hides_another_or_leaves_the_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("vimoe.study.figures.svg", lambda figure: figures.append(figure) or b"")
    for size in (1, 20):  # of one cost, and nearly of one score
        arms = {f"arm-{n}": {**TINY["arms"]["vimoe"], "train": {"patience": n}} for n in range(size)}
        study = write_study(tmp_path, arms=arms, control="arm-0", contrasts={})
        for number, arm in enumerate(arms):
            for cell in study.search_cells("digits", arm):
                put(study, cell, 0.5)
            for cell in study.final_cells("digits", arm, 1e-3):
                put(study, cell, 0.5 + 1e-5 * number)
        assert len(list(draw(Results.read(study), "digits"))) == 2
        for figure in figures[-2:]:
            figure.draw_without_rendering()
            texts = {text for text in figure.findobj(Text) if text.get_visible() and text.get_text()}
            for axis in (of for axes in figure.axes for of in (axes.xaxis, axes.yaxis)):
                low, high = sorted(axis.get_view_interval())
                labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
                texts -= {label for at, label in labels if not low <= at <= high}  # which are not drawn
            boxes = [text.get_window_extent() for text in texts]
            assert len(texts) > len(arms)
            drawn = figure.get_tightbbox()  # in inches
            assert drawn.x0 >= 0 and drawn.y0 >= 0 and all(drawn.max <= figure.get_size_inches())
            assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_without_cells_the_page_says_so(tmp_path: Path) -> None:
    write_report(write_study(tmp_path))
    assert "### digits\n\nNo result yet.\n" in (tmp_path / "README.md").read_text("utf-8")


def test_the_candidate_of_a_contrast_is_chosen_in_the_search_alone(tmp_path: Path) -> None:
    contrasts = {"C": {"of": ["dense", "vimoe"], "against": "dense", "margin": 0.5}}
    study = fill(write_study(tmp_path, contrasts=contrasts))
    for cell in study.search_cells("digits", "dense"):
        put(study, cell, 0.9)  # the best on validation, and the worst on test
    assert Results.read(study).candidate("digits", ("vimoe", "dense")) == "dense"


def test_a_contrast_is_judged_by_the_margin_of_the_data_set(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path, data={"digits": {**TINY["data"]["digits"], "margin": 50}}))
    assert contrast_row(Results.read(study), answer(Results.read(study), "digits", "D", study.contrasts["D"]))[-2:] == [
        "50", "equivalent within the margin",
    ]  # fmt: skip


def test_two_results_of_one_cell_and_other_data_are_refused(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path))
    cell = study.final_cells("digits", "dense", 3e-3)[0]
    older = put(study, cell, 0.5, key="older")
    with pytest.raises(ConfigError, match="expected one of them; remove the older"):
        write_report(study)
    older.unlink()
    put(study, cell, 0.5, inputs={"DIGITS": "other"})
    with pytest.raises(ConfigError, match="other files at DIGITS"):
        write_report(study)


def test_results_of_former_settings_are_left_out(tmp_path: Path) -> None:
    fill(write_study(tmp_path))
    base = {"train": {"epochs": 2}}
    write_report(write_study(tmp_path, base=base))
    assert "| dense |" not in (tmp_path / "README.md").read_text("utf-8")


def test_the_cost_of_routes_is_that_of_the_layer_that_matters_most() -> None:
    cells = []
    for change in (0.0, 0.01):
        found = evidence(layers=2)
        found["layers"][0]["permuted"], found["layers"][1]["permuted"] = effect(0.02), effect(0.3 + change)
        cells.append({"analysis": found})
    cost = routes_cost(cells)
    assert cost and cost.value == pytest.approx(0.305) and cost.n == 2
    assert cost.low == pytest.approx(0.305 - 25.4517 * 0.0070711 / 2**0.5, abs=1e-4)  # t for two layers
    assert routes_cost([{"analysis": None}]) is None


@pytest.mark.parametrize("name", ["vimoe", "scenes", "depth"])
def test_the_figures_of_the_registered_studies_are_those_of_their_files(name: str, tmp_path: Path) -> None:
    there = Path(__file__).parents[2] / "studies" / name
    copy = shutil.copytree(there, tmp_path / name)
    write_report(Study(copy))
    for path in (there / "README.md", *there.glob("figures/*")):
        assert (copy / path.relative_to(there)).read_bytes() == path.read_bytes()


def test_results_have_the_names_that_their_data_and_arms_have_now(tmp_path: Path) -> None:
    fill(write_study(tmp_path))
    arms = {{"vimoe": "mixture"}.get(name, name): of for name, of in TINY["arms"].items()}
    contrasts = {"C": {"of": "mixture", "against": "dense", "margin": 0.5}}
    study = write_study(tmp_path, data={"numbers": TINY["data"]["digits"]}, arms=arms, contrasts=contrasts)
    write_report(study)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "### numbers\n\n8 cells of the search, 4 of 4 cells" in text and row(text, "C", "mixture", "dense", "2")


@pytest.mark.parametrize("text", ["{}", "[1]", "no json"])
def test_another_file_among_the_results_is_one_line(tmp_path: Path, text: str) -> None:
    study = fill(write_study(tmp_path))
    (study.results / "notes.json").write_text(text)
    with pytest.raises(FolderError, match="notes.json is no result of a study: expected results alone"):
        write_report(study)


def test_a_verdict_is_so_far_while_seeds_are_missing(tmp_path: Path) -> None:
    study = fill(write_study(tmp_path, seeds=[0, 1, 2]))
    write_report(study)
    assert row((tmp_path / "README.md").read_text("utf-8"), "C", "vimoe")[-1] == "not decided, so far"


def test_notes_name_what_the_study_has_and_nothing_else(tmp_path: Path) -> None:
    results = Results.read(fill(write_study(tmp_path)))
    for cell in results.cells.values():
        cell["after"], cell["analysis"] = {}, None
    plain = notes(results, "digits")
    assert not [word for word in ("got more seeds", "ARM/prune", "merge_all", "overruling") if word in plain]
    next(iter(results.cells.values())).update(after={"prune": {}}, analysis={})
    assert "ARM/prune" in notes(results, "digits") and "merge_all" not in notes(results, "digits")
    next(iter(results.cells.values())).update(analysis={"layers": {}})
    assert "overruling" in notes(results, "digits")
