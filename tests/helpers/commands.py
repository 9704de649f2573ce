"""The command line called from tests: options of tiny trainings, JSON of a call, refusals."""

from __future__ import annotations

import json

import pytest

from vimoe.cli import main

TINY = [
    "--model.name=vit_tiny_patch16_224", "--model.pretrained=false", "--model.img_size=16",
    '--model.args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}',
]  # fmt: skip


QUICK = [
    "--train.epochs=3",
    "--train.batch_size=8",
    "--train.lr=3e-3",
    "--data.workers=0",
    "--train.tensorboard=false",
]


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    """Runs a verb with --json; its last line of output is the object."""
    assert main([*map(str, argv), "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["schema"] == 1 and values["command"] == argv[0]
    return values


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a mistake prints: one line on standard error, nothing on standard output."""
    capsys.readouterr()
    assert main([*map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("vimoe: ") and printed.err.count("\n") == 1
    return printed.err
