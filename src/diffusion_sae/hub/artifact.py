"""What SAEs and probes share: a config that refuses what it does not know, and a model that loads strictly."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from .._config import check, check_integer, refuse_unknown
from .._files import atomic_folder, parse_json, read_json, write_json
from ..provenance import EXTRACTOR_CONFIG_NAME, Provenance
from ..zoo import resolve_source
from .artifact_weights import Find, refuse_differences, require_described_weights
from .card import write_artifact_card
from .connection import clear_connection_errors
from .push import push_folder
from .safe_files import MAX_JSON_BYTES, DamagedFileError, refuse_not_finite

METRICS_NAME = "metrics.json"
MAX_LABELS = 1_000_000
# what one save may write and the next not: shards, and the records of a trained artifact
_OPTIONAL_FILES = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *(METRICS_NAME, EXTRACTOR_CONFIG_NAME, "preprocessor_config.json", "latents.parquet", "latents.png"),
    "modeling_k_sparse_autoencoder.py",
)
# what transformers itself writes into or passes to a config, beside the dataclass fields
_TRANSFORMERS_KEYS = frozenset(
    {
        *PreTrainedConfig().to_dict(),
        *("_name_or_path", "name_or_path", "auto_map", "torch_dtype", "num_labels", "attn_implementation"),
        *(
            "_commit_hash",
            "_attn_implementation",
            "_attn_implementation_internal",
            "output_attentions",
            "transformers_weights",
        ),
        *("id2label", "label2id", "problem_type", "experts_implementation", "use_cache"),
    }
)


def refuse_unknown_config_keys(config: PreTrainedConfig, extra: dict[str, Any]) -> None:
    """For `__post_init__`: transformers keeps unknown keys as attributes, where a typing error goes unnoticed."""
    fields = {f.name for f in dataclasses.fields(config)} - _TRANSFORMERS_KEYS  # type: ignore[arg-type]
    extra = {key: value for key, value in extra.items() if key not in _TRANSFORMERS_KEYS}
    refuse_unknown(extra, fields, type(config).__name__)


class ArtifactConfig(PreTrainedConfig):
    """Config of an artifact; reading one of another kind is an error (transformers only warns)."""

    required_keys = ("d_in",)
    """What a config.json must hold: a default in its place would be another model."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = config_dict.get("model_type")
        if kind is None:
            raise ValueError(
                f"There is no config.json, or it names no model_type: this is no artifact for "
                f"{cls.__name__.removesuffix('Config')}. Check the name, or save the artifact again."
            )
        if kind != cls.model_type:
            raise ValueError(
                f"The config is of the kind {kind!r}, not {cls.model_type!r}: this is not an artifact for "
                f"{cls.__name__.removesuffix('Config')}. Load it with the class it was made by, or with AutoModel."
            )
        refuse_unknown(set(config_dict) - _TRANSFORMERS_KEYS, cls.__annotations__, cls.__name__)
        missing = [name for name in cls.required_keys if name not in config_dict]
        if missing:
            raise ValueError(f"{cls.__name__} needs {', '.join(missing)}, which the given config lacks.")
        # auto_map is of one saved with its code, which the package does not need; a second save would name no file
        try:
            return super().from_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)
        except (AttributeError, TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"The config holds a value that transformers cannot take ({type(error).__name__}: {error}). Save the "
                "artifact again."
            ) from error


class ArtifactModel(PreTrainedModel):
    """A Hub artifact: `config.json`, `model.safetensors`, `extractor_config.json`, `metrics.json`, `README.md`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.provenance: Provenance | None = None
        """The extraction that made the features it was trained on."""
        self.metrics: dict[str, Any] = {}
        """What was measured, as in `metrics.json`."""
        self.hub_arguments: dict[str, Any] = {}
        """`token`, `cache_dir` and `local_files_only` it was loaded with, for what else it loads."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load from an embedded name, a folder or the Hub; arguments as in transformers.

        Raises:
            ValueError: for missing, unexpected or misshapen tensors, a damaged file, or an artifact of another kind.
            OSError: if the artifact does not exist or may not be read.
        """
        source = resolve_source(str(pretrained_model_name_or_path))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # else transformers raises without naming the tensors
        # safe files: without it transformers takes pytorch_model.bin where there is no safetensors file, and reading
        # that format can run code of whoever made it; with it such an artifact is refused
        kwargs["use_safetensors"] = True
        name, find = str(pretrained_model_name_or_path), partial(_find_file, source, kwargs=kwargs)
        try:
            with suppress(RepositoryNotFoundError, RevisionNotFoundError):  # transformers says it, and what to do
                _refuse_hostile_config(find)
                require_described_weights(cls, name, find, source=source, **kwargs)
            with clear_connection_errors(f"loading {name!r}"):
                loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, DamagedFileError) as error:
            raise ValueError(f"The weights of {name!r} are damaged ({error}). Download or save them again.") from error
        except OSError as error:
            if source in str(error):
                raise
            raise OSError(f"Cannot load {source!r}. {error}") from error  # offline, transformers does not name it
        model, info = loaded
        _refuse_loading_problems(name, info)
        refuse_not_finite(model.state_dict(), repr(name))
        provenance = find(EXTRACTOR_CONFIG_NAME)
        model.provenance = None if provenance is None else Provenance.load(provenance)
        metrics = find(METRICS_NAME)
        model.metrics = {} if metrics is None else read_json(metrics)
        if not isinstance(model.metrics, dict):
            raise ValueError(f"{METRICS_NAME} of {name!r} holds a {type(model.metrics).__name__}, not an object.")  # noqa: TRY004
        model._read_records(find)
        own = ("token", "cache_dir", "local_files_only")
        model.hub_arguments = {key: kwargs[key] for key in own if kwargs.get(key) is not None}
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the whole artifact, card included; the folder is complete or untouched."""
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "subfolder")
        hub = {key: kwargs.pop(key) for key in names if key in kwargs}
        with atomic_folder(save_directory) as folder:
            self._write_artifact(folder, repo_id, **kwargs)
            if kwargs.get("variant") is None:  # else it is saved beside what is there
                _remove_leftovers(Path(save_directory), {path.name for path in folder.iterdir()})
        if push_to_hub:
            self.push_to_hub(
                repo_id, **hub, **{k: v for k, v in kwargs.items() if k in ("max_shard_size", "export_code")}
            )

    def _write_artifact(
        self, folder: Path, repo_id: str, subfolder: str = "", *, export_code: bool = False, **kwargs: Any
    ) -> None:
        super().save_pretrained(folder, **kwargs)
        if export_code:
            self._export_code(folder)
        if self.provenance is not None:
            self.provenance.save(folder)
        if self.metrics:
            write_json(folder / METRICS_NAME, self.metrics)
        self._write_records(folder)
        write_artifact_card(folder, self, repo_id, subfolder)

    def _export_code(self, folder: Path) -> None:  # noqa: ARG002
        """Put code that stands alone beside the weights; of the kinds of artifacts that have some."""
        raise ValueError(f"{type(self).__name__} has no code that could be saved beside it. Leave out export_code.")

    def _write_records(self, folder: Path) -> None:
        """What an artifact of this kind has beside its weights and what all have."""

    def _read_records(self, find: Callable[[str], str | None]) -> None:
        """Take up what `_write_records` wrote. `find` gives the path of a file by its name, None if there is none."""

    def origin(self) -> str:
        """Which activations it was trained on, in words for the card; empty if that is not recorded."""
        if self.provenance is None:
            return ""
        layers, timesteps = ", ".join(self.provenance.layers), ", ".join(map(str, self.provenance.timesteps))
        return f" of `{layers}` of `{self.provenance.model}` at timestep {timesteps}"

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        max_shard_size: int | str = "50GB",
        export_code: bool = False,
        **hub: Any,
    ) -> str:
        """Push weights, config, card and metrics in one commit; what is there already is not sent again.

        Args:
            repo_id: `owner/name`.
            subfolder: where in the repository, for several artifacts in one.
            max_shard_size: of a file of weights, as in `save_pretrained`.
            export_code: of an SAE: put code beside the weights that needs torch and transformers alone, for
                `AutoModel.from_pretrained(…, trust_remote_code=True)` of those who do not have this library.
            **hub: see `push_folder`.

        Returns:
            URL of the commit, or of the pull request.
        """

        def write(folder: Path, repo_id: str) -> None:
            self._write_artifact(folder, repo_id, subfolder, export_code=export_code, max_shard_size=max_shard_size)

        return push_folder(repo_id, write, subfolder=subfolder, delete_patterns=_OPTIONAL_FILES, **hub)


def _remove_leftovers(folder: Path, written: set[str]) -> None:
    """Files of an artifact saved here before that the new one lacks: loading would take them for its own."""
    for path in folder.glob("*"):
        if path.name not in written and any(fnmatch(path.name, pattern) for pattern in _OPTIONAL_FILES):
            path.unlink()


def _refuse_loading_problems(name: str, info: dict[str, Any]) -> None:
    misshapen = {key: (tuple(found), tuple(expected)) for key, found, expected in info["mismatched_keys"]}
    refuse_differences(
        name, missing=set(info["missing_keys"]), unexpected=set(info["unexpected_keys"]), misshapen=misshapen
    )


def _refuse_hostile_config(find: Find) -> None:
    """Before transformers reads it, which makes a name for each of `num_labels` and follows any depth."""
    path = find("config.json")
    if path is None:
        return  # what loads it says so
    size = Path(path).stat().st_size
    check(size <= MAX_JSON_BYTES, f"config.json has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
    content = parse_json(Path(path).read_bytes(), "config.json")
    if not isinstance(content, dict):
        raise ValueError(f"config.json holds a {type(content).__name__}, not an object of settings.")  # noqa: TRY004
    if content.get("num_labels") is not None:
        check_integer("num_labels of config.json", content["num_labels"], 0, MAX_LABELS)


def _find_file(source: str, name: str, *, kwargs: dict[str, Any]) -> str | None:
    """Path of an optional file of an artifact, downloaded if need be; None if there is none.

    Raises:
        OSError: if the Hub does not say: without the record of its extraction an artifact would take any features.
    """
    if Path(source).is_dir():
        path = Path(source, kwargs.get("subfolder") or "", name)
        return str(path) if path.is_file() else None
    hub = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")
    try:
        with clear_connection_errors(f"downloading {name} of {source!r}"):
            return hf_hub_download(source, name, **{key: kwargs[key] for key in hub if kwargs.get(key) is not None})
    except LocalEntryNotFoundError as error:
        if is_offline_mode() or kwargs.get("local_files_only"):
            return None  # all of an artifact is cached together
        raise OSError(
            f"The Hub does not answer whether {source!r} has {name}: {error.__cause__ or error}. Try again, or set "
            "HF_HUB_OFFLINE=1 to use what is in the cache."
        ) from error
    except EntryNotFoundError:
        return None
