"""Work of one process of a job, for the tests of `vimoe.parallel`, and the same work by one process alone.

Functions that processes run return plain tensors in the first process and None in the others, unless they say more.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.tiny import randomise, vit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import vimoe
from vimoe.config.moe import MoEConfig
from vimoe.config.parallel import ParallelConfig
from vimoe.parallel.gradients import by_mesh, clip_grad_norm_
from vimoe.parallel.mesh import make_mesh
from vimoe.parallel.parallelize import parallelize, whole

IMAGES = 8  # of a global batch
STEPS = 10


def model(settings: dict[str, Any]) -> nn.Module:
    """A ViT in float64 whose experts all differ; the same on every call."""
    torch.manual_seed(0)
    made = vimoe.upcycle(vit().double(), MoEConfig(**{"layers": "all", "num_experts": 4, **settings}))
    return randomise(made, seed=5, scale=0.3).train()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (IMAGES,), generator=generator)


def losses(made: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and the balance loss of these images."""
    with vimoe.record(made) as routings:
        logits = made(images)
    loss = nn.functional.cross_entropy(logits, labels)
    return loss + 0.1 * vimoe.balance_loss(routings) + 0.01 * vimoe.router_z_loss(routings)


def groups(made: nn.Module) -> list[dict[str, Any]]:
    """Two groups, in each of which are parameters of experts and others."""
    parameters = list(made.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(made: nn.Module) -> torch.optim.AdamW:
    # biases of keys have no gradient but for rounding, which AdamW's own eps (1e-8) would make a step of
    return torch.optim.AdamW(by_mesh(groups(made)), lr=0.01, eps=1e-5, fused=True)


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a parameter without a gradient"
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(made: nn.Module, shares: int, rank: int | None, clip: float = 0.5) -> dict[str, Any]:
    """Train `STEPS` steps, and return all that one process and several shall agree on.

    Args:
        shares: number of parts of the global batch, each with its own balance loss.
        rank: part that this process computes; None for all.
    """
    optimizer, seen = adamw(made), dict[str, Any]()
    for step in range(STEPS):
        optimizer.zero_grad()
        images, labels = (whole_batch.chunk(shares) for whole_batch in batch(step))
        parts = range(shares) if rank is None else [rank]
        loss = torch.stack([losses(made, images[i], labels[i]) for i in parts]).mean()
        loss.backward()
        if step == 0:
            seen["loss"] = loss.detach().clone()
            if rank is not None:
                dist.all_reduce(seen["loss"])
                seen["loss"] /= shares
            seen["gradients"] = {name: full(p.grad) for name, p in made.named_parameters()}
        norm = clip_grad_norm_(made.parameters(), clip)
        seen.setdefault("norms", []).append(norm.detach().clone())
        optimizer.step()
    names = {id(p): name for name, p in made.named_parameters()}
    seen["norms"] = torch.stack(seen["norms"])
    seen["weights"] = {name: full(p) for name, p in made.named_parameters()}
    seen["moments"] = {
        f"{names[id(p)]}.{kind}": full(state[kind])
        for p, state in optimizer.state.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return seen


def alone(settings: dict[str, Any], shares: int) -> dict[str, Any]:
    """One process that computes the global batch, in as many parts as there would be processes."""
    made = model(settings)
    seen = trained(made, shares, None)
    seen["logits"] = made.eval()(batch()[0]).detach()
    return seen


def together(settings: dict[str, Any], parallel: dict[str, int]) -> dict[str, Any] | None:
    """The processes of a mesh that each compute a part of the global batch."""
    made = model(settings)
    rank, count = dist.get_rank(), dist.get_world_size()
    if rank:  # the first process's weights hold
        randomise(made, seed=rank)
    with torch.no_grad():
        made.head.weight.data = made.head.weight.T.contiguous().T  # a layout that no collective takes
    made = parallelize(made, make_mesh(ParallelConfig(**parallel)))
    seen = trained(made, count, rank)
    with torch.no_grad():
        logits = [torch.empty(IMAGES // count, 5, dtype=torch.float64) for _ in range(count)]
        dist.all_gather(logits, made.eval()(batch()[0].chunk(count)[rank]))
    plain = whole(made)
    if plain is None:
        return None
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        again = vimoe.load(vimoe.save(plain.eval(), Path(folder) / "model"))(batch()[0])
    return {**seen, "logits": torch.cat(logits), "logits of the model folder": again}
