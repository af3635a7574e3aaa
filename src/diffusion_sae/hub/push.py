"""Pushing a folder to the Hub as one commit."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download

from .._files import write_atomically
from .connection import clear_connection_errors

README, CONFIG = "README.md", "config.json"
INDEX_TEMPLATE = Path(__file__).parent / "index_card.md"


def push_folder(
    repo_id: str,
    write: Callable[[Path, str], None],
    *,
    subfolder: str = "",
    commit_message: str = "Upload with diffusion_sae",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    delete_patterns: Sequence[str] = (),
) -> str:
    """Write the files, then make the repository if need be, then upload what has changed in one commit.

    Args:
        repo_id: `owner/name`.
        write: writes the files into the folder it is given; called before anything is sent.
        subfolder: where in the repository, such as `up_ft1/t25`, so that it holds several artifacts; its README.md then
            lists them all, unless the repository is an artifact itself.
        commit_message, commit_description, private, token, revision, create_pr: as `push_to_hub` of transformers;
            a `revision` that does not exist becomes a new branch, `refs/pr/1` adds to a pull request.
        delete_patterns: files to delete in the same commit, unless they are among those written.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: for a sub-folder that is none, and for a pull request to another branch than main.
    """
    if PurePosixPath(subfolder).is_absolute() or {"..", "."} & {*subfolder.split("/")} or "\\" in subfolder:
        raise ValueError(f"subfolder must be a path within the repository, such as up_ft1/t25, got {subfolder!r}.")
    if create_pr and revision is not None:
        raise ValueError(
            f"A pull request is made to main, got revision={revision!r} beside create_pr. Give one of the two; "
            "revision='refs/pr/1' adds to an open pull request."
        )
    subfolder = subfolder.strip("/")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name, clear_connection_errors(f"pushing {repo_id!r}"):
        root = Path(name)
        folder = root / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if subfolder and (folder / README).exists():
            _write_index(root, repo_id, subfolder, api, revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=root,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=[f"{subfolder}/{pattern}" if subfolder else pattern for pattern in delete_patterns],
        )
    return str(commit.pr_url or commit.commit_url)


def _write_index(root: Path, repo_id: str, subfolder: str, api: HfApi, revision: str | None) -> None:
    """README.md of a repository of several artifacts, with the tags of all of them."""
    present = api.list_repo_files(repo_id, revision=revision)
    if CONFIG in present:
        return
    folders = {file.removesuffix(f"/{CONFIG}") for file in present if file.endswith(f"/{CONFIG}")} | {subfolder}
    data: Any = ModelCard.load(root / subfolder / README).data
    data.eval_results = data.model_name = None  # of this one alone
    if README in present:
        there = hf_hub_download(repo_id, README, revision=revision, token=api.token)
        known = ModelCard.load(there, ignore_metadata_errors=True).data
        for key in ("tags", "datasets", "base_model"):
            setattr(data, key, _joined(known.get(key), data.get(key)))
    card = ModelCard.from_template(
        data,
        template_path=str(INDEX_TEMPLATE),
        title=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        folders=sorted(folders),
    )
    write_atomically(root / README, lambda path: path.write_text(str(card), encoding="utf-8"))


def _joined(*values: str | list[str] | None) -> list[str] | None:
    """All entries once, in their order."""
    lists = [[value] if isinstance(value, str) else value or [] for value in values]
    return list(dict.fromkeys(entry for one in lists for entry in one)) or None
