"""A data path (`DataConfig.path`): the kind of data that it names, and the listing of that data."""

from __future__ import annotations

from pathlib import Path

from vimoe.config.data import DataConfig, joined
from vimoe.data.archives import archives, find_archives, is_archive
from vimoe.data.csv_table import csv_file
from vimoe.data.hugging_face import hugging_face
from vimoe.data.listing import Listing, folder
from vimoe.data.mnist import MNISTS, mnist_files
from vimoe.errors import DataError, beside

REFUSED = {  # kinds of data that timm reads and vimoe does not, with the reason or remedy
    "tfds/": "it streams, but a training that can be resumed needs images by number; give hfds/NAME or a folder",
    "hfids/": "it streams, but a training that can be resumed needs images by number; give it as hfds/NAME",
    "wds/": "give the folder of the shards itself, whose images are then read by offset instead of streamed",
    "torch/cifar": "its files are pickles, which can run code; give hfds/uoft-cs/cifar10 (or cifar100), or a folder",
    "torch/image": "give its folder itself",
    "torch/folder": "give its folder itself",
    "torch/": f"known: {', '.join(f'torch/{name}:FOLDER' for name in MNISTS)}; give others as a folder or a CSV file",
}


def list_data(config: DataConfig) -> Listing:
    """Return the listing of the data at `config.path`, whatever its kind.

    Raises:
        DataError: if nothing is there, its kind is unknown, or it cannot be read.
    """
    path, root = config.path, Path(config.path)
    if not path:
        raise DataError("data.path is empty: expected a folder of class folders, a .csv or .tar file, or 'digits'")
    if path.startswith("hfds/"):
        return hugging_face(path.removeprefix("hfds/"), config.image_column, config.label_column)
    if path.startswith("torch/") and path.removeprefix("torch/").partition(":")[0] in MNISTS:
        return mnist_files(path.removeprefix("torch/"))
    if refused := next((why for prefix, why in REFUSED.items() if path.startswith(prefix)), None):
        raise DataError(f"data.path={path!r} cannot be read: {refused}")
    if root.is_dir():
        inside = find_archives(root)
        return archives(root, inside) if inside else folder(root)
    check_there(path)
    if is_archive(root):
        return archives(root, [root])
    if root.suffix.lower() == ".csv":
        roles = (config.train_split, config.val_split, config.test_split)
        splits = {name for role in roles for name in (role, *joined(role))} - {"none", ""}
        return csv_file(root, config.image_column or "path", config.label_column or "label", splits)
    raise DataError(f"data.path={path!r} is a file: expected a folder, a .csv or a .tar file; unpack it, or list it")


def check_there(path: str) -> None:
    """Raise DataError if a data path names a folder or file that is not there; data of other kinds pass."""
    root = local(path)
    if root is not None and not path.startswith(("hfds/", *REFUSED)) and not root.exists():
        raise DataError(f"data.path={path!r}: no such folder or file; {beside(root)}")


def absolute(path: str) -> str:
    """Return a data path that means the same from any working directory."""
    target = local(path)
    if target is None or not target.exists():  # a data set of the hub
        return path
    return path[: _start(path)] + str(target.resolve() if target.is_dir() else target.parent.resolve() / target.name)


def local(path: str) -> Path | None:
    """Return the file or folder in a data path, without the kind in front of it; None for data without a file.

    >>> local("torch/mnist:data").name, local("digits")
    ('data', None)
    """
    return None if path in ("", "digits") else Path(path[_start(path) :])


def _start(path: str) -> int:
    """Return the index at which the file or folder begins in a data path."""
    return path.index(":") + 1 if path.startswith("torch/") and ":" in path else 5 if path.startswith("hfds/") else 0
