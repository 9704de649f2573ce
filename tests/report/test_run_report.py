"""The page of a run has what its files have, and says if a number may be nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.found import change, effect
from helpers.pages import Reader
from helpers.run_folders import analysed, pruned, trained

from vimoe.errors import FolderError
from vimoe.report.run_comparison import write_comparison
from vimoe.report.run_report import write_run_report


def test_the_page_of_a_training_says_of_one_alarm_that_it_is_one(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "alarms": summary["alarms"][:1]}))
    assert "Training raised an alarm:" in Reader(write_run_report(run)).text


def test_the_page_of_a_training(tmp_path: Path) -> None:
    read = Reader(write_run_report(trained(tmp_path / "run", layers="last:2", num_experts=6)))
    assert "the last 2 blocks: 6 experts, 1 shared, 1 chosen for each image. It was trained on 77 images" in read.text
    assert "50.00 ± 9.62" in read.text and "100 validation images" in read.text
    assert "moe.num_experts 6" in read.text and "torch 9.9" in read.text
    assert "raised 9 alarms" in read.text and "epoch 8: blocks.0.mlp: the router is <odd>" in read.text
    assert "epoch 2: blocks.0.mlp" not in read.text
    first = read.text.split("Training Share")[0]  # the first section has the curves, and the second has the loads
    assert (
        "50.00" in first
        and "epoch 2 had the best score" in first.replace("Epoch", "epoch")
        and "Loss and score" in first
    )


def test_the_page_of_an_analysis_says_what_is_uncertain(tmp_path: Path) -> None:
    run = analysed(tmp_path / "run", layers=3)
    (run / "figures").mkdir()
    (run / "figures" / "examples-blocks.2.mlp.png").write_bytes(b"a picture")
    read = Reader(write_run_report(run))
    assert "blocks.0.mlp 0.000 [-0.050, 0.050] not distinguishable from chance 0.400" in read.text
    assert "blocks.2.mlp 0.900 [0.850, 0.950] 0.002" in read.text
    assert "blocks.0.mlp +0.0000 [-0.0100, +0.0100] interval contains 0" in read.text
    assert "blocks.2.mlp +0.3000 [+0.2900, +0.3100] +0.2000" in read.text  # permuted, frozen
    assert "blocks.2.mlp -3.00 [-3.10, -2.90]" in read.text  # top-1 in points
    assert "For 11 of 24 experts the change is not distinguishable from 0" in read.text
    assert (
        "about 1 of these intervals would exclude 0" in read.text and "123 of 512 possible routes are used" in read.text
    )
    assert "on 400 validation images, with 95% bootstrap intervals" in read.text
    assert "more than by chance (AMI) in: blocks.1.mlp (0.450), blocks.2.mlp (0.900)." in read.text
    assert "interval above 0) in: blocks.1.mlp (+0.1500), blocks.2.mlp (+0.3000)." in read.text
    assert "The rank correlation of AMI and loss change over 3 layers is +1.00" in read.text
    result = read.text.split("Training Loss")[0]  # the first section has what was found, and the heatmaps
    assert "more than by chance (AMI) in: blocks.1.mlp" in result and "P(expert | class) by layer" in result
    assert read.text.count("P(expert | class) by layer") == read.text.count("The rank correlation") == 1
    assert "weight similarity blocks.0.mlp 1.000" in read.text and "deviation similarity" not in read.text
    assert (
        "blocks.2.mlp: validation images by expert" in read.text and "data:image/png;base64,YSBwaWN0dXJl" in read.loaded
    )


def test_the_page_has_experts_by_depth_with_their_ranges_by_chance(tmp_path: Path) -> None:
    run = analysed(tmp_path / "run", layers=2)
    text = Reader(write_run_report(run)).text
    assert "Experts beside the shared expert: blocks.0.mlp (cosine 0.9375, outputs 50.0% apart), blocks.1.mlp" in text
    assert "matrix cosine of mean units" in text
    assert "blocks.1.mlp, fc1 0.375 [0.125, 0.438] 0.500 0.750 0.875 0.375 [0.125, 0.438]" in text
    assert "blocks.0.mlp 0.250 [0.125, 0.438] 0.062 0.188 0.250 [0.125, 0.438]" in text
    assert (run / "figures" / "experts-by-depth.png").exists()


def test_a_file_of_an_older_version_has_no_experts_by_depth(tmp_path: Path) -> None:
    run = analysed(tmp_path / "run", layers=2)
    shutil.copy(Path(__file__).parents[1] / "old" / "digits" / "routing.json", run / "routing.json")
    text = Reader(write_run_report(run)).text
    assert "Similarity of experts" in text and "by depth" not in text
    assert not (run / "figures" / "experts-by-depth.png").exists()


def test_experts_that_are_no_ffns_have_outputs_by_depth(tmp_path: Path) -> None:
    run = analysed(tmp_path / "run", layers=2)
    found = json.loads((run / "routing.json").read_text())
    for layer in found["layers"]:
        layer["comparison"]["weights"] = None
        layer["comparison"]["parent"].update(cosine=None)
    (run / "routing.json").write_text(json.dumps(found))
    text = Reader(write_run_report(run)).text
    assert "blocks.0.mlp (other shapes, outputs 50.0% apart)" in text and "blocks.0.mlp – – – 0.250 [0.125" in text
    assert "matrix cosine of mean units" not in text


def test_calibrated_changes_are_on_the_page_where_files_have_them(tmp_path: Path) -> None:
    run = analysed(tmp_path / "run", layers=2)
    assert "alibrated" not in Reader(write_run_report(run)).text
    found = json.loads((run / "routing.json").read_text())
    found["layers"][1]["dense"]["merge"] = effect(-0.061, 0.02, calibrated=0.0104)
    (run / "routing.json").write_text(json.dumps(found))
    read = Reader(write_run_report(run))
    assert "Calibrated loss, nats: layer" in read.text and "the unchanged model has T = 1.25" in read.text
    row = "blocks.1.mlp – – – +0.0104 [-0.0096, +0.0304] interval contains 0 T = 0.88 –"
    assert row in read.text and "blocks.0.mlp – – – – –" in read.text


def diagnosed(folder: Path, **changes: object) -> Path:
    run = trained(folder)
    far = {"cosine": 0.5, "weights": 1.0, "outputs": 0.25}
    layer = {
        "name": "blocks.1.mlp", "num_experts": 8, "from_shared": far, "from_mean": {**far, "outputs": 0.125},
        "gates": {"mean": 0.5, "low": 0.25, "median": 0.5, "high": 0.75}, "router_confidence": 0.875,
        "effective_experts": change(7.5, 0.25), "permuted": effect(0.002),
        "oracle": {
            "by_prediction": effect(-0.5), "for_all": effect(0.001), "by_class": effect(-0.6),
            "by_image": effect(-0.75), "images": 90,
        },
    }  # fmt: skip
    finding = {
        "name": "better routes", "layers": {"blocks.1.mlp": "<-0.5>"}, "says": "there are some",
        "remedies": ["moe.router=centroids", "more"], "because": "as <known>",
    }  # fmt: skip
    found = {
        "layers": [{**layer, **changes}], "findings": [finding], "images": 99, "confidence": 0.95, "sequences": None,
        "without_oracle": "" if changes.get("oracle", True) else "there are masks",
    }  # fmt: skip
    (run / "diagnosis.json").write_text(json.dumps(found))
    return run


def test_the_page_of_a_diagnosis(tmp_path: Path) -> None:
    text = Reader(write_run_report(diagnosed(tmp_path / "run"))).text
    assert "better routes: there are some blocks.1.mlp: <-0.5> moe.router=centroids, or more as <known>" in text
    assert "blocks.1.mlp 25.00% 12.50% 0.50000 0.50 (0.25 to 0.75) 0.875 7.50 [7.25, 7.75] of 8" in text
    assert "of 8 +0.0020 [-0.0080, +0.0120] interval contains 0 -0.5000 [-0.5100, -0.4900] +0.0010" in text
    assert (
        "-0.7500 [-0.7600, -0.7400] Copy CSV From 99 validation images, with 95% bootstrap intervals over images."
        in text
    )
    bare = {"from_shared": None, "from_mean": {"cosine": None, "weights": None, "outputs": 0.125}, "oracle": None}
    text = Reader(write_run_report(diagnosed(tmp_path / "bare", **bare))).text
    assert "blocks.1.mlp – 12.50% – 0.50" in text and "– – – Copy CSV From 99" in text
    assert "No oracle: there are masks." in text


def test_what_was_not_measured_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    read = Reader(write_run_report(analysed(tmp_path / "run", layers=2, overruled=False)))
    assert "whether the routing matters was not measured" in read.text
    assert "The effect of single experts was not measured" in read.text
    assert "were not compared with one another" in read.text
    assert "interval contains 0" not in read.text and not (tmp_path / "run" / "figures" / "effects.png").exists()


def test_the_page_of_a_pruning_has_its_removals_in_order(tmp_path: Path) -> None:
    read = Reader(write_run_report(pruned(tmp_path / "run")))
    assert "1. blocks.0.mlp shared expert alone +0.0015 [-0.0085, +0.0115] interval contains 0 – –" in read.text
    assert "2. blocks.1.mlp, expert 5 other experts +0.0040 [+0.0030, +0.0050] +0.0055" in read.text
    assert "blocks.1.mlp 7 experts averaged +0.2500" in read.text
    assert "before pruning 61.00" in read.text and "pruned, then trained further 62.50" in read.text
    assert "400 test images" in read.text and "after 3 further epochs" in read.text
    assert (tmp_path / "run" / "figures" / "before-heatmaps.png").exists()
    without = Reader(write_run_report(pruned(tmp_path / "other", recovered=False)))
    assert "trained further" not in without.text and "further epochs" not in without.text


def test_the_page_of_a_pruning_has_calibrated_totals_where_they_are_known(tmp_path: Path) -> None:
    path = pruned(tmp_path / "run") / "summary.json"
    assert "alibrated" not in Reader(write_run_report(tmp_path / "run")).text
    summary = json.loads(path.read_text())
    for step in summary["steps"]:
        step["total"] = effect(0.006, 0.001, calibrated=0.0025)
    path.write_text(json.dumps(summary))
    text = Reader(write_run_report(tmp_path / "run")).text
    assert "total calibrated, nats" in text and "-0.06 [-0.07, -0.05] +0.0025 [+0.0015, +0.0035]" in text


@pytest.mark.parametrize(("kept", "left"), [(False, []), (False, ["a.mlp"]), (True, ["blocks.1.mlp", "a.mlp"])])
def test_the_page_of_a_pruning_says_which_moe_layers_are_left(tmp_path: Path, kept: bool, left: list[str]) -> None:
    path = pruned(tmp_path / "run") / "summary.json"
    summary = json.loads(path.read_text())
    summary["after"]["moe_layers"] = left
    path.write_text(json.dumps(summary if kept else {**summary, "kept": []}))
    read = Reader(write_run_report(tmp_path / "run"))
    assert ("the pruned model is dense" in read.text) == (not left)
    assert ("kept: " + ", ".join(left) in read.text) and "Removed: blocks.0.mlp; blocks.1.mlp, expert 5." in read.text
    assert ("so they stay: a.mlp." in read.text) == bool(left)
    assert ("Layers that were kept" in read.text) == kept


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "moe: [1"), ("config.yaml", "7"), ("summary.json", "{"), ("summary.json", '{"val": {}}'),
        ("metrics.csv", "epoch\nx\n"), ("load.csv", "epoch,layer,expert,share\n1,a,0,x\n"),
        ("routing.json", '{"layers": [{}]}'), ("routing.json", "\xff"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    run = analysed(tmp_path / "run", layers=1)
    (run / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(FolderError, match=re.escape(str(run / name))):
        write_run_report(run)
    assert not (run / "report.html").exists()
    if name != "load.csv":  # not on that page
        with pytest.raises(FolderError, match=re.escape(str(run / name))):
            write_comparison([run], tmp_path / "side.html")


def test_an_order_that_is_no_order_is_damage(tmp_path: Path) -> None:
    run = analysed(tmp_path / "run", layers=1)
    found = json.loads((run / "routing.json").read_text())
    found["class_order"][0] = 99
    (run / "routing.json").write_text(json.dumps(found))
    for write in (write_run_report, lambda run: write_comparison([run], tmp_path / "side.html")):
        with pytest.raises(FolderError, match="routing.json"):
            write(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no config.yaml"):
        write_run_report(tmp_path)


def test_figures_and_pages_import_no_torch() -> None:
    code = "import sys, vimoe.report.run_report, vimoe.report.run_comparison; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'matplotlib.figure'" in modules and "'torch'" not in modules and "'matplotlib.pyplot'" not in modules
