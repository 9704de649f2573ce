"""Memory of a training step on one device, by arithmetic: the step itself runs, on tensors without values.

No formula of any architecture is here. A copy of the model in torch's `FakeTensorMode` takes a whole step (forward,
losses, backward, AdamW), in which every operator works out shapes and types and nothing else. A ledger notes the bytes
of each tensor when it is made and when it is freed. So the figures are those of a real step, kept tensors and
temporary ones alike, apart from what a kernel allocates inside itself. Fake tensors are on a CPU, whose attention keeps
as little as that of a GPU: no T x T matrix. An autocast casts alike on both.

ViT-g with 128 experts in half of its blocks takes no memory and some seconds.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.models.frozen_trunk import Cut, check_cut
from vimoe.models.interface import find_backbone, logits_of
from vimoe.models.precision import AUTOCAST
from vimoe.models.reading import ignoring_hooks
from vimoe.moe import record
from vimoe.moe.layer import moe_layers
from vimoe.moe.routing import recomputing
from vimoe.training.auxiliary_losses import auxiliary_losses
from vimoe.training.parameter_groups import adamw
from vimoe.training.stages import Moment, Phase, Stage, marked

KINDS = OTHER, DENSE, EXPERT = range(3)  # of tensors; the last two are gradients of weights, which devices divide


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights that are gathered together: those of a block, or of all that is outside of blocks.

    Attributes:
        name: module name of the block; "" for the rest.
        dense, expert: bytes of all weights but the routed experts', and of these.
        trained_dense, trained_expert: bytes of those that are trained, and so of their gradients.
        largest_expert: bytes of the largest gradient of a routed experts' weight, of all experts.
    """

    name: str
    dense: int = 0
    expert: int = 0
    trained_dense: int = 0
    trained_expert: int = 0
    largest_expert: int = 0


@dataclass(frozen=True)
class Exchange:
    """Tokens of one MoE layer that an all-to-all moves, once in each direction that is computed.

    Attributes:
        layer: module name.
        bytes: bytes of the tokens of all slots, which are the experts' inputs, and as many their outputs.
        times: number of all-to-alls in a step: 4, or fewer where no gradient goes back through the layer, and 2
            more in a checkpointed block.
    """

    layer: str
    bytes: int
    times: int


@dataclass(frozen=True)
class Footprint:
    """Memory of one device that trains alone, in bytes.

    Attributes:
        images: number of images of its batch.
        weights: weights of the model, by block.
        buffers: tensors of the model that are no weights.
        optimizer: state of AdamW for the dense weights and for the experts'.
        ema: True if there is a moving average, a second copy of weights and buffers.
        activations: tensors that are there between forward and backward pass, with the images.
        peak: the largest sum of all that a step makes, gradients of earlier steps included.
        temporary: bytes by which a step's tensors, gradients of weights apart, exceed the activations at their highest.
        stages: what a step makes that has no gradients of earlier ones, stage by stage.
        accumulates: True if there are such gradients.
        experts: number of experts of each MoE layer that sends tokens to experts; 1 for one that mixes them.
        exchanges: tokens that experts on other devices would get.
    """

    images: int
    weights: tuple[Weights, ...]
    buffers: int
    optimizer: tuple[int, int]
    ema: bool
    activations: int
    peak: int
    temporary: int
    stages: tuple[Stage, ...]
    accumulates: bool
    experts: tuple[int, ...]
    exchanges: tuple[Exchange, ...]

    def sum(self, of: str) -> int:
        """Return the sum over all blocks of an attribute of `Weights`."""
        return sum(getattr(each, of) for each in self.weights)


def footprint(model: nn.Module, images: int, config: TrainConfig, trained: Sequence[str] | None = None) -> Footprint:
    """Return the memory of a training step of image classification on one device; no memory is taken for it.

    Args:
        model: model to be trained, dense or with MoE layers, with or without weights, with `requires_grad` as it is
            trained and the switch of its library for activation checkpointing. It is left as it is.
        images: number of images of a step on this device.
        config: settings of the training; `precision` "auto" counts as "bf16", that of a GPU. With `accumulation` the
            step is one that adds to earlier gradients.
        trained: names of the modules inside blocks that are trained, if the features before them are cached
            (`data.cache: features`); None if the images are the input.

    Raises:
        ConfigError: if the shapes of the step depend on values, or there is nothing to cache.
    """
    mode = FakeTensorMode()
    fake = _fake(model, mode).train()
    exchanges: list[Exchange] = []
    try:
        with mode:
            forward, inputs = _forward(fake, images, trained)
            optimizer = adamw(fake, config)
            _begin(optimizer)
            labels = torch.zeros(images, dtype=torch.long)
            # ignoring_hooks, at which the last block would compute more tokens
            with _noted(fake, exchanges), _Ledger(fake) as ledger, marked(fake, ledger.mark), ignoring_hooks():
                rounds: list[tuple[Stage, ...]] = []
                for _ in range(min(config.accumulation, 2)):
                    ledger.begun.clear()
                    exchanges.clear()
                    ledger.mark("forward")
                    x = inputs()
                    loss = _loss(fake, lambda: forward(x), labels, config)  # noqa: B023
                    activations = ledger.live[OTHER]
                    ledger.mark("backward")
                    loss.backward()
                    rounds.append(ledger.stages)
                ledger.begun.clear()
                ledger.mark("update")
                optimizer.step()
            state = _state(fake, optimizer)
            moments = [moment for stage in (*rounds[-1], *ledger.stages) for moment in stage.moments]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"the memory of {type(model).__name__} cannot be counted, since sizes depend on values ({error}); use "
            f"another model, or another moe.router"
        ) from error
    return Footprint(
        images=images,
        weights=_weights(model),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        optimizer=state,
        ema=bool(config.ema_decay),
        activations=activations,
        peak=max(map(sum, moments)),
        temporary=max(0, max(moment[OTHER] for moment in moments) - activations),
        stages=(*rounds[0], *ledger.stages),
        accumulates=len(rounds) > 1,
        experts=tuple(1 if each.router.mixes else each.experts.num_experts for each in moe_layers(model).values()),
        exchanges=tuple(exchanges),
    )


class _Ledger(TorchDispatchMode):
    """Bytes of the tensors that operators make while it is entered, moment by moment.

    Attributes:
        live: bytes now, of each of the KINDS.
        begun: stages that have begun, each with `live` at its beginning and after each operator that made a tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live, self.begun = [0, 0, 0], list[tuple[Phase, str, bool, list[Moment]]]()
        self._entries = WeakIdKeyDictionary()  # of storages: their bytes, and their kind, which may change
        self._experts = _expert_weights(model)
        self._of_experts = {p.shape for p in model.parameters() if id(p) in self._experts and p.ndim > 2}
        layers = moe_layers(model).values()
        # routers that leave slots empty fill this share of them
        self._filled = min((layer.router.experts_per_token / layer.router.slots for layer in layers), default=1.0)
        for p in model.parameters():
            self._entries[p.untyped_storage()] = [0, OTHER]
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._accumulated)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # the one operator here whose size depends on values: filled slots
            mask = args[0]
            result = torch.empty(round(mask.numel() * self._filled), mask.ndim, dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        made = [self._note(each) for each in tree_iter(result) if isinstance(each, Tensor)]
        if any(made):
            self._note_moment()
        return result

    def mark(self, phase: Phase, block: str = "", experts: bool = False) -> None:
        """Begin a stage."""
        self.begun.append((phase, block, experts, []))
        self._note_moment()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that have begun."""
        return tuple(
            Stage(phase, block, experts, moments[0], _largest(moments)) for phase, block, experts, moments in self.begun
        )

    def _note_moment(self) -> None:
        other, dense, expert = self.live
        self.begun[-1][-1].append((other, dense, expert))

    def _note(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self._entries:
            return False
        kind = EXPERT if tensor.shape in self._of_experts else OTHER  # a gradient before it is complete
        entry = self._entries[storage] = [storage.nbytes(), kind]
        self.live[kind] += entry[0]
        weakref.finalize(storage, self._freed, entry).atexit = False
        return True

    def _freed(self, entry: list[int]) -> None:
        size, kind = entry
        self.live[kind] -= size

    def _accumulated(self, weight: Tensor) -> None:
        """Count the gradient of a weight, which is complete, as such."""
        assert weight.grad is not None
        entry = self._entries[weight.grad.untyped_storage()]
        kind = EXPERT if id(weight) in self._experts else DENSE
        if entry[1] != kind:
            self._freed(entry)
            entry[1] = kind
            self.live[kind] += entry[0]
            self._note_moment()


def _fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model on fake tensors."""
    memo: dict[int, Any] = {}
    with mode:
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo)


def _forward(
    model: nn.Module, images: int, trained: Sequence[str] | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]:
    """Return the forward pass, and a function that makes its inputs: images, or features before what is trained."""
    backbone = find_backbone(model)
    size, dtype = backbone.input_size, next(model.parameters()).dtype
    shape: tuple[int, ...] = (images, *size)
    forward: Callable[[Tensor], Tensor] = lambda x: logits_of(model, x)  # noqa: E731
    if trained is not None:
        cut = Cut(backbone.blocks, check_cut(model, trained), size)
        with torch.no_grad():
            shape = tuple(cut.trunk(model.eval(), torch.empty(shape, dtype=dtype)).shape)
        model.train()
        forward = lambda x: cut.rest(model, x)  # noqa: E731
    return forward, lambda: torch.empty(shape, dtype=dtype)


def _loss(model: nn.Module, forward: Callable[[], Tensor], labels: Tensor, config: TrainConfig) -> Tensor:
    """Return the loss of a step, as `vimoe.training.loop` computes it of outputs and routings."""
    dtype = AUTOCAST.get("bf16" if config.precision == "auto" else config.precision)
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with record(model, outputs=config.reads_outputs) as routings, autocast:
        logits = forward()
    return F.cross_entropy(logits.float(), labels) + auxiliary_losses(routings, config)[0]


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of an optimiser, as its first step does."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _noted(model: nn.Module, exchanges: list[Exchange]) -> Iterator[None]:
    """Note the tokens that each layer's experts get inside the `with` block."""
    sending = {name: layer for name, layer in moe_layers(model).items() if not layer.router.mixes}
    names: dict[nn.Module, str] = {layer.experts: name for name, layer in sending.items()}

    def note(experts: nn.Module, args: tuple[Tensor, ...], y_SUD: Tensor) -> None:
        times, name = 2 + y_SUD.requires_grad + args[0].requires_grad, names[experts]
        if recomputing():  # a checkpointed block: its forward pass was noted, and its tokens are exchanged once more
            at = max(i for i, each in enumerate(exchanges) if each.layer == name)
            exchanges[at] = replace(exchanges[at], times=2 + times)
        else:
            exchanges.append(Exchange(name, y_SUD.nbytes, times))

    hooks = [experts.register_forward_hook(note) for experts in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _largest(moments: list[Moment]) -> tuple[Moment, ...]:
    """Return the moments than which no other one has as much or more of every kind."""
    kept: list[Moment] = []
    for moment in sorted(set(moments), reverse=True):
        if not any(all(map(int.__ge__, other, moment)) for other in kept):
            kept.append(moment)
    return tuple(kept)


def _expert_weights(model: nn.Module) -> set[int]:
    """Return the identities of the weights that each expert has for itself."""
    return {
        id(layer.experts.get_parameter(name))
        for layer in moe_layers(model).values()
        for name, role in layer.experts.roles.items()
        if role.per_expert
    }


def _weights(model: nn.Module) -> tuple[Weights, ...]:
    """Return the bytes of a model's weights by block, the rest at the end."""
    backbone, experts = find_backbone(model), _expert_weights(model)
    found = {block: Weights(block) for block in (*backbone.blocks, "")}
    for name, p in model.named_parameters():
        block, trained = backbone.block_of(name) or "", p.nbytes * p.requires_grad
        of = found[block]
        if id(p) in experts:
            found[block] = replace(
                of,
                expert=of.expert + p.nbytes,
                trained_expert=of.trained_expert + trained,
                largest_expert=max(of.largest_expert, trained),
            )
        else:
            found[block] = replace(of, dense=of.dense + p.nbytes, trained_dense=of.trained_dense + trained)
    return tuple(found.values())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return the bytes of an optimiser's state for the dense weights, and for the experts'."""
    experts = _expert_weights(model)
    sums = [0, 0]
    for p, state in optimizer.state.items():
        sums[id(p) in experts] += sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    return sums[0], sums[1]
