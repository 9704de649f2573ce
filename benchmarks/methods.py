"""Time and memory of the layer with each gate, router, kind of experts and router gradient, beside that of the default.

    OMP_NUM_THREADS=1 python benchmarks/methods.py --out benchmarks/results/methods.json

All layers run in turns in one process, on the same tokens and with the decisions of their own routers; a ratio is of
the same round. Routers are not started from images, which changes no time.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp

import vimoe
from vimoe.bench.result import machine
from vimoe.bench.step import activations, step_of
from vimoe.bench.timing import compare, interleaved
from vimoe.moe.router import TokenLayout

DEFAULT = "default"
METHODS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "gate choice": {"gate": "choice"},
    "gate sigmoid": {"gate": "sigmoid"},
    "router sigmoid": {"router": "sigmoid"},
    "router cosine": {"router": "cosine"},
    "router expert_choice": {"router": "expert_choice"},
    "router soft": {"router": "soft", "slots_per_expert": 32},
    "router smear": {"router": "smear"},
    "router hash": {"router": "hash"},
    "router random": {"router": "random"},
    "router centroids": {"router": "centroids"},
    "router superclass": {"router": "superclass"},
    "experts lora": {"experts": "lora"},
    "experts delta": {"experts": "delta"},
    "experts adapter": {"experts": "adapter"},
    "fine-grained": {"expert_width": 384, "num_experts": 32, "top_k": 4},
    "gradient default_vectors": {"router_gradient": "default_vectors"},
    "gradient dense": {"router_gradient": "dense"},
}


def layers(routing: str, dim: int, hidden: int) -> dict[str, vimoe.MoE]:
    """Return a layer for each method that goes with this kind of routing."""
    dense, found = Mlp(dim, hidden), {}
    for name, settings in METHODS.items():
        try:
            config = vimoe.MoEConfig(routing=routing, **settings)
            found[name] = vimoe.MoE(copy.deepcopy(dense), config, TokenLayout(1, True))
        except vimoe.VimoeError as refused:
            print(f"{name}: {refused}")
    return found


def measured(routing: str, images: int, tokens: int, dim: int, hidden: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each method: ratios of time to the default with intervals, parameters, bytes that are kept."""
    torch.manual_seed(0)
    there, x = layers(routing, dim, hidden), torch.randn(images, tokens, dim)
    rows: dict[str, dict[str, Any]] = {}
    for name, layer in there.items():
        kept = activations(
            lambda layer=layer: layer.train()(x.clone().requires_grad_() * 1), list(layer.parameters()), False
        )
        parameters = sum(p.numel() for p in layer.parameters())
        rows[name] = {"method": name, "routing": routing, "params": parameters, "bytes_kept": kept}
    for kind in ("forward", "training"):
        leaf, dy = x.clone().requires_grad_(kind == "training"), torch.randn_like(x)
        steps = {
            name: step_of(layer, (leaf,), kind == "training", False, lambda y, dy=dy: y.backward(dy))
            for name, layer in there.items()
        }
        for timing in compare(interleaved(steps, rounds, what=kind), (DEFAULT,), {}):
            rows[timing.name][kind] = {
                "ratio": timing.ratio,
                "low": timing.low,
                "high": timing.high,
                "seconds": timing.seconds,
            }
    return list(rows.values())


def main() -> None:
    """Print a row for each method and kind of routing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    shape = options.images, options.tokens, options.dim, options.hidden
    found = [row for routing in ("image", "token") for row in measured(routing, *shape, options.rounds)]
    print(f"\n{'method':<26}{'routing':<9}{'forward':>24}{'training':>24}{'parameters':>12}{'MB kept':>9}")
    for row in found:
        times = "".join(
            f"{'{ratio:.3f} [{low:.3f}, {high:.3f}]'.format(**row[kind]):>24}" for kind in ("forward", "training")
        )
        print(f"{row['method']:<26}{row['routing']:<9}{times}{row['params']:>12,}{row['bytes_kept'] / 1e6:>9.1f}")
    if options.out:
        text = json.dumps({"shape": shape, "machine": machine(), "rows": found}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
