"""Uploading a composition to the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub import HfApi, ModelCard

from calm_fast._version import __version__
from calm_fast.hf.model_card import FILE, is_ours


def upload(
    save: Callable[..., None],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | None = None,
) -> Any:
    """Save a composition with save(folder, max_shard_size=...) and upload the folder in one commit.

    transformers' own push_to_hub would replace the model card by a general one. The other arguments are the ones of
    that method. Returns huggingface_hub's CommitInfo.
    """
    api = HfApi(library_name="calm_fast", library_version=__version__, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        file = os.path.join(folder, FILE)
        if api.file_exists(repo_id, FILE, revision=revision):
            there = api.hf_hub_download(repo_id, FILE, revision=revision)
            if not is_ours(there):
                shutil.copyfile(there, file)
        if tags:
            card = ModelCard.load(file)
            card.data.tags = [*dict.fromkeys([*(card.data.tags or []), *tags])]
            card.save(file)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
            commit_message=commit_message or "Upload a composition", commit_description=commit_description,
        )  # fmt: skip
