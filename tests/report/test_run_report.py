"""The page carries all that it shows, says what the files say, and says where a number may be nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.found import effect, evidence
from helpers.pages import Reader

from vimoe.analysis import figures
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.errors import FolderError
from vimoe.report import plotly_figures
from vimoe.report.html_page import Page
from vimoe.report.run_comparison import write_comparison
from vimoe.report.run_files import describe
from vimoe.report.run_report import write_run_report
from vimoe.report.table_cells import receipt_row
from vimoe.run_folder import write_settings

NASTY = "</script><script>alert(1)</script>"


def receipt(top1: float) -> dict[str, Any]:
    return {
        "top1": top1, "top5": 0.9, "loss": 1.5, "images": 400, "params": 2e6, "activated_params": 1e6, "macs": 1e9,
        "images_per_second": 100.0,
    }  # fmt: skip


def trained(folder: Path, top1: float = 0.5, **moe: Any) -> Path:
    folder.mkdir()
    write_settings(folder, Settings(moe=MoEConfig(**moe)))
    (folder / "metrics.csv").write_text(f"epoch,train_loss,val_loss,val_top1\n1,2,3,0.25\n2,1,2,{top1}\n")
    (folder / "load.csv").write_text("epoch,layer,expert,share\n1,blocks.0.mlp,0,0.4\n1,blocks.0.mlp,1,0.6\n")
    val = {"top1": top1, "top5": 0.9, "loss": 2.0, "images": 100}
    summary = {
        "epochs": 2,
        "best_epoch": 2,
        "val": val,
        "seconds": 9.0,
        "train_images": 77,
        "alarms": [f"epoch {i}: blocks.0.mlp: the router is <odd>" for i in range(9)],
        "versions": {"torch": "9.9"},
    }
    (folder / "summary.json").write_text(json.dumps({"schema": 1, "command": "train", **summary}))
    return folder


def pruned(folder: Path, recovered: bool = True) -> Path:
    folder.mkdir()
    write_settings(folder, Settings())
    nothing, cost = effect(0.0015, 0.01), effect(0.004, 0.001)
    summary = {
        "tolerance": 0.01,
        "steps": [
            {"layer": "blocks.0.mlp", "expert": None, "how": "shared", "change": nothing, "total": None},
            {"layer": "blocks.1.mlp", "expert": 5, "how": "dropped", "change": cost, "total": effect(0.0055, 0.001)},
        ],
        "kept": [{"layer": "blocks.1.mlp", "how": "merge", "change": effect(0.25), "experts": 7}],
        "split": "test", "before": receipt(0.61), "after": receipt(0.6),
        "recovery_epochs": 3 if recovered else 0, **({"recovered": receipt(0.625)} if recovered else {}),
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({"schema": 1, "command": "prune", **summary}))
    (folder / "routing-before-pruning.json").write_text(json.dumps(evidence(layers=2)))
    return folder


def analysed(folder: Path, **found: Any) -> Path:
    trained(folder)
    (folder / "routing.json").write_text(json.dumps(evidence(**found)))
    return folder


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    found = evidence(layers=2)
    found["classes"][0] = found["layers"][1]["name"] = NASTY
    page = Page("a <b> run", tmp_path / "figures")
    for add in (page.heading, page.subheading, page.text, lambda text: page.items([text])):
        add(NASTY)
    page.table([NASTY], [])
    page.table(("layer", "AMI"), [(NASTY, "0.5\n[0.4, 0.6]")], folded=NASTY)
    page.plotly_figure(plotly_figures.heatmaps(found), NASTY)
    page.plotly_figure(plotly_figures.effects(found), 'a "caption"', figures.effects(found), "effects")
    page.figure(figures.heatmaps(found), "heatmaps", 'P("e" | c)')
    page.image(tmp_path / "figures" / "heatmaps.png", '">' + NASTY)
    read = Reader(page.write(tmp_path / "report.html"))
    assert not any(script.strip().startswith("alert") for script in read.scripts)
    assert len(read.scripts) == 1 + 2  # plotly once, two figures
    assert read.loaded and all(link.startswith(("data:", "#section-")) for link in read.loaded)
    assert (
        read.text.count("alert(1)") == 10 and "<title>a &lt;b&gt; run</title>" in (tmp_path / "report.html").read_text()
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"effects.png", "heatmaps.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "figures"}


def test_labels_of_plotly_are_escaped_too() -> None:
    found = evidence(layers=1)
    found["classes"] = [NASTY] * 10
    found["layers"][0]["name"] = NASTY
    for plot in (plotly_figures.heatmaps(found), plotly_figures.effects(found), plotly_figures.expert_effects(found)):
        assert "<script" not in json.dumps(plot.to_plotly_json(), default=lambda array: array.tolist())


def test_a_page_without_interactive_figures_has_no_script(tmp_path: Path) -> None:
    page = write_run_report(trained(tmp_path / "run"))
    assert not Reader(page).scripts and page.stat().st_size < 10**6


def test_the_page_of_a_training(tmp_path: Path) -> None:
    read = Reader(write_run_report(trained(tmp_path / "run", layers="last:2", num_experts=6)))
    assert "blocks last:2: 6 experts, 1 shared, 1 chosen for each image. It was trained on 77 images" in read.text
    assert "50.00 ± 9.80" in read.text and "100 validation images" in read.text
    assert "moe.num_experts 6" in read.text and "torch 9.9" in read.text
    assert "raised 9 alarms" in read.text and "epoch 8: blocks.0.mlp: the router is <odd>" in read.text
    assert "epoch 2: blocks.0.mlp" not in read.text


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
    assert "weight similarity blocks.0.mlp 1.000" in read.text and "deviation similarity" not in read.text
    assert (
        "blocks.2.mlp: validation images by expert" in read.text and "data:image/png;base64,YSBwaWN0dXJl" in read.loaded
    )


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


def test_runs_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    runs = [
        trained(tmp_path / "dense", 0.4, layers="none"),
        analysed(tmp_path / "moe", layers=2),
        pruned(tmp_path / "less"),
        trained(tmp_path / "twin" / "moe", 0.7),
    ]
    found = json.loads((runs[1] / "routing.json").read_text())
    found["layers"][1]["dense"]["merge"] = effect(0.0123)
    (runs[1] / "routing.json").write_text(json.dumps(found))
    page = write_comparison(runs, tmp_path / "out.html")
    read = Reader(page)
    assert page == tmp_path / "out.html" and not (tmp_path / "figures").exists()
    assert "dense vit_small_patch14_dinov2, dense top-1 40.00 ± 9.60 (100 images, epoch 2)" in read.text
    assert f"{runs[3]} vit_small_patch14_dinov2 with a mixture" in read.text  # two are named moe
    assert (
        "; pruning removed blocks.0.mlp; blocks.1.mlp, expert 5" in read.text
    )  # its settings are those of the run that it comes from
    assert "less, before pruning 61.00" in read.text and "400 test" in read.text
    differing = read.text.split("Settings that differ")[-1].split("Loss and score")[0]
    assert "moe.layers none last:2 last:2 last:2" in differing and "moe.num_experts" not in differing
    assert f"{runs[1]} blocks.1.mlp 400 0.900 [0.850, 0.950] 0.002" in read.text
    assert "+0.3000 [+0.2900, +0.3100] +0.0123 [+0.0023, +0.0223]" in read.text  # the cheapest way
    assert len([link for link in read.loaded if link.startswith("data:image")]) == 2  # curves, one run's heatmaps


def test_what_settings_make_of_a_model_is_said_in_words() -> None:
    def words(**moe: Any) -> str:
        return describe({"model": {"name": "vit"}, "moe": MoEConfig(**moe).to_dict()})

    assert words(layers="none") == "vit, dense"
    assert words(layers="all", num_experts=0, num_shared_experts=2).startswith("vit with a dense FFN of 2 times")
    assert words(num_shared_experts=0, top_k=2, routing="token").endswith("none shared, 2 chosen for each token")


def test_receipts_of_seeds_have_mean_and_deviation() -> None:
    row = receipt_row("arm", [receipt(0.5), receipt(0.6)])
    assert row[:3] == ("arm", "55.00 ± 7.07", "1.5000")


def test_figures_and_pages_import_no_torch() -> None:
    code = "import sys, vimoe.report.run_report, vimoe.report.run_comparison; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'matplotlib.figure'" in modules and "'torch'" not in modules and "'matplotlib.pyplot'" not in modules
