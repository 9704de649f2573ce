"""Health of routers and experts: figures of each epoch, and alarms with a remedy.

MoE training can fail without an error: an expert gets nothing, a router sends everything to one expert, a loss never
reaches the router. Sums stay on the device until the end of an epoch, so that no step waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vimoe.moe import MoE, Routing
from vimoe.parallel.gradients import total_norm
from vimoe.process import Process

CONFIDENT = 0.99  # mean probability of a router's first choice; above it, its gradient nearly vanishes
COLLAPSED = 1.25  # times k: number of experts in effect, at or below which the load has collapsed


class Health:
    """Sums over the steps of an epoch, by layer."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def add(self, routings: list[Routing]) -> None:
        """Add the routings of a step."""
        for routing in routings:
            probabilities = routing.probabilities
            self._add(
                routing.layer,
                load=routing.load,
                units=torch.tensor(len(routing.logits)),
                entropy=-torch.xlogy(probabilities, probabilities).sum(),
                confidence=probabilities.amax(dim=-1).sum(),
                squares=torch.stack([part.logits.square().mean(dim=-1).sum() for part in routing.by_pool]).sum(),
                margins=torch.stack([margins(part).sum() for part in routing.by_pool]).sum(),
            )

    @torch.no_grad()
    def add_gradients(self, layers: Mapping[str, MoE]) -> None:
        """Add the gradients of a step, before they are clipped; those that overflowed in float16 are passed by."""
        for name, layer in layers.items():
            router, experts = (total_norm(part.parameters()) for part in (layer.router, layer.experts))
            finite = router.isfinite() & experts.isfinite()
            self._add(
                name,
                steps=finite.long(),
                router_steps=finite.long() * any(p.requires_grad for p in layer.router.parameters()),
                router_gradient=router.where(finite, 0),
                expert_gradient=experts.where(finite, 0),
            )

    def over(self, process: Process) -> Health:
        """Return the sums over all processes."""
        health = Health()
        health.sums = {layer: {k: process.sum(v) for k, v in sums.items()} for layer, sums in self.sums.items()}
        return health

    def clear(self) -> None:
        """Set all sums to 0."""
        self.sums = {layer: {name: 0 * value for name, value in sums.items()} for layer, sums in self.sums.items()}

    def _add(self, layer: str, **values: Tensor) -> None:
        sums = self.sums.setdefault(layer, {})
        for name, value in values.items():
            sums[name] = sums[name].to(value.device) + value if name in sums else value  # a checkpoint's are on the CPU

    def shares(self) -> dict[str, list[float]]:
        """Return the share of all decisions that each expert got, by layer; 0 where there were none."""
        return {layer: (s["load"] / s["load"].sum().clamp(min=1)).tolist() for layer, s in self.sums.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer: means over the epoch.

        effective_experts is exp(entropy of the load), and busiest the largest share. router_entropy is in nats: 0 is
        certain, log N undecided. router_confidence is the probability of the first choice, and logit_rms the size of
        the router's scores. router_margin is the gap between the scores of the last chosen expert and the next one.
        router_gradient and expert_gradient are norms, as means over steps.
        """
        rows = []
        for (layer, sums), shares in zip(self.sums.items(), self.shares().values(), strict=True):
            units = int(sums["units"])
            steps = max(int(sums.get("steps", torch.tensor(0))), 1)
            zero = torch.tensor(0.0)
            rows.append({
                "layer": layer,
                "effective_experts": math.exp(-sum(s * math.log(s) for s in shares if s > 0)),
                "busiest": max(shares),
                "router_entropy": float(sums["entropy"]) / units,
                "router_confidence": float(sums["confidence"]) / units,
                "logit_rms": math.sqrt(float(sums["squares"]) / units),
                "router_margin": float(sums.get("margins", zero)) / units,
                "router_gradient": float(sums.get("router_gradient", zero)) / steps,
                "expert_gradient": float(sums.get("expert_gradient", zero)) / steps,
            })  # fmt: skip
        return rows

    def alarms(self, layers: Mapping[str, MoE], stopped: Collection[str] = ()) -> list[str]:
        """Return a message with a remedy for each fault; none for a healthy layer, and none for one that is frozen.

        Args:
            layers: MoE layers by name.
            stopped: names of those whose routers learnt until now, and change no more (`train.router_freeze_epochs`).
        """
        found = []
        for row, shares in zip(self.rows(), self.shares().values(), strict=True):
            name, config = row["layer"], layers[row["layer"]].config
            sums, router = self.sums[name], layers[name].router
            if "steps" not in sums:  # nothing of it is trained, so no remedy would change it
                continue
            learns = any(p.requires_grad for p in router.routes)
            balance = ["train.balance_loss"] * (learns and not router.even)
            balance += ["moe.bias_update_rate"] * (router.adjustable and name not in stopped)
            more = [f"raise {' or '.join(balance)}"] if balance else []
            more += ["let its router learn longer (train.router_freeze_epochs or _margin)"] * (name in stopped)
            k = max(1.0, float(sums["load"].sum() / sums["units"]))  # experts of a row, in the mean if that varies
            warmup = ["set train.router_warmup_epochs=1"] * (learns and router.adjustable)
            idle = [str(expert) for expert, share in enumerate(shares) if share == 0]
            used = row["effective_experts"]
            if any(shares) and used < COLLAPSED * k and config.num_experts > 2 * k:
                found.append(
                    f"{name} has collapsed: in effect {used:.2f} of its {config.num_experts} experts get everything; "
                    + _either(*more, "lower train.router_lr_scale" if learns else "use another router")
                )
            elif idle:
                found.append(
                    f"{name}: expert{'s' * (len(idle) > 1)} {', '.join(idle)} got nothing; "
                    + _either(*more, *warmup, "use fewer experts")
                )
            sure = row["router_confidence"]
            if sure > CONFIDENT and max(config.pools) > 1 and learns:
                found.append(
                    f"{name}: the router is saturated, its first choice has probability {sure:.4f} and its scores have "
                    f"size {row['logit_rms']:.1f}; set train.z_loss=0.001, or lower train.router_lr_scale"
                )
            if sums.get("router_steps") and row["router_gradient"] == 0 and not router.blind:
                found.append(f"{name}: the router got no gradient; check that the losses reach it")
        return found


def margins(routing: Routing) -> Tensor:
    """Return (R,) the gap between the k-th and the next largest score of each row; 0 where all experts are chosen."""
    k = routing.experts.shape[1]
    if k >= routing.num_experts:
        return routing.logits.new_zeros(len(routing.logits))
    best = routing.logits.topk(k + 1, dim=-1).values
    return best[:, k - 1] - best[:, k]


def _either(*remedies: str) -> str:
    """Return remedies as "a", "a, or b" or "a, b, or c"."""
    return ", ".join([*remedies[:-1], f"or {remedies[-1]}" if len(remedies) > 1 else remedies[-1]])
