"""A caller's mistake in Python is a VimoeError of one line, with the value, what was expected and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny import config, images, upcycle, vit
from torch import nn

import vimoe

NOTHING = Path("never")
MISTAKES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a name for a model": (lambda m: vimoe.upcycle("vit_tiny", config()), "model is of type str, 'vit_tiny': expected"),
    "settings as a dict": (lambda m: vimoe.upcycle(m, {"layers": "all"}), "config is of type dict, {'layers': 'all'}"),
    "a plan of nothing": (lambda m: vimoe.plan(None, config()), "model is None: expected Module"),
    "a plan by a dict": (lambda m: vimoe.plan(m, {}), "expected MoEConfig; write MoEConfig"),
    "another size": (lambda m: vimoe.count(m, (3, 65, 65)), r"input_size=(3, 65, 65): the model does not take it"),
    "two sides": (lambda m: vimoe.count(m, (64, 64)), "expected (channels, height, width), such as (3, 32, 32)"),
    "one side": (lambda m: vimoe.count(m, 64), "input_size=64: expected (channels, height, width)"),
    "a size of 0": (lambda m: vimoe.count(m, (3, 0, 32)), "expected (channels, height, width)"),
    "a count of text": (lambda m: vimoe.count("m"), "model is of type str"),
    "densify a path": (lambda m: vimoe.densify(NOTHING), "model is of type PosixPath"),
    "save a state dict": (lambda m: vimoe.save(m.state_dict(), NOTHING), "model is of type OrderedDict"),
    "record a list": (lambda m: vimoe.record([m]).__enter__(), "model is of type list"),
    "a tolerance in quotes": (
        lambda m: vimoe.prune(m, {}, tolerance="0.1"),
        "tolerance='0.1': expected a number of nats",
    ),
    "a tolerance of True": (lambda m: vimoe.prune(m, {}, tolerance=True), "tolerance=True: expected a number of nats"),
    "losses of tensors": (
        lambda m: vimoe.balance_loss([torch.zeros(2)]),
        "a routing is of type Tensor, tensor([0., 0.])",
    ),
    "losses of a number": (lambda m: vimoe.router_z_loss(3), "routings is of type int, 3: expected Sequence; give the"),
    "a number for a folder": (
        lambda m: vimoe.load(3),
        "path is of type int, 3: expected str or PathLike; name a model",
    ),
    "a model for a source": (lambda m: vimoe.load_parent_weights(m, m), "source is of type VisionTransformer"),
    "optimize a class": (lambda m: vimoe.optimize(nn.Linear), "model is of type type"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_it_is_one_line(what: str) -> None:
    call, said = MISTAKES[what]
    model = vit()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(vimoe.VimoeError) as caught:
        call(model)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before and not NOTHING.exists()


def test_a_run_folder_in_place_of_its_model_is_told(tmp_path: Path) -> None:
    vimoe.save(vit(), tmp_path / "run" / "model")
    with pytest.raises(vimoe.VimoeError, match=r"run has no config.json: .*; did you mean '.*/run/model'\?$"):
        vimoe.load(tmp_path / "run")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_saved_as_what_is_inside(wrap: Callable, tmp_path: Path) -> None:
    model = upcycle(vit(), config())
    vimoe.save(wrap(model), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(vimoe.load(tmp_path / "model")(images(model)), model(images(model)))


X, Y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
LOADERS = {
    "dicts": ([{"pixel_values": X, "labels": Y}], "gives a dict of 2: expected pairs (images, labels)"),
    "triples": ([(X, Y, ["a"] * 4)], "gives a tuple of 3: expected pairs"),
    "images alone": ([X], "gives a Tensor: expected pairs"),
    "a list of labels": ([(X, [0, 1, 2, 3])], "gives labels of type list: expected a tensor"),
    "arrays": ([(X.numpy(), Y)], "gives images of type ndarray: expected a tensor"),
    "another size": ([(torch.randn(4, 3, 48, 48), Y)], "images of (48, 48): expected (32, 32), the model's size"),
    "one-hot labels": ([(X, torch.eye(5)[Y])], "labels of torch.float32 and shape (4, 5) for 4 images"),
    "fewer labels": ([(X, Y[:3])], "labels of torch.int64 and shape (3,) for 4 images"),
    "one channel": ([(X[:, :1], Y)], "images of shape (4, 1, 32, 32): expected (images, 3, height, width)"),
    "no batch": ([(X[0], Y[:3])], "images of shape (3, 32, 32): expected (images, 3"),
    "masks for a classifier": (
        [(X, torch.zeros(4, 32, 32, dtype=torch.int64))],
        "labels of torch.int64 and shape (4, 32, 32) for 4 images: expected whole numbers of shape (4,)",
    ),
    "a tensor": (X, "the loader is of type Tensor: expected batches"),
    "nothing": (None, "the loader is of type NoneType: expected batches"),
    "an empty list": ([], "the loader is empty"),
    "a class too many": ([(X, Y + 3)], "the label 6: expected 0 to 4"),
}


@pytest.mark.parametrize("what", LOADERS)
def test_a_loader_of_another_kind_is_one_line(what: str) -> None:
    loader, said = LOADERS[what]
    model = upcycle(vit(), config())
    with pytest.raises(vimoe.VimoeError) as caught:
        vimoe.analyze(model, loader, draws=2)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_labels_of_any_whole_numbers_and_wrapped_models_are_analysed() -> None:
    model = upcycle(vit(), config())
    expected = vimoe.analyze(model, [(X, Y)], draws=2)
    for loader in (
        [(X[:0], Y[:0]), (X, Y.int()), (X[:0], Y[:0])],
        [[X, Y.to(torch.uint8)]],
        ((X[:2], Y[:2]), (X[2:], Y[2:])),
    ):
        assert vimoe.analyze(model, loader, draws=2).base.images == 4
    wrapped = nn.DataParallel(model)
    found = vimoe.analyze(wrapped, [(X, Y)], draws=2)
    assert found.to_dict() == expected.to_dict()  # names and all
    assert vimoe.prune(wrapped, found, [(X, Y)], tolerance=100).steps and not vimoe.count(model).moe_layers


def test_evidence_of_another_kind_is_one_line() -> None:
    with pytest.raises(vimoe.VimoeError, match="evidence is of type dict, {}: expected Evidence"):
        vimoe.prune(upcycle(vit(), config()), {})


def test_pruning_names_a_label_that_is_no_class() -> None:
    model = upcycle(vit(), config())
    found = vimoe.analyze(model, [(X, Y)], draws=2)
    with pytest.raises(vimoe.VimoeError, match="the label 6: expected 0 to 4"):
        vimoe.prune(model, found, [(X, Y + 3)])
