"""A model pushed to the Hugging Face hub, with its model card."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vimoe.errors import FolderError
from vimoe.files import temporary_folder, write_text
from vimoe.models.folder_config import CONFIG, WEIGHTS
from vimoe.models.hub import REPO, told
from vimoe.models.model_card import CARD, model_card
from vimoe.models.model_folder import save


def push_to_hub(
    model: nn.Module, repo_id: str, *, private: bool | None = None, token: str | bool | None = None,
    commit_message: str = "Upload model", revision: str | None = None, label_names: Sequence[str] | None = None,
    pretrained: bool = True, results: str = "",
) -> str:  # fmt: skip
    """Upload a model folder with a model card (README.md) to the hub, in one commit. `vimoe.load` brings it back.

    The repository and the branch are made if they are not there. The arguments follow huggingface_hub's.

    Args:
        model: a ViT of a known family, dense or with MoE layers, as for `vimoe.save`.
        repo_id: "USER/REPO".
        private: make a new repository private.
        token: access token with the right to write; by default that of `hf auth login`.
        commit_message: message of the commit.
        revision: branch to commit to; by default main.
        label_names: name of each class; by default those that the model came with.
        pretrained: False for a model that was trained from random weights, so that the card names no parent.
        results: Markdown text with measured figures for the card.

    Returns:
        URL of the commit.

    Raises:
        FolderError: if the model cannot be saved, the name is none, or the hub refuses or cannot be reached.

    >>> import timm, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> vimoe.push_to_hub(model, "me")  # needs a user too, such as "me/photos"
    Traceback (most recent call last):
    vimoe.errors.FolderError: repo_id='me': expected USER/REPO of letters, digits, '-', '_' and '.'
    """
    from huggingface_hub import HfApi

    if not REPO.fullmatch(repo_id):
        raise FolderError(f"repo_id={repo_id!r}: expected USER/REPO of letters, digits, '-', '_' and '.'")
    card = model_card(model, repo_id, pretrained, results)
    with temporary_folder(Path(tempfile.gettempdir())) as temporary:
        folder = save(model, temporary / "model", label_names=label_names)
        write_text(folder / CARD, card)
        api = HfApi(token=token)
        with told(f"{repo_id}: the hub", revision):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done: Any = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                allow_patterns=[CARD, CONFIG, WEIGHTS],
            )  # fmt: skip
    return str(done.commit_url)
