"""A newcomer's task in one file: to say of each of the four bits of a handwritten digit if it is set."""

from dataclasses import replace

import pytest
import torch
from helpers.commands import QUICK, TINY, call
from helpers.slow import one_in
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import vimoe
from vimoe.config.data import TASKS
from vimoe.metrics.base import MeanScore, Metric, check_shape
from vimoe.metrics.registry import METRICS, SCORES, Shown
from vimoe.tasks.classification import Classification


class BitScore(MeanScore):
    kind = "bits"


class BitMetric(Metric):
    score_type, classes = BitScore, list("0123456789")

    def check(self, images, labels):
        check_shape(labels, len(images), "(images, 4)", axes=2)

    def of_each_image(self, outputs, labels):
        return bce(outputs, labels.float(), reduction="none").mean(1), ((outputs > 0) == labels).float().mean(1)

    def classes_of(self, labels):
        return (labels << torch.arange(4)).sum(dim=1)


class Bits(Classification):
    metric = "bits"

    @classmethod
    def find(cls, *args, **more):
        data, bits = super().find(*args, **more), torch.arange(4)
        roles = {r: tuple((i, n >> bits & 1) for i, n in getattr(data, r)[::2]) for r in ("train", "val", "test")}
        return replace(data, classes=("ones", "twos", "fours", "eights"), **roles)

    def job(self, *args):
        return replace(super().job(*args), loss=lambda outputs, bits: bce(outputs, bits.float()))


@pytest.mark.parametrize("routing", one_in(2, ["image", "token"]))
def test_it_is_trained_analysed_pruned_reported_saved_and_loaded(routing, tmp_path, capsys, monkeypatch):
    for table, entry in ((TASKS, Bits), (METRICS, BitMetric), (SCORES, Shown({"bits": "set bits"}, "bits"))):
        monkeypatch.setitem(table, "bits", entry)
    task = ["--data.task=bits", "--data.path=digits", *TINY, *QUICK, "--train.hflip=0", f"--moe.routing={routing}"]
    assert call(capsys, "train", *task, "--out", tmp_path / "run")["val"]["bits"] > 0.65  # 0.63 without an image
    assert call(capsys, "analyze", tmp_path / "run", "--draws=2")["classes"] == list("0123456789")
    pruned = call(capsys, "prune", tmp_path / "run", "--tolerance=9", "--out", tmp_path / "pruned")
    assert pruned["after"]["bits"] == call(capsys, "evaluate", tmp_path / "pruned")["bits"] and not pruned["kept"]
    assert "set bits, %" in (tmp_path / "pruned" / "report.html").read_text()
    model, x, labels = vimoe.load(tmp_path / "run" / "model"), torch.randn(8, 3, 16, 16), torch.arange(8)[:, None]
    counts = vimoe.analyze(model, [(x, labels >> torch.arange(4) & 1)], metric="bits").layers[0].counts
    assert counts.any(axis=1).tolist() == [True] * 8 + [False] * 2  # no 8 and no 9
    assert torch.equal(vimoe.load(vimoe.save(model, tmp_path / "again"))(x), model(x))
