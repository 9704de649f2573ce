"""The study of oracle and trust trains each arm, scores it on test, and writes its tables."""

from __future__ import annotations

import json
from pathlib import Path

import oracle_and_trust
import pytest
import torch
from helpers.pictures import folder, roles
from helpers.tiny import vit

import vimoe


def test_all_arms_are_trained_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(oracle_and_trust, "STRANGE", 5)
    photos, others = roles(tmp_path / "photos", train=12, test=6), folder(tmp_path / "others", 2)
    torch.manual_seed(0)
    model = vimoe.save(vit(num_classes=3, img_size=16, patch_size=8), tmp_path / "model")
    argv = ["--model", f"local-dir:{model}", "--data", str(photos), "--experts", "2", "--epochs", "2"]
    argv += ["--batch_size", "8", "--seeds", "0", "--other", f"mine={others}", "--out", str(tmp_path / "out.json")]
    oracle_and_trust.main(argv)
    results = json.loads((tmp_path / "out.json").read_text())
    assert [each["arm"] for each in results] == ["learnt", "random", "oracle", "lessons", "half"]
    assert all(each["images"] == 18 and each["regret"] >= 0 for each in results)
    assert [("trust" in each) for each in results] == [True, False, False, False, False]
    strange = results[0]["trust"]["strange"]
    assert set(strange) == {"mine", "digits", "noise"} and all(0 <= v <= 1 for v in strange["noise"].values())
    text = capsys.readouterr().out
    assert all(
        f"| {name} |" in text for name in ("learnt", "lessons | half", "half | learnt", "mine", "max_probability")
    )


def test_each_arm_is_compared_with_its_control_by_seed() -> None:
    tops = {"learnt": [0.5, 0.75], "half": [0.25, 0.25], "lessons": [0.25, 0.5]}
    results = [
        {"arm": arm, "seed": seed, "top1": top, "loss": 1.0, "regret": 1 - top}
        for arm, found in tops.items() for seed, top in enumerate(found)
    ]  # fmt: skip
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in oracle_and_trust.tables(results).splitlines()[2:]}
    assert rows["| half"][0] == "learnt" and rows["| half"][2].startswith("-37.50 [")
    assert rows["| lessons"][0] == "half" and rows["| lessons"][2].startswith("+12.50 [")
    assert rows["| lessons"][5].startswith("-0.125 [") and rows["| learnt"][0] == rows["| learnt"][2] == ""
