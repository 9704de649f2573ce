"""The parts of an FFN, read from what its forward computes.

transformers copies code from model to model: well over a hundred of its classes compute what LlamaMLP does, and some
eighty what CLIPMLP does. So they are not listed. torch.fx records which parts a module calls in which order, and a
module is an FFN if that is fc2(act(fc1(x))), or fc2(act(gate(x)) * value(x)) with two matrices or one.

Nothing is computed, and a module without weights is read too. A forward that calls functions where these have modules,
such as torch.nn.functional.dropout, is that of no FFN here.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Tracer

PACKAGES = ("transformers.",)  # whose classes are read so; others have an entry in `vimoe.moe.ffn.KINDS`
_PRODUCTS = (operator.mul, torch.mul)
_CHUNKS = ("chunk", torch.chunk)


def gate_first(_module: Any) -> bool:
    """Return False: the value's rows do not come first. It has a name, so that it can be pickled."""
    return False


def value_first(_module: Any) -> bool:
    """Return True: the value's rows come before the gate's."""
    return True


class _Shallow(Tracer):
    """Record the calls of a module's own parts, and none inside of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def whole(module: nn.Module) -> dict[str, Any] | None:
    """Return arguments of `vimoe.moe.ffn.Kind` for a module that computes an FFN; None for any other."""
    traced = _trace(module, inputs=1)
    if traced is None:
        return None
    (x,), y = traced
    y, last_drop = _undropped(module, y)
    fc2 = _linear(module, y)
    if fc2 is None:
        return None
    units, first_drop = _undropped(module, y.args[0])
    parts: dict[str, Any] = {"fc2": fc2, "drops": (first_drop, last_drop)}
    if (fc1 := _activated(module, units)) is not None:
        act, name = units.target, _linear(module, fc1)
        return None if name is None or fc1.args[0] is not x else {**parts, "fc1": (name,), "act": act}
    found = _gated(module, units, x)
    return None if found is None else {**parts, **found}


def begins(module: nn.Module) -> tuple[str, str] | None:
    """Return names of linear map and activation of a module that computes act(fc1(x)); None for any other."""
    traced = _trace(module, inputs=1)
    if traced is None:
        return None
    (x,), units = traced
    first = _activated(module, units)
    name = None if first is None else _linear(module, first)
    return (name, str(units.target)) if first is not None and name is not None and first.args[0] is x else None


def ends(module: nn.Module) -> str | None:
    """Return the name of the linear map that alone reads the first input of a module; None where there is none.

    What the module computes after it, such as a dropout, a norm and a residual, plays no part.
    """
    traced = _trace(module, inputs=2)
    readers = [] if traced is None else list(traced[0][0].users)
    return _linear(module, readers[0]) if len(readers) == 1 else None


def _trace(module: nn.Module, inputs: int) -> tuple[list[Node], Node] | None:
    """Return inputs and output of a module's graph; None with more inputs, or if it cannot be recorded."""
    if not type(module).__module__.startswith(PACKAGES):
        return None
    if len(inspect.signature(module.forward).parameters) > inputs:
        return None
    try:
        graph = _Shallow().trace(module)
    except Exception:  # whatever a forward raises that decides by values
        return None
    placed = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node.args[0] for node in graph.nodes if node.op == "output")
    return (placed, output) if placed and isinstance(output, Node) else None


def _linear(module: nn.Module, node: Any) -> str | None:
    """Return the name of the linear map, plain or adapted, that a node calls."""
    name = _call(node)
    return name if name is not None and hasattr(module.get_submodule(name), "in_features") else None


def _activated(module: nn.Module, node: Any) -> Node | None:
    """Return what a node applies an activation to; None if it calls none."""
    name = _call(node)
    if name is None or _linear(module, node) is not None or isinstance(module.get_submodule(name), nn.Dropout):
        return None
    argument = node.args[0]
    return argument if isinstance(argument, Node) else None


def _gated(module: nn.Module, node: Any, x: Node) -> dict[str, Any] | None:
    """Return names of the parts of act(gate) * value."""
    if not isinstance(node, Node) or node.target not in _PRODUCTS:
        return None
    for activated, value in (node.args, node.args[::-1]):
        gate = _activated(module, activated)
        if gate is None or not isinstance(activated, Node) or not isinstance(value, Node):
            continue
        found: dict[str, Any] = {"act": activated.target, "gated": True}
        names = _linear(module, gate), _linear(module, value)
        if None not in names and gate.args[0] is x and value.args[0] is x:
            return {**found, "fc1": names}
        if gate.target is value.target is operator.getitem and gate.args[0] is value.args[0]:
            if {gate.args[1], value.args[1]} != {0, 1}:
                return None
            halves, packed = gate.args[0], _chunked(gate.args[0])
            name = _linear(module, packed)
            if name is not None and packed is not None and packed.args[0] is x and halves is not None:
                return {**found, "fc1": (name,), "value_first": value_first if gate.args[1] else gate_first}
    return None


def _chunked(node: Any) -> Node | None:
    """Return what a node cuts into two halves of channels."""
    if not isinstance(node, Node) or node.target not in _CHUNKS:
        return None
    source, parts, *more = node.args
    axis = more[0] if more else node.kwargs.get("dim")
    return source if isinstance(source, Node) and (parts, axis) == (2, -1) else None


def _undropped(module: nn.Module, node: Any) -> tuple[Any, str | None]:
    """Return what comes before a dropout, and the dropout's name; the node itself where there is none."""
    name = _call(node)
    if name is None or not isinstance(module.get_submodule(name), nn.Dropout):
        return node, None
    return node.args[0], name


def _call(node: Any) -> str | None:
    """Return the name of the part that a node calls with one argument."""
    called = isinstance(node, Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return str(node.target) if called else None
