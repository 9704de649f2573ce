"""A task made so that routing must help: digits in six styles, and each style asks another question about the digit.

What an image shows is six numbers, the first principal components of its handwritten digit. Its label is the largest of
six random linear functions of them, which every style has anew: so the labels of the styles disagree. A small ViT that
knows the style and the six numbers is frozen, but for one narrow FFN and the classifier. The FFN is wide enough for the
functions of one style, and not for those of six; an expert needs one style alone.

    python studies/styles.py --seeds 3 --out styles.json

trains each arm on each seed (seconds each), and prints its accuracy and loss on test, what it costs to exchange the
routes of images, and how far the routes follow styles and labels.
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
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_mutual_info_score
from timm.models import VisionTransformer
from torch import Tensor, nn

import vimoe

STYLES, SHOWN, LABELS = 6, 6, 6  # styles, numbers that an image shows, and classes
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
    """Images (I, 1, 8, 8), the style (I,) of each, the numbers (I, SHOWN) that it shows, and its label (I,)."""

    images: Tensor
    style: Tensor
    shown: Tensor
    label: Tensor


def task(seed: int) -> tuple[Split, Split]:
    """Return images to learn from and to test on: other handwritten digits, each in all styles."""
    rng = np.random.default_rng(seed)
    digits = load_digits().images[rng.permutation(1797)] / 16
    shown = torch.from_numpy(PCA(SHOWN, whiten=True, random_state=0).fit_transform(digits.reshape(1797, -1))).float()
    x, ramp = torch.from_numpy(digits).float()[:, None], torch.linspace(0, 1, 8)
    gradients = [0.5 * x + 0.5 * each for each in (ramp, ramp[:, None], ramp.flip(0))]
    styles = [x, 1 - x, *gradients, 0.3 + 0.4 * x]
    functions = torch.from_numpy(rng.normal(size=(STYLES, LABELS, SHOWN))).float()
    cut = 3 * len(x) // 4

    def part(at: slice) -> Split:
        style, numbers = torch.arange(STYLES).repeat_interleave(len(x[at])), shown[at].repeat(STYLES, 1)
        label = torch.einsum("icp,ip->ic", functions[style], numbers).argmax(dim=1)
        return Split(torch.cat([each[at] for each in styles]), style, numbers, label)

    return part(slice(cut)), part(slice(cut, None))


def parent(data: Split, seed: int, epochs: int = 12) -> nn.Module:
    """Return a ViT that was trained to tell the style and the numbers of an image, but not its label."""
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": DIM, "depth": 2, "num_heads": 4, "mlp_ratio": WIDTH / DIM}
    model = VisionTransformer(in_chans=1, num_classes=STYLES + SHOWN, **sizes)

    def loss(outputs: Tensor, at: Tensor) -> Tensor:
        style, numbers = outputs.split([STYLES, SHOWN], dim=1)
        return F.cross_entropy(style, data.style[at]) + F.mse_loss(numbers, data.shown[at])

    _train(model, data, loss, epochs, lr=3e-3)
    return model


def trained(
    dense: nn.Module, data: Split, config: vimoe.MoEConfig, seed: int, epochs: int = 12, lr: float = 3e-3
) -> nn.Module:
    """Return the upcycled parent, with its last FFN and a new classifier trained on the labels."""
    torch.manual_seed(seed)
    model: Any = copy.deepcopy(dense)
    model.reset_classifier(LABELS)
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
    """Return accuracy and loss in nats; of a mixture also gates, what exchanged routes cost, and what routes follow.

    The last is the adjusted mutual information.
    """
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
        found["follows_label"] = float(adjusted_mutual_info_score(data.label, expert))
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
    print(f"{'arm':<24}{'accuracy':>10}{'loss':>8}{'permuted':>10}{'gate':>7}{'style':>7}{'label':>7}")
    for arm in options.arms:
        runs = [run(arm, seed, options.epochs, options.lr, dense) for seed, dense in enumerate(parents)]
        results[arm] = runs
        mean = {key: np.mean([each[key] for each in runs]) for key in runs[0] if key != "permuted"}
        cells = f"{mean['accuracy']:>10.1%}{mean['loss']:>8.3f}"
        if "permuted" in runs[0]:
            cost = np.mean([each["permuted"][0] for each in runs])
            cells += f"{cost:>+10.3f}{mean['gate']:>7.2f}{mean['follows_style']:>7.2f}{mean['follows_label']:>7.2f}"
        print(f"{arm:<24}{cells}", flush=True)
    if options.out:
        text = json.dumps({"epochs": options.epochs, "lr": options.lr, "arms": results}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
