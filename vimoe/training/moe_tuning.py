"""MoE-Tuning (MoE-LLaVA, arXiv 2401.15947): a LLaVA of transformers is trained in stages, the last one as a mixture.

Axes: B texts, T tokens of a text, R rows that are routed (B * T tokens), N experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.config.checks import bounded, check_count, check_fields
from vimoe.config.layers import Layers
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TRAINED
from vimoe.data.order import mix, seed_everything
from vimoe.errors import ConfigError, FolderError, VimoeError
from vimoe.models.upcycling import upcycle
from vimoe.moe.balancing import update_bias
from vimoe.moe.layer import moe_layers
from vimoe.moe.losses import balance_loss
from vimoe.moe.routing import Routing, record
from vimoe.training import checkpoint
from vimoe.training.parameter_groups import freeze_all_but, trained_modules

Batch = Callable[[int, int], Mapping[str, Tensor]]
PROJECTOR, LANGUAGE_MODEL = "model.multi_modal_projector", "model.language_model"
PARTS = {"projector": (PROJECTOR,), "language_model": (PROJECTOR, LANGUAGE_MODEL, "lm_head")}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: AdamW without weight decay, whose rate rises over the first 3% of the steps, then falls as a cosine.

    Gradients are clipped to a norm of 1.

    Args:
        part: what is trained, and nothing else: "projector"; "language_model" for it and the projector; "experts" for
            routed experts and routers; or any other value of `train.train_only`, such as "every:2" for these FFNs.
        steps: number of batches.
        lr: peak rate.

    Raises:
        ConfigError: if a value is not one of these.
    """

    part: str
    steps: int = bounded(1000, 1)
    lr: float = bounded(2e-5, 0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.part not in PARTS:
            Layers.parse(self.part, "part", (*PARTS, *TRAINED))


def train_only(model: nn.Module, part: str) -> None:
    """Leave only the part of a stage to be trained (`Stage.part`)."""
    modules = PARTS.get(part) or trained_modules(model, Layers.parse(part, "part", TRAINED))
    if modules is None:
        model.requires_grad_(True)
    else:
        freeze_all_but(model, modules)


def moe_tune(
    model: nn.Module, stages: Sequence[Stage], batch: Batch, out: str | Path, config: MoEConfig | None = None,
    balance: float = 0.01, seed: int = 0, save_every: int = 100,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a LLaVA stage by stage, in place. The first stage of experts upcycles the FFNs as they then are.

    The loss is the model's own, the cross-entropy of the words whose label is not -100, plus `balance` times
    `vimoe.balance_loss` of the tokens that are no padding (`attention_mask`), which `moe.bias_update_rate` follows too
    where experts are trained. A step depends on the seed, its stage and its number alone. So a training that was killed
    goes on from its last checkpoint in `out` to the weights that it would have reached, bit for bit on the same
    machine. It has to be called with the same arguments and the same new model.

    Args:
        model: a `LlavaForConditionalGeneration`, dense, on its device.
        stages: parts of the model that are trained, one after the other.
        batch: function of the numbers of stage and step, from 0; it returns arguments of the model's forward with
            `labels`, the same on every call.
        out: folder for the checkpoint; it is made.
        config: blocks and kind of layer for a stage of "experts" or "moe"; `routing="token"`.
        balance: weight of the balance loss.
        seed: seed of dropout, new routers and anything else that is drawn.
        save_every: number of steps between checkpoints; one is written at the end of each stage too.

    Returns:
        A row for each checkpoint: stage, step, mean loss of the words and mean balance loss since the row before.

    Raises:
        ConfigError: if a stage needs experts and there is no config, or the model has MoE layers already, or save_every
            is below 1.
        FolderError: if the folder holds a training with other settings, or its checkpoint cannot be read.
        VimoeError: if the loss is not finite; the last checkpoint is from before.
    """
    out = Path(out)
    check_count("save_every", save_every, 1)
    if moe_layers(model):
        raise ConfigError("the model has MoE layers already: expected a dense one, which a stage upcycles; densify it")
    made_in = next((i for i, stage in enumerate(stages) if stage.part in ("experts", "moe")), len(stages))
    if made_in < len(stages) and config is None:
        raise ConfigError(f"a stage of {stages[made_in].part!r} without config: expected a MoEConfig; pass one")
    layers = None if config is None else config.to_dict()
    settings = {"stages": [asdict(stage) for stage in stages], "moe": layers, "balance": balance, "seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    stored = checkpoint.read(out)
    if stored is not None and stored["settings"] != settings:
        raise FolderError(f"{out} holds a training with other settings: expected the same to go on; name another out")
    first, rows = (stored["stage"], stored["rows"]) if stored else (0, [])
    for number in range(first, len(stages)):
        if number >= made_in and config is not None and not moe_layers(model):
            seed_everything(mix(seed, number))
            upcycle(model, config)
        stage = stages[number]
        train_only(model, stage.part)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
        step = 0
        if stored is not None:
            model.load_state_dict(stored["model"])
            optimizer.load_state_dict(stored["optimizer"])
            step, stored = stored["step"], None
        while step < stage.steps:
            end = min(stage.steps, step - step % save_every + save_every)
            losses = [_step(model, optimizer, stage, batch, balance, (seed, number, n)) for n in range(step, end)]
            words, even = torch.stack(losses).mean(dim=0).tolist()
            if not math.isfinite(words):
                raise VimoeError(f"the loss is {words} before step {end} of stage {stage.part!r}: lower its lr")
            step = end
            rows.append({"stage": stage.part, "step": step, "loss": words, "balance": even})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
            checkpoint.write(out, {"settings": settings, "stage": number, "step": step, **state})
    model.eval()
    return rows


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, batch: Batch, balance: float,
    at: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """Make one step, the one of (seed, stage, step), and return (2,) the loss of the words and the balance loss."""
    _, number, step = at
    seed_everything(mix(*at))
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch(number, step).items()}
    with record(model) as routings:
        words: Tensor = model.train()(**inputs).loss
    if (mask := inputs.get("attention_mask")) is not None:  # padding has no say in how even the loads are
        routings = [routing.of_rows(mask.flatten().nonzero()[:, 0]) for routing in routings]
    even = balance_loss(routings) if routings else words.new_zeros(())
    (words + balance * even).backward()
    nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = _rate(stage, step)
    optimizer.step()
    optimizer.zero_grad()
    learning = {name for name, layer in moe_layers(model).items() if any(p.requires_grad for p in layer.parameters())}
    update_bias(model, [routing.detach() for routing in routings if routing.layer in learning])
    return torch.stack([words.detach(), even.detach()])


def _rate(stage: Stage, step: int) -> float:
    """Return the rate of a step, from 0: linear up to the peak over 3% of the steps, then a cosine to almost 0."""
    rise = math.ceil(0.03 * stage.steps)
    if step < rise:
        return stage.lr * (step + 1) / rise
    return stage.lr * (1 + math.cos(math.pi * (step - rise + 1) / (stage.steps - rise + 1))) / 2


def token_loads(
    routings: Sequence[Routing], input_ids: Tensor, image_token_id: int, attention_mask: Tensor | None = None
) -> dict[str, dict[str, Tensor]]:
    """Return how many tokens of images and of words each expert got: {layer: {"image": (N,), "text": (N,)}}.

    Args:
        routings: decisions of one forward with token routing, such as `vimoe.record` collects them.
        input_ids: (B, T) words of that forward; `image_token_id` at the places of an image's tokens.
        image_token_id: `model.config.image_token_id`.
        attention_mask: (B, T), 0 for padding, which is not counted; by default nothing is padding.

    Raises:
        VimoeError: if a routing is of other tokens than these.
    """
    image_R = (input_ids == image_token_id).flatten()
    real_R = torch.ones_like(image_R) if attention_mask is None else attention_mask.bool().flatten()
    found = {}
    for routing in routings:
        if len(routing.experts) != len(image_R):
            raise VimoeError(
                f"{routing.layer} routed {len(routing.experts)} rows: expected one for each of {len(image_R)} tokens; "
                f"give the input_ids of the recorded forward, and a model with routing='token'"
            )
        kinds = {"image": real_R & image_R, "text": real_R & ~image_R}
        found[routing.layer] = {kind: routing.chosen[rows].sum(dim=0) for kind, rows in kinds.items()}
    return found
