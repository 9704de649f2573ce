"""What tests of routers that mix tokens or experts share: layers in float64, models, and the verbs in one go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny import config, images, perturb_experts, randomise, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.analysis.evidence import Evidence
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import TokenLayout

DIM, HIDDEN, EXPERTS = 6, 10, 3


def layer(dense: nn.Module | None = None, **settings: object) -> vimoe.MoE:
    """A layer in training all of whose parameters differ, in float64."""
    torch.manual_seed(0)
    made = vimoe.MoE(dense or Mlp(DIM, HIDDEN), config(num_experts=EXPERTS, **settings), TokenLayout(1, True))
    return randomise(made).double().train()


def tokens(count: int = 4) -> Tensor:
    """Two images."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)


def ffn(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A timm Mlp, from its parameters by name."""
    hidden = nn.functional.gelu(x @ weights["fc1.weight"].T + weights["fc1.bias"])
    return hidden @ weights["fc2.weight"].T + weights["fc2.bias"]


def of(layer: vimoe.MoE, part: str, expert: int | None = None) -> dict[str, Tensor]:
    """Parameters of a part of a layer, or those of one expert."""
    own = {n.removeprefix(f"{part}."): p for n, p in layer.named_parameters() if n.startswith(f"{part}.")}
    return own if expert is None else {name: p[expert] for name, p in own.items()}


def assert_equal_with_gradients(
    layer: vimoe.MoE, reference: Callable[[vimoe.MoE, Tensor], Tensor], untrained: str = ""
) -> None:
    """Outputs of a layer and a reference, and their gradients to x and to all parameters, to float64 rounding.

    All gradients are large, but for that of the parameter `untrained`.
    """
    found = []
    for compute in (lambda layer, x: layer(x), reference):
        x = tokens().requires_grad_()
        y = compute(layer, x)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        names = [name for name, _ in layer.named_parameters()]
        gradients = torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])
        found.append({"y": y, **dict(zip(["x", *names], gradients, strict=True))})
        small = [name for name, value in found[-1].items() if value.abs().max() < 1e-4]
        assert small == ([untrained] if untrained else []), "the comparison would be of zeros"
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def check_step_0_and_copies(settings: vimoe.MoEConfig, folder: Path) -> None:
    """The function at step 0; then a trained model through save and load, deepcopy, other types and `optimize`."""
    model = vit()
    x = images(model)
    before = model(x)
    torch.testing.assert_close(vimoe.upcycle(model, settings)(x), before, atol=1e-5, rtol=0)
    y = perturb_experts(model)(x)
    assert (y - before).abs().max() > 1e-3
    loaded = vimoe.load(vimoe.save(model, folder / "model"))
    torch.testing.assert_close(loaded(x), y)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(x[1:2]), y[1:2], atol=1e-5, rtol=1e-5)  # whatever is in its batch
    assert model(x[:0]).shape == (0, 5)
    low = copy.deepcopy(model).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16 and (low.float() - y).abs().max() < 0.1 * y.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(vimoe.optimize(loaded)(x), y, atol=1e-4, rtol=1e-4)
    vimoe.densify(model)
    torch.testing.assert_close(model(x), before)


def check_program(settings: vimoe.MoEConfig) -> None:
    """torch.export with any number of images gives the same outputs, and torch.compile finds one graph."""
    torch.manual_seed(0)
    made = randomise(vimoe.MoE(Mlp(DIM, HIDDEN), settings, TokenLayout(1, True))).eval()
    x = tokens().float()
    batch = {0: torch.export.Dim("images")}
    program = torch.export.export(made, (torch.cat([x, x]),), dynamic_shapes=(batch,))
    torch.testing.assert_close(program.module()(x), made(x))
    compiled = torch.compile(made.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))


def analysed(settings: vimoe.MoEConfig) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Evidence]:
    """A model whose experts differ, validation batches, and the evidence on its layers."""
    model = perturb_experts(vimoe.upcycle(vit(), settings))
    loader = [(images(model, 8, seed), torch.arange(8) % 5) for seed in (1, 2)]
    return model, loader, vimoe.analyze(model, loader, draws=2)


def check_pruning(settings: vimoe.MoEConfig) -> None:
    """The evidence has dense FFNs, by which `prune` makes all layers dense."""
    model, loader, evidence = analysed(settings)
    n = settings.num_experts
    for each in evidence.layers:
        assert set(each.dense) == {"shared", "merge", "matched"}
        assert each.load == pytest.approx([1 / n] * n) and each.effective_experts.value == pytest.approx(n)
        assert all(effect.loss.value != 0 for effect in each.dense.values())
    assert Evidence.from_dict(evidence.to_dict()).to_dict() == evidence.to_dict()
    vimoe.prune(model, evidence, loader, tolerance=9)
    assert not moe_layers(model)
