"""The study of routes at the start measures what it says, on images that routers were not computed from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import routes_at_start
import torch
from helpers.pictures import roles
from helpers.tiny import vit

import vimoe


@pytest.mark.parametrize(
    ("experts", "ami", "of_a_class", "in_use"),
    [
        ([0, 0, 1, 1, 2, 2], 1, 1, 3), ([1] * 6, 0, 1, 1), ([0, 1, 0, 1, 0, 1], None, 2, 2),
        ([0, 0, 0, 1, 1, 1], None, 4 / 3, 2),
    ],
)  # fmt: skip
def test_figures_of_a_hand_computed_case(experts: list[int], ami: float, of_a_class: float, in_use: float) -> None:
    row = routes_at_start.measure("a", "b", np.array(experts), np.array([0, 0, 1, 1, 2, 2]), 4, 0.5)
    assert (row.experts_of_a_class, row.experts) == pytest.approx((of_a_class, in_use))
    assert row.ami < 0.5 if ami is None else row.ami == pytest.approx(ami, abs=1e-6)


def test_given_routes_tell_colours_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = roles(tmp_path / "photos", test=20)
    torch.manual_seed(0)
    model = vimoe.save(vit(num_classes=3, img_size=16, patch_size=8), tmp_path / "model")
    argv = ["--model", f"local-dir:{model}", "--data", str(photos), "--layers", "0", "1", "--experts", "3"]
    routes_at_start.main([*argv, "--out", str(tmp_path / "routes.json")])
    rows = {(row["layer"], row["router"]): row for row in json.loads((tmp_path / "routes.json").read_text())}
    assert len(rows) == 8 and capsys.readouterr().out.count("\n") == 10
    for layer in ("blocks.0.mlp", "blocks.1.mlp"):
        assert abs(rows[layer, "even"]["ami"]) < 0.1 and rows[layer, "even"]["experts_of_a_class"] > 2.5
        assert rows[layer, "superclass"]["ami"] > 0.8 and rows[layer, "superclass"]["experts_of_a_class"] < 1.3
        assert rows[layer, "softmax"]["confidence"] < rows[layer, "superclass"]["confidence"]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"routes_at_start: [^\n]+$"):
        routes_at_start.main(["--model", "local-dir:nowhere", "--data", str(roles(tmp_path / "photos"))])
