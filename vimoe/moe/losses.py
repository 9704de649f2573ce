"""Losses of routers and experts: pure functions of the recorded `Routing`s, in float32.

Axes: R rows, N experts, K slots of a row, U tokens of a row, D channels. Each loss is averaged over the records. Rows
are images with image routing, and tokens with token routing.

Where several processes share a batch and average their gradients, as DistributedDataParallel does, losses that are
means over the rows need nothing more. Losses of a mean over the rows are other ones over a part of the rows; with
`over` they are those of the whole batch, value and gradient (`vimoe.process.Process.mean`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vimoe.errors import VimoeError, expect
from vimoe.moe.routing import Routing
from vimoe.process import Process


def balance_loss(routings: Sequence[Routing], over: Process | None = None) -> Tensor:
    """N x sum_i f_i P_i: f_i the share of rows sent to expert i, P_i its mean probability over all rows.

    Fedus et al., Switch Transformers (arXiv 2101.03961), eq. 4 to 6, in the form for any k: f sums to k, or to the mean
    number of experts of a row where that varies. The loss is that number if all experts are used alike. The gradient
    flows through P alone.

    Args:
        routings: decisions of a batch.
        over: processes that have equal shares of the batch; by default this one has all of it.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.01 * vimoe.balance_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, lambda routing: _balance(routing, over))


def router_z_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean squared log-sum-exp of the logits: Zoph et al., ST-MoE (arXiv 2202.08906), eq. 5.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.001 * vimoe.router_z_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, lambda routing: routing.logits.logsumexp(dim=-1).square().mean())


def importance_loss(routings: Sequence[Routing], over: Process | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' summed probabilities over the batch.

    Riquelme et al., V-MoE (arXiv 2106.05974), appendix A.2, without its noise. Arguments as of `balance_loss`.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.01 * vimoe.importance_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, lambda routing: _importance(routing, over))


def entropy_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean over the rows of -sum_i p_i log p_i, in nats: 0 for certain routers, log N for undecided ones.

    TGR-MoE (arXiv 2604.21330) has it with a weight of 0.005. It makes each row's choice more confident, and so raises
    the gates that are probabilities; the balance loss keeps it from sending all rows to one expert.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.005 * vimoe.entropy_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, _entropy)


def variance_loss(routings: Sequence[Routing], over: Process | None = None) -> Tensor:
    """-1/(R N) sum_ri (p_ri - mean_r p_ri)^2: minus the variance over the rows of each expert's probability.

    The loss L_v of arXiv 2505.22323, there a sum over the rows. It is between -(N - 1)/N^2, where every expert has
    rows of its own, and 0, where all rows have the same probabilities. Arguments as of `balance_loss`.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.01 * vimoe.variance_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, lambda routing: _variance(routing, over))


def orthogonal_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean over the tokens of sum_{j != k} <y_j, y_k>^2 / (<y_k, y_k> + 1e-6), y_k the outputs of a token's experts.

    The loss L_o of arXiv 2505.22323, there a sum over the tokens: the squared length of the projection of each output
    on each other one. Experts that begin as copies overlap entirely, so it is large at the start. It trains the experts
    and all before them, not the router.

    Raises:
        VimoeError: if outputs were not recorded, or a token has one expert, whose output has none to be orthogonal to.

    >>> import timm, torch, vimoe
    >>> config = vimoe.MoEConfig(layers="last:1", num_experts=4, top_k=2)
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), config)
    >>> with vimoe.record(model, outputs=True) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.001 * vimoe.orthogonal_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, _orthogonal)


def mutual_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean over the tokens of sum_kd (y_kd - m_d)^2 / (K D), y_k the outputs of a token's K experts and m their mean.

    Mutual distillation after MoDE (arXiv 2402.00893): each expert learns from the others that got the same token. The
    paper's formula could not be checked. The gradient goes through the mean too. A token with one expert counts 0.

    Raises:
        VimoeError: if outputs were not recorded, or no token has more than one expert, so that there is no other.

    >>> import timm, torch, vimoe
    >>> config = vimoe.MoEConfig(layers="last:1", num_experts=4, top_k=2)
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), config)
    >>> with vimoe.record(model, outputs=True) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.1 * vimoe.mutual_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, _mutual)


def distill_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean of sum_c t_c (log t_c - log s_c): Kullback-Leibler divergence of a model's classes from its teacher's.

    The expert-ensemble self-distillation of arXiv 2604.13508: the teacher is a moving average of the model, which runs
    all experts (`vimoe.all_experts`). The teacher gets no gradient.

    Args:
        logits: (B, C, ...) scores of C classes; further axes are pixels.
        teacher: (B, C, ...) the teacher's.

    >>> import copy, timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> average, images = copy.deepcopy(model).eval(), torch.randn(2, 3, 160, 160)
    >>> with torch.no_grad(), vimoe.all_experts(average):
    ...     teacher = average(images)
    >>> vimoe.distill_loss(model(images), teacher).backward()
    """
    ours, theirs = (scores.to(_precise(scores)).log_softmax(dim=1) for scores in (logits, teacher.detach()))
    return (theirs.exp() * (theirs - ours)).sum(dim=1).mean()


def _entropy(routing: Routing) -> Tensor:
    log_p_RN = routing.logits.log_softmax(dim=-1)  # of a probability that has rounded to 0, too, it has a gradient
    return -(log_p_RN.exp() * log_p_RN).sum(dim=-1).mean()


def _outputs(routing: Routing, loss: str) -> Tensor:
    """Return (R, U, K, D) the recorded outputs, float32 at least. Raises VimoeError if a loss lacks them."""
    slots, outputs = routing.experts.shape[1], routing.outputs
    if slots < 2:
        raise VimoeError(f"{loss} of {slots} expert of each token: expected at least 2; set moe.top_k=2")
    if outputs is None:
        raise VimoeError(
            "the outputs of the experts were not recorded: expected vimoe.record(model, outputs=True), and a router "
            "that sends tokens to experts"
        )
    return outputs.to(_precise(outputs)).transpose(1, 2)


def _mutual(routing: Routing) -> Tensor:
    y_RUKD = _outputs(routing, "mutual_loss")
    filled_R1K1 = (routing.experts >= 0).to(y_RUKD.dtype)[:, None, :, None]
    number_R111 = filled_R1K1.sum(dim=2, keepdim=True).clamp(min=1)
    mean_RU1D = y_RUKD.sum(dim=2, keepdim=True) / number_R111  # an empty slot has the output 0
    return ((y_RUKD - mean_RU1D).square() * filled_R1K1 / number_R111).sum(dim=2).mean()


def _orthogonal(routing: Routing) -> Tensor:
    y_RUKD = _outputs(routing, "orthogonal_loss")
    products_RUKK = y_RUKD @ y_RUKD.mT
    lengths_RUK = products_RUKK.diagonal(dim1=-2, dim2=-1)
    others = ~torch.eye(y_RUKD.shape[2], dtype=torch.bool, device=y_RUKD.device)
    return (others * products_RUKK.square() / (lengths_RUK[..., None, :] + 1e-6)).sum(dim=(-2, -1)).mean()


def _precise(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _balance(routing: Routing, over: Process | None) -> Tensor:
    p_N = routing.probabilities.mean(dim=0)
    f_N = routing.load.to(p_N.dtype) / len(routing.logits)
    if over is not None:
        f_N, p_N = over.mean(torch.stack([f_N, p_N]))
    return routing.num_experts * (f_N * p_N).sum()


def _importance(routing: Routing, over: Process | None) -> Tensor:
    importance_N = routing.probabilities.sum(dim=0)
    if over is not None:
        importance_N = over.mean(importance_N)
    return importance_N.var(correction=0) / importance_N.mean().square()


def _variance(routing: Routing, over: Process | None) -> Tensor:
    p_RN = routing.probabilities
    if over is None:
        return -p_RN.var(dim=0, correction=0).mean()
    center_N = over.mean(p_RN.mean(dim=0)).detach()  # the sum of squares is least there, so it has no gradient by it
    return -over.mean((p_RN - center_N).square().mean())


def _mean(routings: Sequence[Routing], loss: Callable[[Routing], Tensor]) -> Tensor:
    """Return the mean over the layers; that of a layer with pools is the mean over them, as if each were a layer."""
    expect("routings", routings, Sequence, "give the list of vimoe.record()")
    if not routings:
        raise VimoeError("no routing was recorded: run a model with MoE layers inside vimoe.record() first")
    for each in routings:
        expect("a routing", each, Routing, "give the list of vimoe.record()")
    return torch.stack([torch.stack([loss(part) for part in each.by_pool]).mean() for each in routings]).mean()
