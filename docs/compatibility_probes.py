"""The probes of docs/compatibility.md: the columns of the table, each of which raises where something does not hold."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compatibility_rows import Architecture, Inputs
from torch import Tensor, nn

import vimoe
from vimoe.errors import VimoeError, first_line
from vimoe.models.interface import find_backbone
from vimoe.models.upcycling import sites

EXPERTS = 4


@dataclass(frozen=True)
class Subject:
    """An architecture that is probed.

    Attributes:
        parent: dense model in eval mode.
        model: the same one, upcycled with token routing.
        inputs: arguments of its forward, two images or texts.
    """

    parent: nn.Module
    model: nn.Module
    inputs: Inputs


def identity(on: Subject) -> None:
    """The upcycled model computes what its parent did."""
    with torch.no_grad():
        _same(output(on.model, on.inputs), output(on.parent, on.inputs))


def backward(on: Subject) -> None:
    """Gradients of all that is no FFN are the parent's, and each layer's experts have gradients."""
    expected = _gradients(on.parent, on.inputs)
    for site in sites(on.parent):
        for name, p in on.parent.named_parameters():
            if any(p is each for each in site.module.parameters()):
                expected.pop(name, None)
    found = _gradients(on.model, on.inputs)
    _same_gradients({name: found[name] for name in expected if name in found}, expected)
    for site in sites(on.model):
        reached = [name for name in found if name.startswith(f"{site.name}.experts.") and found[name].any()]
        assert reached, f"no gradient reaches the experts of {site.name}"


def checkpointing(on: Subject) -> None:
    """The library's own switch for gradient checkpointing changes no gradient of a training step."""

    def switched(model: nn.Module) -> dict[str, Tensor]:
        made = copy.deepcopy(model).train()
        _switch(made)
        return _gradients(made, on.inputs)

    found = unless_the_parent_fails(switched, on)
    _same_gradients(found, _gradients(copy.deepcopy(on.model).train(), on.inputs))


def compiles(on: Subject, backend: str = "aot_eager") -> None:
    """It compiles, forward and backward, without a graph break, and its gradients are those without torch.compile."""

    def compiled(model: nn.Module) -> dict[str, Tensor]:
        torch._dynamo.reset()
        made = copy.deepcopy(model)
        made.compile(backend=backend, fullgraph=True)
        return _gradients(made, on.inputs)

    _same_gradients(unless_the_parent_fails(compiled, on), _gradients(on.model, on.inputs))


def inductor(on: Subject) -> None:
    """It compiles by torch's default backend too."""
    compiles(on, "inductor")


def bfloat16(on: Subject) -> None:
    """In bfloat16 it computes what its parent does in bfloat16, to 5% or twice what rounding changes in the parent."""
    parent, model = (copy.deepcopy(each).bfloat16() for each in (on.parent, on.model))
    inputs = tuple(each.bfloat16() if each.is_floating_point() else each for each in on.inputs)
    with torch.no_grad():
        expected = output(parent, inputs)
        rounding = _difference(expected, output(on.parent, on.inputs))
        _same(output(model, inputs), expected, max(0.05, 2 * rounding))


def saving(on: Subject) -> None:
    """A model folder brings it back."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loaded = vimoe.load(vimoe.save(on.model, Path(folder) / "model"))
        _same(output(loaded, on.inputs), output(on.model, on.inputs), 1e-6)


def exports(on: Subject) -> None:
    """torch.export takes it, and the program computes the same for other images."""

    def exported(model: nn.Module) -> None:
        others = tuple(each.flip(0) for each in on.inputs)
        with torch.no_grad():
            program = torch.export.export(model, on.inputs, strict=False).module()
            torch.manual_seed(0)
            found = _tensor(model, program(*others))
            _same(found, output(model, others))

    unless_the_parent_fails(exported, on)


def image_routing(on: Subject) -> None:
    """With one decision for an image, too, it computes what its parent did."""
    model = upcycled(on.parent, "image")
    with torch.no_grad():
        _same(output(model, on.inputs), output(on.parent, on.inputs))


PROBES: dict[str, Callable[[Subject], None]] = {
    "identity": identity,
    "backward": backward,
    "checkpointing": checkpointing,
    "compile": compiles,
    "bfloat16": bfloat16,
    "save, load": saving,
    "export": exports,
    "image routing": image_routing,
    "inductor": inductor,
}


class Refused(Exception):
    """What is not there for the dense model either."""


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the logits, or the last hidden state, always with the same random numbers (ViT-MAE draws a mask)."""
    torch.manual_seed(0)
    return _tensor(model, model(*inputs))


def upcycled(parent: nn.Module, routing: str) -> nn.Module:
    """Return a copy with experts in the place of all FFNs."""
    torch.manual_seed(0)
    return vimoe.upcycle(copy.deepcopy(parent), vimoe.MoEConfig(layers="all", num_experts=EXPERTS, routing=routing))


def subject(of: Architecture) -> Subject:
    """Build an architecture and upcycle it.

    Raises:
        SurgeryError: if it cannot be.
    """
    torch.manual_seed(0)
    parent = of.build().eval()
    with torch.no_grad():
        for p in parent.parameters():  # a LayerScale of 1e-5, or a head of zeros, would hide mistakes
            p.add_(torch.randn_like(p) * 0.02)
    return Subject(parent, upcycled(parent, "token"), of.inputs(parent))


def probe(of: Architecture, wanted: Iterable[str]) -> dict[str, str]:
    """Return the finding of each of these probes: "yes", "no: " and the reason, or "unknown: " and the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: list[Subject] = []
        refusal = _finding(lambda: made.append(subject(of)))
        if not made:
            return dict.fromkeys(wanted, refusal)
        return {name: _finding(lambda name=name: PROBES[name](made[0])) for name in wanted}  # type: ignore[misc]


def _finding(action: Callable[[], object]) -> str:
    try:
        action()
    except (VimoeError, Refused) as error:
        return f"no: {first_line(error)}"
    except Exception as error:
        return f"unknown: {type(error).__name__}: {first_line(error)[:160]}"
    return "yes"


def _gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one."""
    model.zero_grad()
    output(model, inputs).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.numel()}
    model.zero_grad()
    return found


def _same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise if gradients differ; none at all is a gradient of zeros, which torch.compile makes of it."""
    assert expected, "nothing has a gradient"
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest < float("inf"), "a gradient is not finite"
    for name in found.keys() | expected.keys():
        known = [each[name] for each in (found, expected) if name in each]
        difference = float((known[0] - (known[1] if len(known) > 1 else 0)).abs().max())
        assert difference <= 1e-3 * largest, f"the gradient of {name} differs by {difference / largest:.1e}"


def _same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    assert expected.isfinite().all(), "the parent's output is not finite"
    difference = _difference(found, expected)
    assert difference <= tolerance, f"outputs differ by {difference:.1e}"


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value that was expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def _tensor(model: nn.Module, found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else find_backbone(model).logits(found)


def _switch(model: Any) -> None:
    """Switch gradient checkpointing on as the library does."""
    if hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:
            raise Refused(f"timm: {first_line(error)}") from error
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise Refused("the library has no switch for it")


def unless_the_parent_fails(probe: Callable[[nn.Module], Any], on: Subject) -> Any:
    """Run a probe; if it fails, and for the parent too, say so."""
    try:
        return probe(on.model)
    except Refused:
        raise
    except Exception:
        try:
            probe(on.parent)
        except Exception as error:
            raise Refused(f"nor can it be done with the dense model ({type(error).__name__})") from error
        raise
