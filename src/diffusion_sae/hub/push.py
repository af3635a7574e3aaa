"""Pushing a folder to the Hub as one commit."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi


def push_folder(
    repo_id: str,
    write: Callable[[Path, str], None],
    *,
    commit_message: str = "Upload with diffusion_sae",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    delete_patterns: Sequence[str] = (),
) -> str:
    """Write the files, then make the repository if need be, then upload all of them in one commit.

    Args:
        repo_id: `owner/name`.
        write: writes the files into the folder it is given; called before anything is sent.
        commit_message, commit_description, private, token, revision, create_pr: as `push_to_hub` of transformers;
            a `revision` that does not exist becomes a new branch.
        delete_patterns: files of the repository to delete in the same commit, unless they are among those written.

    Returns:
        URL of the commit.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(delete_patterns),
        )
    return str(commit.commit_url)
