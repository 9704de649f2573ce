"""Experts in training, one FFN at the end (`train.fuse`): training for a better dense model at the dense model's cost.

Axes: B images, T tokens of an image, D channels, N experts, R rows that are partitioned (images or tokens), U tokens of
a row.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, SurgeryError
from vimoe.models.surgery import swap
from vimoe.moe import ffn, ffn_weights
from vimoe.moe.autocast import in_type_of_autocast
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.layer import MoE, moe_layers

logger = logging.getLogger(__name__)


class Fusing(nn.Module):
    """N experts in the place of an FFN, of which one FFN is left in the end: that of the weights sum_i a_i W_i.

    The shares a_i sum to 1 and do not depend on the input. In eval mode the layer computes the FFN that will be left,
    so validation scores the model that is saved. Mean weights of equal experts are theirs bit for bit: a layer of
    copies starts as the dense FFN. A kind is a subclass, and an entry in `FUSING`.

    Attributes:
        separates: True if training separates experts that start as copies.
        experts: the N experts.
        shares: (N,) the shares a_i.

    Args:
        layer: MoE layer without a shared expert, whose experts are taken. Its router is left.

    Raises:
        SurgeryError: if the experts have no weights of their own.
    """

    separates = False

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.config, self.experts, self.grid = layer.config, layer.experts, layer.grid
        n = self.config.num_experts
        if not self.experts.separate:
            raise SurgeryError(
                f"train.fuse with moe.experts={self.config.experts!r}: expected experts with weights of their own, "
                f"such as 'ffn'; leave moe.experts out"
            )
        # the FFN that is left is built from this copy; in a tuple, because it is no part of this layer
        self._template = (layer.merged(torch.full((n,), 1 / n, device="cpu")).to("meta"),)
        self.train(layer.training)

    @property
    def shares(self) -> Tensor:
        n = self.config.num_experts
        return torch.full((n,), 1 / n, dtype=torch.float64, device="cpu")

    def weights(self) -> Weights:
        """Return the canonical weights of the FFN that is left; gradient goes through."""
        parts = [self.experts.weights(e) for e in range(self.config.num_experts)]
        return ffn_weights.average(parts, self.shares.unbind())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), or from grid to grid, as of `MoE`."""
        return self.grid.placed(self.compute(self.grid.tokens(x)), x.shape)

    def compute(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.experts.apply_weights(self.weights(), x_BTD)

    def pull(self, rate: float) -> None:
        """Move the experts after an update of the weights; by default they stay."""

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """Return the FFN that is left."""
        return ffn.build(self._template[0], self.weights()).train(self.training)

    @torch.no_grad()
    def spread(self) -> float:
        """Return the distance of experts from the fused weights W, sqrt(sum_i a_i |W_i - W|^2) / |W|."""
        fused, squares = self.weights(), 0.0
        for e, share in enumerate(self.shares.tolist()):
            own = self.experts.weights(e)
            squares += share * sum(float((own[name] - w).double().square().sum()) for name, w in fused.items())
        return float((squares / sum(float(w.double().square().sum()) for w in fused.values())) ** 0.5)


class AveragedExperts(Fusing):
    """The kind "ewa", Experts Weights Averaging (Huang et al., arXiv 2308.06093): shares of 1/N.

    In training the rows of a batch are partitioned among the experts at random, in equal parts; each passes its expert
    alone, with the weight 1. After each update of the weights every expert moves towards their mean,
    W_i <- (1 - b) W_i + b mean_j W_j.

    The partition, the pull and the mean at the end are the paper's. Its rate b and the schedule of it could not be
    checked: here b rises linearly over the training from 0 to `train.fuse_rate`.
    """

    separates = True

    def compute(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): in training each row by a random expert."""
        if not self.training:
            return super().compute(x_BTD)
        x_BTD = in_type_of_autocast(x_BTD)
        x_RUD = x_BTD.flatten(0, 1)[:, None] if self.config.routing == "token" else x_BTD
        rows, n, device = len(x_RUD), self.config.num_experts, x_BTD.device
        source_R = torch.randperm(rows, device=device)
        # the rows that are left over go to experts that follow a random one, else the last experts would get fewer
        first = torch.randint(n, (1,), device=device)
        load_N = rows // n + ((torch.arange(n, device=device) - first) % n < rows % n).long()
        y_RUD = self.experts(x_RUD, source_R, load_N)
        return y_RUD.index_select(0, source_R.argsort()).view(x_BTD.shape)

    @torch.no_grad()
    def pull(self, rate: float) -> None:
        """Move every expert towards their mean, by this share of the way."""
        for stacked in self.experts.parameters():
            stacked.lerp_(stacked.mean(dim=0, keepdim=True), rate)


class FusedExperts(Fusing):
    """The kind "exfusion" (Ruan et al., ExFusion, arXiv 2603.27965): learnt shares, fused before each forward pass.

    The shares are a softmax of N learnt logits, one vector for the layer. An expert's gradient is a_i times that of the
    one FFN which computes, dL/dW_i = a_i dL/dW, and a logit's a_i <dL/dW, W_i - W>. So experts that start as copies
    stay copies, whose shares learn nothing: start them apart (`moe.init`).

    Of the paper only the abstract was at hand. The softmax, the equal shares at the start and that the shares have the
    rate and schedule of other weights are choices of this package.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__(layer)
        like = next(self.experts.parameters())
        self.logits = nn.Parameter(torch.zeros(self.config.num_experts, dtype=like.dtype, device=like.device))

    @property
    def shares(self) -> Tensor:
        return self.logits.softmax(dim=-1)


FUSING: dict[str, type[Fusing]] = {"ewa": AveragedExperts, "exfusion": FusedExperts}


def begin(model: nn.Module, config: TrainConfig) -> None:
    """Replace the MoE layers of a new model by the layers of `config.fuse`, in place; "none" changes nothing.

    Raises:
        SurgeryError: if experts cannot be fused; the model is as it was.
    """
    if config.fuse != "none":
        swap(model, {name: FUSING[config.fuse](layer) for name, layer in moe_layers(model).items()})


def check_begun(model: nn.Module, config: TrainConfig) -> None:
    """Raise ConfigError for a model that `begin` has not seen, whose training would fuse nothing."""
    if config.fuse != "none" and not _layers(model):
        raise ConfigError(
            f"train.fuse={config.fuse!r}: expected a model whose MoE layers vimoe.training.fuse.begin has replaced; "
            f"call it first"
        )


def warn_of_copies(model: nn.Module) -> None:
    """Log a warning if training a new model cannot separate the experts of a fusing layer, so that they are one FFN."""
    for name, layer in _layers(model).items():
        if not layer.separates and layer.spread() == 0:
            logger.warning(
                "the experts of %s start as copies and will stay copies, so this trains the dense model; start them "
                "apart, such as by moe.init=drop", name,
            )  # fmt: skip
            return


def pull(model: nn.Module, config: TrainConfig, done: float) -> None:
    """Move the experts of fusing layers after an update, `done` being the share 0..1 of the training that is over."""
    for layer in _layers(model).values():
        layer.pull(config.fuse_rate * done)


def fused(model: nn.Module) -> nn.Module:
    """Return a copy of the model with the FFNs that its fusing layers leave; without such layers the model itself."""
    if not _layers(model):
        return model
    model = copy.deepcopy(model)
    swap(model, {name: layer.dense() for name, layer in _layers(model).items()})
    return model


def facts(model: nn.Module) -> dict[str, Any]:
    """Return the entry "fused" of summary.json: shares and `Fusing.spread` of each layer; {} without such layers."""
    rows = {name: {"shares": layer.shares.tolist(), "spread": layer.spread()} for name, layer in _layers(model).items()}
    return {"fused": rows} if rows else {}


def _layers(model: nn.Module) -> dict[str, Fusing]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fusing)}
