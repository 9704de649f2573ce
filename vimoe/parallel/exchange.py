"""Expert parallelism: each process holds some experts of a layer, and computes them for the tokens of all.

Axes: N experts of the layer, E processes along `expert`, n = N / E experts of one of them. R rows that are routed
(images or tokens), U tokens of a row, D channels, S slots of this process in the order of their experts, G slots that
this process gets from all.

The exchange stands around `Experts.forward(x, source, load)` and keeps its contract: the router, the dispatch and the
combination see the S slots of this process alone, and a kind of experts sees G slots for n experts. Experts i n to
(i + 1) n - 1 are with process i along `expert`. With image routing a row is a whole image. No token is dropped, and
loads may be uneven or zero: a process that gets no slot computes with empty tensors, so all processes take part in
each exchange and every parameter gets a gradient.

Gradients. Let L_p be the loss of process p, of P. The backward passes of all processes together compute, on each
process, the derivative of sum_p L_p by what it holds of a parameter, because an exchange of gradients is the derivative
of an exchange of tokens. A training minimises the mean of the L_p: the loss of the global batch where each process has
an equal share of it. Its gradient is the sum of these derivatives over the processes that hold copies, divided by P. A
parameter that FSDP gathers from shards is a copy for the time of the pass.

- A parameter of no expert has copies on all P processes: FSDP's mean over them is the gradient.
- A parameter of an expert has copies on P / E processes, one of each E that are neighbours along `expert`: FSDP's mean
  over these, divided by E (`_own`), is the gradient.

The derivative by an expert's copy sums over the losses of the E processes that sent it tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vimoe.moe.experts import Experts
from vimoe.moe.shared_base import rows_of


class SpreadExperts(Experts):
    """Experts of which this process holds some: a base class, before the class of the kind of experts.

    `spread` makes experts such ones. Names and shapes of parameters stay as they were; a parameter with a row for each
    expert is a DTensor whose rows are with the processes along `expert`.

    Attributes:
        group: the E processes.
    """

    group: ProcessGroup

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D): send each slot to the process of its expert, and bring the output back."""
        sent_En = load_N.view(self.group.size(), -1)
        got_En = torch.empty_like(sent_En)
        dist.all_to_all_single(got_En, sent_En.contiguous(), group=self.group)
        sent, got = torch.stack([sent_En.sum(dim=1), got_En.sum(dim=1)]).tolist()  # one wait for the device
        x_GUD = exchange(rows_of(x_RUD, source_S), sent, got, self.group)
        # slots came by process, and by expert within a process: the order by expert is a stable sort
        expert_G = torch.arange(got_En.numel(), device=load_N.device).remainder(got_En.shape[1])
        order_G = expert_G.repeat_interleave(got_En.flatten(), output_size=len(x_GUD)).argsort(stable=True)
        alone = _Alone(self)
        y_GUD = torch.func.functional_call(alone, alone.held(), (x_GUD, order_G, got_En.sum(dim=0)))
        return exchange(torch.empty_like(y_GUD).index_copy(0, order_G, y_GUD), got, sent, self.group)


class _Alone(nn.Module):
    """The experts of this process by themselves: the forward of their kind, in which parameters can be replaced."""

    def __init__(self, experts: SpreadExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Any) -> Tensor:
        y: Tensor = super(SpreadExperts, self.experts).forward(*args)
        return y

    def held(self) -> dict[str, Tensor]:
        """Return what this process holds of each tensor of the experts, by its name in this module."""
        size, rank = self.experts.group.size(), self.experts.group.rank()
        held = {name: _own(p, size) for name, p in self.named_parameters()}
        buffers = ((f"experts.{name}", self.get_buffer(f"experts.{name}")) for name in self.experts.expert_buffers)
        return held | {name: buffer.chunk(size)[rank] for name, buffer in buffers}


def _own(parameter: Tensor, size: int) -> Tensor:
    """Return this process's experts of a stacked parameter; their gradient is divided by the number of processes."""
    assert isinstance(parameter, DTensor)
    own: Tensor = parameter.to_local()
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient / size)
    return own


def spread(experts: Experts, mesh: DeviceMesh) -> None:
    """Leave this process some of the experts, in place.

    Args:
        experts: experts with a parameter for each, whose number E divides, the same on all processes.
        mesh: the processes along `expert`.
    """
    for name, parameter in list(experts.named_parameters()):
        layer, _, part = name.rpartition(".")
        # every process has the whole, so nothing is sent
        shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(experts.get_submodule(layer), part, nn.Parameter(shard, requires_grad=parameter.requires_grad))
    kind: Any = type(experts)  # a class is hashable, which mypy does not see
    experts.__class__ = _spread_class(kind)
    assert isinstance(experts, SpreadExperts)
    experts.group = mesh.get_group()


@cache
def _spread_class(kind: type[Experts]) -> type[Experts]:
    return type(f"Spread{kind.__name__}", (SpreadExperts, kind), {})


def exchange(rows: Tensor, sent: list[int], got: list[int], group: ProcessGroup) -> Tensor:
    """Return the rows that the processes of a group send to this one, process by process; gradients go back.

    Args:
        rows: rows in the order of the processes that get them.
        sent: number of rows for each process.
        got: number of rows from each process.
        group: the processes.
    """
    result: Tensor = _Exchange.apply(rows, sent, got, group)
    return result


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows, whose derivative is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: ProcessGroup) -> Tensor:
        ctx.backward_arguments = got, sent, group
        result = rows.new_empty(sum(got), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), got, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradients[0], *ctx.backward_arguments), None, None, None
