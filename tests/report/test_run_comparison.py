"""The page of several runs names each of them and the settings in which they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.found import effect
from helpers.pages import Reader
from helpers.run_folders import analysed, pruned, trained

from vimoe.errors import FolderError
from vimoe.report.run_comparison import write_comparison


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
    with pytest.raises(FolderError, match="out.html already exists: expected a new file"):
        write_comparison(runs, page)
    assert page == tmp_path / "out.html" and not (tmp_path / "figures").exists()
    assert "dense vit_small_patch14_dinov2, dense top-1 40.00 ± 9.43 (100 images, epoch 2)" in read.text
    assert f"{runs[3]} vit_small_patch14_dinov2 with a mixture" in read.text  # two are named moe
    assert (
        "; pruning removed blocks.0.mlp; blocks.1.mlp, expert 5" in read.text
    )  # its settings are those of the run that it comes from
    assert "less, before pruning 61.00" in read.text and "400 test" in read.text
    differing = read.text.split("Settings that differ")[-1].split("Routing")[0]
    assert "moe.layers none last:2 last:2 last:2" in differing and "moe.num_experts" not in differing
    assert f"{runs[1]} blocks.1.mlp 400 0.900 [0.850, 0.950] 0.002" in read.text
    assert "+0.3000 [+0.2900, +0.3100] +0.0123 [+0.0023, +0.0223]" in read.text  # the cheapest way
    assert len([link for link in read.loaded if link.startswith("data:image")]) == 2  # curves, one run's heatmaps
