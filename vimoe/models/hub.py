"""Model folders on the Hugging Face hub, found by name and revision, and the hub's refusals in one line.

Only the files that are named are ever downloaded, no code among them. The hub's own client does the rest: its cache,
its login (`hf auth login`) and its environment variables hold here too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vimoe.errors import FolderError, first_line

PREFIX = "hf-hub:"
REPO = re.compile(r"[\w.-]+/[\w.-]+")
PAUSES = (1, 2)  # seconds between attempts to connect


def find_folder(
    name: str | Path, files: Collection[str], revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:  # fmt: skip
    """Return the folder of that name, or else that of the hub repository, downloaded into the hub's cache.

    Args:
        name: path of a folder, "USER/REPO", or "hf-hub:USER/REPO" for the hub whatever folders there are.
        files: names of the files to download.
        revision: branch, tag or commit of the repository.
        token: access token; by default that of `hf auth login`.
        cache_dir: folder of the cache; by default the hub client's.

    Raises:
        FolderError: if there is no such repository or revision, or the hub cannot be reached.
    """
    repo = str(name).removeprefix(PREFIX)
    on_hub = str(name).startswith(PREFIX)
    if not on_hub and (isinstance(name, Path) or Path(name).exists() or not REPO.fullmatch(name)):
        if revision is not None:
            raise FolderError(
                f"revision={revision!r} with the folder {name}: expected one with a hub repository only; leave it out"
            )
        return Path(name)
    from huggingface_hub import snapshot_download

    with told(f"{name} is no folder here, and the hub" if not on_hub else f"{repo}: the hub", revision):
        found = snapshot_download(repo, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(files))
    return Path(found)


def check_answers(repo: str) -> None:
    """Raise ConnectionError if a repository has to come from the hub, and no connection to the hub can be made.

    timm and transformers look for several files, and the hub's client tries for half a minute to get each. A hub that
    is slow, or refuses, is left to them. The name of a folder that is here needs no hub.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_OFFLINE or Path(repo).is_dir():
        return
    try:
        kept = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots")
    except ValueError:  # a name that cannot be one, which they report
        return
    if kept.is_dir():
        return
    for pause in (*PAUSES, None):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except _unreachable() as error:
            if type(error).__name__ != "ConnectError":  # such as a timeout
                return
            if pause is None:
                raise ConnectionError(f"{constants.ENDPOINT} cannot be reached ({first_line(error)})") from error
            time.sleep(pause)
        else:
            return


@contextmanager
def told(what: str, revision: str | None) -> Iterator[None]:
    """Raise FolderError, with the remedy, for what the hub's client raises."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise FolderError(f"{what} says that access is gated; ask for it on the page there, and pass token=") from error
    except errors.RepositoryNotFoundError as error:
        raise FolderError(
            f"{what} shows no such repository; check the name, or pass token= if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FolderError(f"{what} has no revision {revision!r} of it; name a branch, tag or commit") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "pass token= with the right to do this" if status in (401, 403) else "try again later"
        raise FolderError(f"{what} refused with status {status}: {first_line(error)}; {remedy}") from error
    except ValueError as error:  # a name that cannot be one
        raise FolderError(f"{what} takes no such name or card: {first_line(error)}; change it") from error
    except (OSError, RuntimeError, _unreachable()) as error:
        raise FolderError(
            f"{what} cannot be reached: {first_line(error)}; check the path and the network, or download the folder"
        ) from error


def _unreachable() -> type[Exception]:
    """Return the base class of what the client's HTTP library raises without a connection."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
