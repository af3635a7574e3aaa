"""Finding artifacts on the Hub by the tags that their cards have."""

import re
from dataclasses import dataclass

from huggingface_hub import HfApi

from .._config import check_choice
from ..zoo.names import ArtifactName, long_layer, short_layer

KINDS = {"sae": "sparse-autoencoder", "probe": "diffusion-probe", "extractor": "feature-extraction"}
"""What there is, and the tag of each."""


@dataclass(frozen=True)
class ListedArtifact:
    """An artifact on the Hub, or a repository of several."""

    repo_id: str
    kind: str
    """sae, probe or extractor."""
    name: ArtifactName | None
    """What its name says, where it is one of the form `<model>-<layer>-t<timestep>[-<dataset>]`."""
    base_model: str | None
    """Hub id of the diffusion model; None for embedded models and folders."""
    layers: tuple[str, ...]
    """Canonical names; those of the tags."""
    timesteps: tuple[int, ...]
    subfolders: tuple[str, ...]
    """Of a repository of several artifacts; what `from_pretrained` takes as `subfolder`."""
    private: bool
    downloads: int | None


def _canonical(layer: str) -> str:
    """`up1` or `up_ft1` → `up_ft1`."""
    try:
        return long_layer(layer)
    except ValueError:
        short_layer(layer)  # raises for what is neither
        return layer


def list_artifacts(
    *,
    author: str | None = None,
    model: str | None = None,
    layer: str | None = None,
    timestep: int | None = None,
    dataset: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> list[ListedArtifact]:
    """Artifacts on the Hub that may be read, and that are all of what is given.

    Args:
        author: user or organisation.
        model: the base model: its Hub id, or the short name that artifacts' names begin with, as `sd15`.
        layer: `up1` or `up_ft1`.
        timestep: 0…999.
        dataset: Hub id of the data it was trained on.
        kind: sae, probe or extractor.
        limit: at most so many.
        token: as in transformers.

    Raises:
        ValueError: for a kind or layer that there is not.
    """
    check_choice("kind", kind, (None, *KINDS))
    tags = ["diffusion_sae"]
    tags += [KINDS[kind]] if kind else []
    tags += [_canonical(layer)] if layer else []
    tags += [] if timestep is None else [f"timestep-{timestep}"]
    tags += [f"base_model:{model}"] if model and "/" in model else []
    tags += [f"dataset:{dataset}"] if dataset else []
    found = []
    for info in HfApi(token=token).list_models(filter=tags, author=author, full=True):
        artifact = _listed(info)
        if model and "/" not in model and (artifact.name is None or artifact.name.model != model):
            continue
        found.append(artifact)
        if limit is not None and len(found) >= limit:
            break
    return found


def _listed(info: object) -> ListedArtifact:
    tags: list[str] = list(getattr(info, "tags", None) or [])
    repo_id: str = info.id  # type: ignore[attr-defined]
    try:
        name = ArtifactName.parse(repo_id)
    except ValueError:  # named otherwise: the tags say what it is
        name = None
    files = [file.rfilename for file in getattr(info, "siblings", None) or []]
    # base_model:owner/name, beside base_model:adapter:owner/name
    bases = [tag.removeprefix("base_model:") for tag in tags if tag.startswith("base_model:") and tag.count(":") == 1]
    return ListedArtifact(
        repo_id=repo_id,
        kind=next((kind for kind, tag in KINDS.items() if tag in tags), "extractor"),
        name=name,
        base_model=bases[0] if bases else None,
        layers=tuple(tag for tag in tags if _is_layer(tag)),
        timesteps=tuple(int(match[1]) for tag in tags if (match := re.fullmatch(r"timestep-(\d+)", tag))),
        subfolders=tuple(sorted(file.removesuffix("/config.json") for file in files if file.endswith("/config.json"))),
        private=bool(getattr(info, "private", False)),
        downloads=getattr(info, "downloads", None),
    )


def _is_layer(tag: str) -> bool:
    try:
        short_layer(tag)
    except ValueError:
        return False
    return True
