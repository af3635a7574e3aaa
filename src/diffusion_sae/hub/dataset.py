"""Dataset repositories on the Hub: one commit up, a snapshot or ranges of bytes down."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .connection import clear_connection_errors

TEMPLATE = Path(__file__).parent / "dataset_card.md"
README = "README.md"


@contextmanager
def _clear_errors(repo_id: str, token: str | bool | None, revision: str | None) -> Iterator[None]:
    """A data set that does not exist is a FileNotFoundError which says what there is instead."""
    try:
        with clear_connection_errors(f"reading {repo_id!r}"):
            yield
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        kind = "There is no data set"
        if HfApi(token=token).repo_exists(repo_id, repo_type="model"):
            kind = "It is the name of a model repository, not of a data set"
        raise FileNotFoundError(
            f"No features can be loaded from {repo_id!r}. {kind} on the Hub that you may read. Give the name that "
            "FeatureStore.push_to_hub was given; a private one needs a token."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The data set {repo_id!r} has no branch, tag or commit {revision!r} on the Hub."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"The data set {repo_id!r} is not in the cache and cannot be downloaded: {error}"
        ) from error


def push_dataset(
    repo_id: str,
    files: Mapping[str, Path],
    card: DatasetCard,
    *,
    stale: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with diffusion_sae",
) -> str:
    """Files and card in one commit; the repository and the branch are made if need be.

    Args:
        repo_id: `owner/name`.
        files: name in the repository → file on the disk.
        card: what its README.md says; keys of the YAML block that only the one on the Hub has, such as the license,
            are kept.
        stale: pattern of files in the repository that are deleted, unless they are among `files`.
        private, token, revision, commit_message: as `push_to_hub` of transformers.

    Returns:
        URL of the commit.
    """
    api = HfApi(token=token)
    with clear_connection_errors(f"pushing {repo_id!r}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="dataset").repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type="dataset")
        present = api.list_repo_files(repo_id, revision=revision, repo_type="dataset")
        if README in present:
            there = hf_hub_download(repo_id, README, revision=revision, repo_type="dataset", token=token)
            known = DatasetCard.load(there, ignore_metadata_errors=True).data.to_dict()
            card.data.__dict__.update({key: value for key, value in known.items() if card.data.get(key) is None})
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations.append(CommitOperationAdd(README, str(card).encode()))
        operations += [CommitOperationDelete(name) for name in present if fnmatch(name, stale) and name not in files]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, repo_type="dataset"
        )
    return str(commit.commit_url)


def download_dataset(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Folder in the cache with the repository's files that fit the patterns.

    Raises:
        FileNotFoundError: if there is no such data set or revision, or it may not be read.
    """
    with _clear_errors(repo_id, token, revision):
        folder = snapshot_download(
            repo_id,
            repo_type="dataset",
            allow_patterns=list(patterns),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    return Path(folder)


class RemoteDataset:
    """Files of a dataset repository at one commit, read where they are."""

    def __init__(self, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> None:
        """Raises FileNotFoundError as `download_dataset`."""
        self.repo_id = repo_id
        with _clear_errors(repo_id, token, revision):
            # the commit, so that a push in between does not mix two versions
            self._commit = HfApi(token=token).dataset_info(repo_id, revision=revision).sha
        self._files = HfFileSystem(token=token, skip_instance_cache=True)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """Bytes start … end of a file, and no others."""
        path = f"datasets/{self.repo_id}@{self._commit}/{name}"
        try:
            with (
                clear_connection_errors(f"reading {name} of {self.repo_id!r}"),
                self._files.open(path, "rb", cache_type="none") as file,
            ):
                file.seek(start)
                content: Any = file.read() if end is None else file.read(end - start)
                return bytearray(content)  # torch wants writable memory
        except (FileNotFoundError, EntryNotFoundError) as error:
            raise FileNotFoundError(f"The data set {self.repo_id!r} has no file {name}.") from error


def dataset_card(tags: Sequence[str], **content: Any) -> DatasetCard:
    """Rendered from the packaged template."""
    data = DatasetCardData(
        tags=["diffusion_sae", *tags],
        # the viewer shows which images there are
        configs=[{"config_name": "default", "data_files": "shard-*.parquet"}],
    )
    return DatasetCard.from_template(data, template_path=str(TEMPLATE), **content)
