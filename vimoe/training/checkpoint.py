"""State of a training on disk, so that a killed one goes on to the very weights it would have reached.

A step depends on the seed, the epoch and its number alone, and an image's augmentation on the seed, the epoch and the
image (see `vimoe.data.order.Shuffled`). So no state of a random generator is stored, and no worker process has one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vimoe.config.settings import Settings, flat
from vimoe.errors import FolderError, first_line
from vimoe.files import TEMPORARY, discard, discard_file, in_units, written_whole
from vimoe.parallel.checkpoint import load_checkpoint
from vimoe.process import Process
from vimoe.run_folder import CHECKPOINT

FORMAT = 3
MAY_DIFFER = frozenset({"data.path", "data.workers", "train.checkpoint_minutes", "train.tensorboard", "train.parallel"})
SHARDS = "shards"  # entry of a checkpoint, and start of the name, of the folder with a parallel model and its optimiser


def write(run: Path, state: dict[str, Any]) -> None:
    """Write the last checkpoint of a run; the one before stays until this one is whole.

    Args:
        run: the run folder.
        state: content of the checkpoint: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        FolderError: if it cannot be written; the checkpoint before is as it was.
    """
    path = run / CHECKPOINT
    path.parent.mkdir(exist_ok=True)
    try:
        with written_whole(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except RuntimeError as error:  # torch's zip writer, where the disk is full
        raise FolderError(f"{path} could not be written; make room, and resume the run") from error
    _forget_shards(run, but=state.get(SHARDS))


def read(run: Path, mapped: bool = False) -> dict[str, Any] | None:
    """Return the last checkpoint, or None where there is none. Nothing is unpickled but tensors and plain values.

    Args:
        run: the run folder.
        mapped: True to map the tensors from the file, for a caller that does not keep them.

    Raises:
        FolderError: if it is damaged, or from another version.
    """
    path = run / CHECKPOINT
    if not exists(run):
        return None
    if not path.stat().st_size:
        raise FolderError(f"{path} cannot be read: the file is empty; train again in another folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged file makes of the reader
        raise FolderError(f"{path} cannot be read: {first_line(error)}; train again in another folder") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FolderError(f"{path} is not a checkpoint of format {FORMAT}: expected one of this version; train again")
    return state


def check_shared(run: Path, seen: bool, process: Process) -> None:
    """Raise FolderError in all processes if some of them see no checkpoint in the run folder, and others do.

    All processes call it, before what they do together for the one that they see.
    """
    if process.any(seen) and process.any(not seen):
        raise FolderError(
            f"{run} has a checkpoint that not all processes see: expected a folder that all share; give one on a "
            f"shared disk"
        )


def exists(run: Path) -> bool:
    """Return True if a run has a checkpoint to go on from."""
    return (run / CHECKPOINT).exists()


def remove(run: Path) -> None:
    """Forget a finished training."""
    _forget_shards(run)
    discard_file(run / CHECKPOINT)


def shards(run: Path, name: str) -> Path:
    """Return the folder of a parallel model and its optimiser that a checkpoint names."""
    return run / CHECKPOINT.parent / name


def _forget_shards(run: Path, but: str | None = None) -> None:
    """Delete the folders of shards that no checkpoint names any more."""
    for folder in (run / CHECKPOINT.parent).glob(f"{SHARDS}-*"):
        if folder.name != but:
            discard(folder.rename(folder.with_name(f"{TEMPORARY}{folder.name}")))


def check_settings(run: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a training began with: its weights and its report belong to those.

    Args:
        run: the run folder.
        began: the settings in the checkpoint, by name ("train.lr").
        now: settings to go on with; those in `MAY_DIFFER` do not change the outcome.

    Raises:
        FolderError: naming the settings that differ.
    """
    was = {**flat(Settings()), **began}  # a setting that is newer than the checkpoint had its default
    names = [name for name in {**began, **now} if name not in MAY_DIFFER and was.get(name) != now.get(name)]
    if names:
        name = names[0]
        more = f", and {', '.join(names[1:4])} differ too" if names[1:] else ""
        raise FolderError(
            f"{run}: {name} is {now.get(name)!r} and was {was.get(name)!r} when the training began{more}: expected "
            f"the same to go on; restore config.yaml, or train with another --out"
        )


def load_weights(run: Path, stored: Mapping[str, Any], model: nn.Module) -> None:
    """Load the weights of a checkpoint whose settings were checked. Raises FolderError if the classes are others.

    All processes call it.
    """
    if SHARDS in stored:
        load_checkpoint(shards(run, stored[SHARDS]), model)
        return
    try:
        model.load_state_dict(stored["model"])
    except RuntimeError as error:
        raise other_images(run) from error


def other_images(run: Path) -> FolderError:
    """Return the error for a checkpoint that does not fit the data."""
    return FolderError(
        f"{run}: its checkpoint is of other training images than those that are there now: expected the data as it "
        f"was; restore it, or train again in another folder"
    )


def check_space(run: Path, model: nn.Module, ema: bool) -> None:
    """Raise FolderError if the disk has no room for two checkpoints and the model."""
    weights = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = 2 * (moments + (3 if ema else 2) * weights) + weights
    held = (run / CHECKPOINT).stat().st_size if exists(run) else 0  # by one that will be replaced
    free = shutil.disk_usage(run).free
    if free < needed - held:
        remedy = "make room" if held else "make room, or name another --out"
        raise FolderError(
            f"{run}: {in_units(free)} are free: expected {in_units(needed - held)} for the checkpoints of this "
            f"training; {remedy}"
        )
