"""Checkpoints that all processes write together, and that any number of processes opens.

A checkpoint is a folder in the format of `torch.distributed.checkpoint`: the shards of all tensors by name, with their
places in the whole, and `values.pt` with plain values. Tensors of a model and an optimiser are brought to other shards
where they are read, so that the mesh may be another, or there may be one process and no mesh.

Nothing is unpickled but tensors, plain values, and torch's own description of the shards.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, dtype, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from vimoe.errors import FolderError, first_line
from vimoe.files import rename, temporary_folder
from vimoe.process import Process

VALUES = "values.pt"
# settings of groups are stored by parameter, so that an optimiser with other groups of them reads them
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_DESCRIBE = {  # all that a description of shards is made of, beside types of numbers
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
    "pathlib.PosixPath", "pathlib.WindowsPath",
}  # fmt: skip


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, which gets its name when it is whole; one of this name is replaced. All processes call it.

    Args:
        path: folder to make, in one that all processes see.
        model: model of `parallelize`, or of one process.
        optimizer: its optimiser.
        values: numbers, strings, tensors, and lists and dicts of them, such as the number of the step; those of the
            first process are written.

    Raises:
        FolderError: if it cannot be written, in all processes; what was there is kept.
    """
    process = Process()
    tensors, settings = _state(model, optimizer)
    with ExitStack() as stack:  # of the first process alone, whose folder it is
        temporary: Path = process.once(lambda: stack.enter_context(temporary_folder(path.parent)))
        try:
            with _one_process_is_meant():
                save(tensors, storage_writer=FileSystemWriter(temporary))
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise FolderError(
                f"{path} could not be written: {first_line(cause)}; make room, or name another folder"
            ) from error
        process.once(_finish, temporary, path, {"settings": settings, "values": dict(values or {})})


def _finish(temporary: Path, path: Path, values: dict[str, Any]) -> None:
    try:
        torch.save(values, temporary / VALUES)
        rename(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter of torch's zip writer, where the disk is full
        raise FolderError(
            f"{path} could not be written: {first_line(error)}; make room, or name another folder"
        ) from error


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Read a checkpoint into a model and an optimiser, in place, and return its values. All processes call it.

    Args:
        path: folder that `save_checkpoint` wrote, by any number of processes.
        model: model of the same architecture, parallel or not.
        optimizer: its optimiser, over the same parameters in any groups; None to leave out what was saved of one.

    Raises:
        FolderError: if it is missing, damaged, or of another model.
    """
    tensors, _ = _state(model, optimizer)
    try:
        stored: dict[str, Any] = torch.load(path / VALUES, map_location="cpu", weights_only=True)
        with _one_process_is_meant():
            load(tensors, storage_reader=_Reader(path))
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, CheckpointException) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {}
        cause = next(iter(failures.values()))[0] if failures else error
        raise FolderError(
            f"{path} cannot be read: expected a checkpoint of this model, got {first_line(cause)}; train again"
        ) from error
    set_model_state_dict(model, _part(tensors, "model"), options=_OPTIONS)
    if optimizer is not None:
        state = {**_part(tensors, "optimizer"), **stored["settings"]}
        set_optimizer_state_dict(model, optimizer, state, options=_OPTIONS)
    values: dict[str, Any] = stored["values"]
    return values


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of model and optimiser by name, and the settings of each parameter in the optimiser."""
    weights = get_model_state_dict(model, options=_OPTIONS)
    state = {} if optimizer is None else get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    named: dict[str, Any] = {"model": weights, "optimizer": {k: v for k, v in state.items() if isinstance(v, Tensor)}}
    tensors: dict[str, Any] = {f"{part}.{name}": t for part, each in named.items() for name, t in each.items()}
    return tensors, {name: value for name, value in state.items() if name not in named["optimizer"]}


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Keep torch from a warning where there is no job."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _part(tensors: dict[str, Any], part: str) -> dict[str, Any]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


class _Reader(FileSystemReader):
    """A reader whose description of the shards may hold classes of torch's checkpoints alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 writes it
        if f"{module}.{name}" not in _DESCRIBE and not (module == "torch" and isinstance(vars(torch).get(name), dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} in .metadata, which describes no shards")
        return super().find_class(module, name)
