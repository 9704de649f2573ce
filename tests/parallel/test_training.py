"""Checkpointing, records and reading of a parallel model; the bytes of a step are those of the formulas."""

from __future__ import annotations

import torch
from helpers import parallel_training
from helpers.processes import run


def test_checkpointing_records_once_and_changes_no_gradient() -> None:
    for checkpointed, plain in run(parallel_training.checkpointed_and_not, 2, timeout=120):
        assert checkpointed["records"] == plain["records"]
        assert [record[0] for record in plain["records"]] == ["blocks.0.mlp", "blocks.1.mlp"]
        assert plain["copied"] <= plain["outside"], "a block stays gathered after the forward pass"
        assert plain["read"] == checkpointed["read"] == 1, "FSDP's hooks were taken for the user's"
        assert [record[1] for record in plain["records"]] == [4 * 5, 4], "of the last block, the class token alone"
        dense = sum(g.numel() for name, g in plain["gradients"].items() if ".experts." not in name)
        assert plain["sent"]["data"] == 8 * dense and plain["sent"]["expert"] > 0 == plain["sent"]["fsdp"]
        # backward: the gradients of two all-to-alls, and these again with 2 of the 4 loads of each of 2 layers
        assert checkpointed["sent"]["expert"] == 2 * plain["sent"]["expert"] + 2 * 2 * 8
        for name, gradient in plain["gradients"].items():
            torch.testing.assert_close(checkpointed["gradients"][name], gradient, rtol=0, atol=1e-12, msg=name)


def test_bytes_of_a_step_are_those_of_the_formulas() -> None:
    """fsdp 2 x expert 2, float32: all-gathers and reduce-scatters of two send half, all-reduces of two the whole."""
    seen = run(parallel_training.figures, 4, timeout=120)
    width = seen[0]["width"]
    for process in seen:
        mine, dense = process["of experts"] // 2, process["all"] - process["of experts"]
        # blocks gather their weights for the forward and again for the backward pass, the root once; all scatter once
        gathered = 2 * (mine + dense - process["root"]) + process["root"]
        padded = process["sent"]["fsdp"] - 4 * (gathered + mine + dense) / 2
        assert 0 <= padded <= 0.05 * process["sent"]["fsdp"], "shards are padded to one size"
        assert process["sent"]["other"] == 0
        assert 0 <= process["sent"]["data"] - 4 * dense / 2 <= 0.05 * process["sent"]["data"]
    for pair in (seen[:2], seen[2:]):
        for process, other in (pair, pair[::-1]):
            away = slice(2, 4) if process["expert rank"] == 0 else slice(0, 2)
            home = slice(0, 2) if process["expert rank"] == 0 else slice(2, 4)
            sent = sum(sum(load[away]) for load in process["loads"])
            got = sum(sum(load[home]) for load in other["loads"])
            # tokens there and the others' outputs back, and as many gradients; and 2 of the 4 loads of each of 2 layers
            assert process["sent"]["expert"] == 2 * 4 * width * (sent + got) + 2 * 2 * 8
