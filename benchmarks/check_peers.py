"""Checks that the layers of other libraries in peers.py compute and route as a fair comparison needs.

    python benchmarks/check_peers.py

Builds every peer that is installed and runs it forward and backward in each type; compares it with our layer where both
compute the same function, with the router as it is; forces the routing and looks where tokens went. Prints a table and
exits with 1 where a check fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peers import (
    TINY,
    TYPES,
    Peer,
    Shape,
    activated,
    failure,
    inputs,
    installed,
    mean_share,
    missing,
    mlp,
    ours,
    versions,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vimoe.errors import VimoeError


def loads(peer: Peer, layer: nn.Module, x_BTD: Tensor) -> Tensor:
    """Return (N,) the tokens that each expert computes; those missing from k * B * T were dropped."""
    seen: list[Any] = []
    handle = layer.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        layer(x_BTD)
    handle.remove()
    return peer.sent(seen[0]).sum(dim=0)


def computed(layer: nn.Module, x_BTD: Tensor) -> float:
    """Return the multiply-adds per token that a forward pass spends in matrix products, padding included."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops}) as counter:
        layer(x_BTD)
    return counter.get_total_flops() / 2 / x_BTD.shape[:2].numel()


def _grouped_flops(rows: torch.Size, stacked: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of (M, D) rows by (N, D, F) matrices, one per row; torch's counter lacks this product."""
    return 2 * rows.numel() * stacked[-1]


def shapes(peer: Peer) -> Iterator[Shape]:
    """A tiny shape with one choice for a token and, where the library has that, with two."""
    for k in (1, 2):
        shape = replace(TINY, top_k=k)
        try:
            peer.build(shape)
        except VimoeError:
            continue
        yield shape


def unsound(peer: Peer, dtype: torch.dtype, shape: Shape) -> str:
    """Describe infinite or missing values in a forward and backward pass, or missing gradients; "" if none."""
    layer, x = peer.build(shape).to(dtype), inputs(shape).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    values = {"output": y, "input's gradient": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        return f"output {tuple(y.shape)} {y.dtype}"
    bad = [name for name, value in values.items() if value is None or not value.isfinite().all()]
    return ", ".join(bad)


def misrouted(peer: Peer, dtype: torch.dtype) -> str:
    """Describe a difference between the loads asked for and those computed, even and then skewed; "" if none.

    Without capacity all tokens arrive. With capacity no expert computes more than it was sent, and the even load fits.
    """
    layer, x = peer.build(TINY).to(dtype), inputs(TINY).to(dtype)
    even = torch.arange(x.shape[:2].numel()) % TINY.num_experts
    skewed = torch.where(even == 1, 0, even)
    for wanted in (skewed, even):
        peer.route(layer, wanted)
        expected, got = wanted.bincount(minlength=TINY.num_experts), loads(peer, layer, x)
        fits = (
            (got <= expected).all() and got[1] == expected[1]
            if peer.drops and wanted is skewed
            else got.equal(expected)
        )
        if not fits:
            return f"load {got.tolist()}, expected {expected.tolist()}"
    layer(x).sum().backward()  # the forced gate must not stop it
    return ""


def difference(peer: Peer, shape: Shape) -> float:
    """Return the largest difference of outputs and input gradients from our layer, over their largest value."""
    torch.manual_seed(0)
    twin, layer = peer.twin(shape), peer.build(shape)
    with torch.no_grad():  # experts that differ, and gates that do
        for p in twin.parameters():
            p.add_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    peer.exact(layer, twin)
    results = []
    for module in (twin, layer):
        x = inputs(shape).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))


def check(peer: Peer, dtype: torch.dtype) -> tuple[bool, str]:
    """Check a peer in a type; return (True if all is well, row of the table)."""
    if dtype not in peer.types:
        return True, failure(peer.build, dtype) or ""
    words = [(f"finite, k={shape.top_k}", unsound(peer, dtype, shape)) for shape in shapes(peer)]
    if peer.route is not None:
        words.append(("routed as forced", misrouted(peer, dtype)))
    if peer.exact is not None and dtype == torch.float32:
        apart = max(difference(peer, shape) for shape in shapes(peer))
        words.append((f"equals ours to {apart:.0e}", "" if apart < 1e-5 else f"differs from ours by {apart:.1e}"))
    return not any(wrong for _, wrong in words), "; ".join(wrong or right for right, wrong in words)


def main() -> int:
    """Check all peers and print a table; return 1 if something is wrong."""
    warnings.filterwarnings("ignore")  # of other libraries
    torch.manual_seed(0)
    well = True
    peers = installed()
    reference, x = ours(TINY, mlp(TINY)), inputs(TINY)
    macs = activated(reference, mean_share(TINY))
    print(f"{'layer':24}{'activated':>12}{'computed':>12}   (multiply-adds of a token, of ours)")
    print(f"{'vimoe':24}{1:12.3f}{computed(reference, x) / macs:12.3f}")
    for peer in peers:
        layer = peer.build(TINY)
        if peer.route is not None:
            peer.route(layer, torch.arange(x.shape[:2].numel()) % TINY.num_experts)
        print(f"{peer.name:24}{peer.macs(TINY) / macs:12.3f}{computed(layer, x) / macs:12.3f}   {peer.note}")
    for peer in peers:
        for dtype in TYPES:
            right, words = check(peer, dtype)
            well &= right
            state = ("ok" if right else "WRONG") if dtype in peer.types else "cannot"
            print(f"{peer.name:24}{str(dtype)[6:]:10}{state:8}{words}")
    print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))
    print("missing:", ", ".join(missing()) or "none")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
