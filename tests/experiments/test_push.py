"""A run is pushed from the command line, and its card has the figures of its own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.stand_in_hub import TOKEN, stand_in_hub

import vimoe
from vimoe.cli import main
from vimoe.errors import FolderError
from vimoe.experiments.push import results

OLD = Path(__file__).parents[1] / "old" / "digits"
RECEIPT = {
    "top1": 0.875, "top5": 0.99, "images": 64, "loss": 0.4567, "params": 2e6, "activated_params": 1e6, "macs": 3e9,
    "images_per_second": 120.0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of huggingface_hub's upload by LFS
def test_a_run_is_pushed_with_its_figures_and_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(OLD, tmp_path / "run")
    with stand_in_hub(monkeypatch, tmp_path / "cache") as hub:
        assert main(["push", str(run), "me/digits"]) == 2
        assert "token" in capsys.readouterr().err
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "token").write_text(TOKEN)
        assert main(["push", str(run), "me/digits", "--private", "true", "--json"]) == 0
        url = json.loads(capsys.readouterr().out.splitlines()[-1])["url"]
        card = hub.repos["me/digits"][url.rpartition("/")[2]]["README.md"].decode()
        pushed, own = vimoe.load("me/digits", token=TOKEN).state_dict(), vimoe.load(run / "model").state_dict()
        assert hub.private == {"me/digits"}
    assert all(torch.equal(pushed[name], weight) for name, weight in own.items())
    score = json.loads((run / "summary.json").read_text())["val"]
    assert f"{100 * score['top1']:.2f}" in card and f"{score['loss']:.4f}" in card
    assert f"Measured on {score['images']} validation images" in card


def test_a_pruned_run_has_its_receipt_on_the_card(tmp_path: Path) -> None:
    after = {**RECEIPT, "top1": 0.8125, "params": 1e6}
    (tmp_path / "summary.json").write_text(json.dumps({"split": "test", "before": RECEIPT, "after": after}))
    text = results(tmp_path / "summary.json")
    assert "Measured on 64 test images" in text
    assert "| before pruning | 87.50 | 0.4567 | 2.000 |" in text and "| pruned | 81.25 | 0.4567 | 1.000 |" in text


def test_without_a_summary_there_are_no_figures_and_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    assert results(tmp_path / "summary.json") == ""
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(FolderError, match="summary.json cannot be read"):
        results(tmp_path / "summary.json")
