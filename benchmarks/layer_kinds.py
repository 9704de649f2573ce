"""Time and memory of MoE layers with other settings over a layer with the default ones.

    python benchmarks/layer_kinds.py gate=choice router=smear router=soft,routing=token,slots_per_expert=24

An argument is the settings of one layer (`vimoe.MoEConfig`), with commas between them. All layers run in turn in one
process; a ratio is the median over rounds of that within a round, with a 95% interval by bootstrap. Routing is the
layer's own, in training, with random weights: loads are about even. `--routing` is that of the default layer and of
those that do not say. Kept is the memory between forward and backward pass, with the input and without weights.
"""

from __future__ import annotations

import argparse

import torch
from timm.layers import Mlp
from torch import nn

from vimoe import MoE, MoEConfig
from vimoe.bench.result import machine
from vimoe.bench.step import activations, step_of
from vimoe.bench.timing import compare, interleaved
from vimoe.moe.router import TokenLayout


def layer(written: str, args: argparse.Namespace) -> nn.Module:
    """Return a layer with settings written as on the command line."""
    torch.manual_seed(0)
    pairs = dict(each.split("=") for each in written.split(",") if each)
    values = {name: int(value) if value.isdigit() else value for name, value in pairs.items()}
    config = MoEConfig.from_dict({"routing": args.routing, **values})
    return MoE(Mlp(args.dim, args.hidden), config, TokenLayout(1, True))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--routing", default="image")
    for name, number in {"rounds": 11, "images": 16, "tokens": 197, "dim": 384, "hidden": 1536}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    args = parser.parse_args()
    default = f"default, {args.routing} routing"
    layers = {default: layer("", args), **{written: layer(written, args) for written in args.settings}}
    x = torch.randn(args.images, args.tokens, args.dim).requires_grad_()
    dy = torch.randn_like(x)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for training in (False, True):
        steps = {name: step_of(each, (x,), training, False, lambda y: y.backward(dy)) for name, each in layers.items()}
        print("forward and backward" if training else "forward", flush=True)
        for timing in compare(interleaved(steps, args.rounds), (default,), {}):
            each = layers[timing.name]
            kept = activations(lambda each=each: each(x * 1), list(each.parameters())) if training else 0  # type: ignore[misc]
            print(f"{timing}{f'{kept / 2**20:9.1f} MiB kept' if training else ''}", flush=True)


if __name__ == "__main__":
    main()
