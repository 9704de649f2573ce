"""A task made so that routing must help: digits in six styles, and each style permutes the labels anew.

The label of an image follows from its style and its digit together. A small ViT that knows both is frozen, but for one
narrow FFN and the classifier. An FFN has to learn a permutation of ten labels for each style, and is too narrow for
six of them; an expert that gets few styles needs few.

    python studies/styles.py --seeds 3 --out styles.json

trains each arm on each seed (seconds each), and prints its accuracy and loss on test, what it costs to exchange the
routes of images, and how far the routes follow style and digit.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_mutual_info_score
from timm.models import VisionTransformer
from torch import Tensor, nn

import vimoe

STYLES, DIGITS = 6, 10
DIM, WIDTH = 48, 8  # channels, and hidden units of the FFN that is trained
BATCH = 128
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"layers": "none"},
    "dense, equal activated": {"num_experts": 0, "num_shared_experts": 2},
    "probability": {},
    "choice": {"gate": "choice"},
    "choice, no shared": {"gate": "choice", "num_shared_experts": 0},
    "sigmoid": {"gate": "sigmoid"},
    "choice, drop": {"gate": "choice", "init": "drop"},
    "choice, dense gradient": {"gate": "choice", "router_gradient": "dense"},
    "choice, centroids": {"gate": "choice", "router": "centroids"},
    "choice, random": {"gate": "choice", "router": "random"},
}


@dataclass(frozen=True)
class Split:
    """Images (I, 1, 8, 8), and the style, digit and label (I,) of each."""

    images: Tensor
    style: Tensor
    digit: Tensor
    label: Tensor


def task(seed: int) -> tuple[Split, Split]:
    """Return images to learn from and to test on: other handwritten digits, each in all styles."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x = torch.from_numpy(digits.images[order]).float()[:, None] / 16
    digit, ramp = torch.from_numpy(digits.target[order]), torch.linspace(0, 1, 8)
    styles = [x, 1 - x, (x > 0.4).float(), 0.3 + 0.4 * x, 0.5 * x + 0.5 * ramp, 0.5 * x + 0.5 * ramp[:, None]]
    labels = torch.from_numpy(np.stack([rng.permutation(DIGITS) for _ in range(STYLES)]))

    def part(at: slice) -> Split:
        style = torch.arange(STYLES).repeat_interleave(len(digit[at]))
        shown = digit[at].repeat(STYLES)
        return Split(torch.cat([each[at] for each in styles]), style, shown, labels[style, shown])

    cut = 3 * len(order) // 4
    return part(slice(cut)), part(slice(cut, None))


def parent(data: Split, seed: int, epochs: int = 12) -> nn.Module:
    """Return a ViT that was trained to tell the style and the digit of an image, but not its label."""
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": DIM, "depth": 2, "num_heads": 4, "mlp_ratio": WIDTH / DIM}
    model = VisionTransformer(in_chans=1, num_classes=STYLES + DIGITS, **sizes)

    def loss(logits: Tensor, at: Tensor) -> Tensor:
        style, digit = logits.split([STYLES, DIGITS], dim=1)
        return F.cross_entropy(style, data.style[at]) + F.cross_entropy(digit, data.digit[at])

    _train(model, data, loss, epochs, lr=3e-3)
    return model


def trained(
    dense: nn.Module, data: Split, config: vimoe.MoEConfig, seed: int, epochs: int = 12, lr: float = 3e-3
) -> nn.Module:
    """Return the upcycled parent, with its last FFN and a new classifier trained on the labels."""
    torch.manual_seed(seed)
    model: Any = copy.deepcopy(dense)
    model.reset_classifier(DIGITS)
    vimoe.upcycle(model, config, images=[(data.images, data.label)])
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("blocks.1.mlp.", "head.")))
    _train(model, data, lambda logits, at: F.cross_entropy(logits, data.label[at]), epochs, lr)
    return model


def _train(model: nn.Module, data: Split, loss: Callable[[Tensor, Tensor], Tensor], epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    steps = len(data.label) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(data.label))[: steps * BATCH].split(BATCH):
            with vimoe.record(model) as routings:
                total = loss(model(data.images[at]), at)
            if routings:
                total = total + 0.01 * vimoe.balance_loss(routings)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def measured(model: nn.Module, data: Split) -> dict[str, Any]:
    """Return accuracy, loss in nats, and of a mixture: what exchanged routes cost, gates, and what routes follow."""
    with vimoe.record(model) as routings:
        logits = model(data.images)
    found: dict[str, Any] = {
        "accuracy": float((logits.argmax(dim=1) == data.label).float().mean()),
        "loss": float(F.cross_entropy(logits, data.label)),
    }
    if routings:
        (routing,), (layer,) = routings, vimoe.analyze(model, [(data.images, data.label)], draws=2).layers
        assert layer.permuted is not None
        expert = routing.experts[:, 0]
        cost = layer.permuted.loss
        found["permuted"] = [cost.value, cost.low, cost.high]
        found["gate"] = float(routing.gates.mean())
        found["follows_style"] = float(adjusted_mutual_info_score(data.style, expert))
        found["follows_digit"] = float(adjusted_mutual_info_score(data.digit, expert))
    return found


def run(arm: str, seed: int, epochs: int = 12, lr: float = 3e-3, dense: nn.Module | None = None) -> dict[str, Any]:
    """Return what `measured` does, of one arm on one seed; the seed draws task, parent and training."""
    train, test = task(seed)
    config = vimoe.MoEConfig(**{"layers": "last:1", "num_experts": STYLES, **ARMS[arm]})
    return measured(trained(dense or parent(train, seed), train, config, seed, epochs, lr), test)


def main() -> None:
    """Train the arms that are asked for, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=12, help="number of epochs of each arm")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of each arm")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="arms to train")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    parents = [parent(task(seed)[0], seed) for seed in range(options.seeds)]
    results: dict[str, list[dict[str, Any]]] = {}
    print(f"{'arm':<24}{'accuracy':>10}{'loss':>8}{'permuted':>10}{'gate':>7}{'style':>7}{'digit':>7}")
    for arm in options.arms:
        runs = [run(arm, seed, options.epochs, options.lr, dense) for seed, dense in enumerate(parents)]
        results[arm] = runs
        cells = [
            f"{np.mean([each['accuracy'] for each in runs]):>10.1%}{np.mean([each['loss'] for each in runs]):>8.3f}"
        ]
        if "permuted" in runs[0]:
            cells.append(f"{np.mean([each['permuted'][0] for each in runs]):>+10.3f}")
            cells += [
                f"{np.mean([each[key] for each in runs]):>7.2f}" for key in ("gate", "follows_style", "follows_digit")
            ]
        print(f"{arm:<24}{''.join(cells)}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"epochs": options.epochs, "lr": options.lr, "arms": results}, indent=1))


if __name__ == "__main__":
    main()
