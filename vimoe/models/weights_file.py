"""The weights of a model folder: read without running anything, and held against the model before any are made.

Safetensors files hold names, shapes, types and numbers, and no code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vimoe.errors import FolderError, first_line
from vimoe.models.folder_config import model_of_run

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types of weights that layers compute with
NAMED = 3  # names that a message lists


def check_inside(folder: Path, names: Collection[str]) -> None:
    """Raise FolderError for a missing file, or for a link that leads out of the folder.

    A snapshot in the cache of huggingface_hub links to files elsewhere in this cache.
    """
    real = folder.resolve()
    in_cache = real.parent.name == "snapshots" and real.parents[1].name.startswith("models--")
    home = real.parents[2] if in_cache else real
    for name in names:
        if not (folder / name).is_file():
            run = model_of_run(folder)
            remedy = f"; did you mean {str(run)!r}?" if run else ""
            raise FolderError(f"{folder} has no {name}: expected a folder that vimoe.save wrote{remedy}")
        if not (folder / name).resolve().is_relative_to(home):
            raise FolderError(f"{folder / name} is a link that leads out of the folder: expected a file; copy it there")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file into memory; read them where its name is not UTF-8, which safetensors cannot open.

    Raises:
        FolderError: if it is no whole safetensors file.
    """
    try:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            return safetensors.torch.load(path.read_bytes())
        return safetensors.torch.load_file(path)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise FolderError(
            f"{path} cannot be read: expected a whole safetensors file, got {first_line(error)}; copy or save it again"
        ) from error


def check_fit(
    source: object, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, remedy: str
) -> None:
    """Raise FolderError, naming them, for tensors that are missing, unexpected, or of another shape or type.

    A floating type may be another than the model's, since that of the weights travels.

    Args:
        source: place of the tensors, for the message.
        found: tensors by name.
        expected: tensors of the model by name; their values do not matter.
        what: thing that says what is expected, for the message.
        remedy: end of the message.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    odd = [f"{name} {odd}" for name in expected if name in found and (odd := _odd(found[name], expected[name]))]
    wrong = [
        *([f"it lacks {_listed(missing)}"] if missing else []),
        *([f"it has {_listed(unexpected)}, which the model has not"] if unexpected else []),
        *odd[:1],
    ]
    if wrong:
        raise FolderError(f"{source} does not fit {what}: {'; '.join(wrong)}; {remedy}")


def _odd(found: Tensor, wanted: Tensor) -> str:
    """Return what keeps a tensor from taking the place of another; "" if it fits.

    A tensor that is empty in the model gets its length from the file, such as the classes that a router knows.
    """
    grows = not wanted.numel() and found.ndim == wanted.ndim
    if found.shape != wanted.shape and not grows:
        return f"has shape {tuple(found.shape)} where the model has {tuple(wanted.shape)}"
    if found.dtype not in COMPUTED if wanted.is_floating_point() else found.dtype != wanted.dtype:
        return f"is of {found.dtype} where the model has {wanted.dtype}"
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
