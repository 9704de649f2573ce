"""A newcomer's backbone in this one file: a ViT of plain torch, whose output is no tensor, and its own class of FFN."""

import pytest
import torch
from helpers.commands import QUICK, call
from helpers.slow import one_in
from torch import nn

import vimoe
from vimoe.config.model import FAMILIES
from vimoe.models.interface import Backbone
from vimoe.moe.ffn import KINDS, Kind
from vimoe.moe.router import TokenLayout


class FeedForward(nn.Sequential): ...


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = FeedForward(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x):
        return (x := x + self.attention(*[self.norm(x)] * 3)[0]) + self.ffn(x)


class OwnViT(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 16, 4, stride=4), nn.Sequential(Layer(), Layer())
        self.classify = nn.Linear(16, num_classes)

    def forward(self, images):
        tokens = self.layers(nn.functional.pad(self.stem(images).flatten(2).mT, (0, 0, 1, 0)))  # class token: zeros
        return {"scores": self.classify(tokens[:, 0])}


class OwnFamily(Backbone):
    models, build, holder, layout = (OwnViT,), OwnViT, "layers", TokenLayout(num_prefix_tokens=1, class_token=True)
    width, num_patches, input_size = 16, 4, (3, 8, 8)
    arguments = property(lambda self: {"num_classes": self.num_classes})
    classifiers = property(lambda self: (self.vit.classify,))
    create = classmethod(lambda cls, name, *, num_classes, **_: OwnViT(num_classes or 10))
    logits = staticmethod(lambda output: output["scores"])


FAMILIES["own"], KINDS[FeedForward] = OwnFamily, Kind(fc1=("0",), fc2="2", act="1")


@pytest.mark.parametrize("routing", one_in(2, ["token", "image"]))
def test_it_goes_through_every_verb(routing, tmp_path, capsys):
    moe = [f"--moe.routing={routing}", "--moe.layers=last:1", "--model.name=own:tiny", "--data.images_per_class=9"]
    call(capsys, "train", "--data.path=digits", *QUICK, *moe, "--out", tmp_path / "run")
    model, images = vimoe.load(tmp_path / "run" / "model"), torch.randn(5, 3, 8, 8)
    assert isinstance(model.layers[1].ffn, vimoe.MoE) and type(model.layers[0].ffn) is FeedForward
    torch.testing.assert_close(vimoe.load(vimoe.save(model, tmp_path / "again"))(images), model(images))
    assert [layer["name"] for layer in call(capsys, "analyze", tmp_path / "run")["layers"]] == ["layers.1.ffn"]
    call(capsys, "prune", tmp_path / "run", "--tolerance=9", "--out", tmp_path / "dense")
    assert type(vimoe.load(tmp_path / "dense" / "model").layers[1].ffn) is FeedForward
