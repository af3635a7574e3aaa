"""Model cards: data first, then text from the packaged template. Each number comes from the artifact's metrics."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .._files import write_atomically
from ..provenance import Provenance

if TYPE_CHECKING:
    from .artifact import ArtifactModel

TEMPLATE = Path(__file__).parent / "card.md"
LIMITS = (
    "It describes what this layer of this model holds at this timestep, and nothing about other models, layers or "
    "timesteps. A latent's name, where there is one, is a summary of the images that activate it most."
)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested metrics as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for name, value in sorted(content.items()):  # as metrics.json has them, so that a loaded card is the saved one
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            rows.append((prefix + name, f"{value:.4g}"))
        elif isinstance(value, int | str):
            rows.append((prefix + name, str(value)))
    return rows


def _base_model(provenance: Provenance | None) -> str | None:
    """The base model where it is a repository; folders and embedded models have no page to link to."""
    name = None if provenance is None else provenance.model
    return name if name is not None and name.count("/") == 1 and not Path(name).is_dir() else None


def render_card(
    *,
    title: str,
    summary: str,
    usage: str,
    data: ModelCardData,
    provenance: Provenance | None,
    configuration: Sequence[tuple[str, object]],
    metrics: Mapping[str, Any],
    trained: bool,
) -> ModelCard:
    settings = [] if provenance is None else provenance.listed()
    if provenance is not None:
        settings += [("weights", provenance.weights), ("fingerprint", provenance.fingerprint)]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        summary=summary,
        usage=usage,
        provenance=settings,
        configuration=list(configuration),
        metrics=_flat({key: value for key, value in metrics.items() if key != "note"}),
        metrics_note=metrics.get("note", "As in `metrics.json`."),
        trained=trained,
        limits=LIMITS,
        version=importlib.metadata.version("diffusion-sae"),
    )


def card_data(provenance: Provenance | None, pipeline_tag: str, tags: Sequence[str]) -> ModelCardData:
    extra = [] if provenance is None else [*provenance.layers, *(f"timestep-{t}" for t in provenance.timesteps)]
    return ModelCardData(
        library_name="diffusion_sae",
        license="apache-2.0",
        base_model=_base_model(provenance),
        pipeline_tag=pipeline_tag,
        tags=["diffusion_sae", *tags, *extra],
    )


def _save(card: ModelCard, folder: Path) -> None:
    write_atomically(folder / "README.md", lambda path: path.write_text(str(card), encoding="utf-8"))


def write_artifact_card(folder: Path, model: "ArtifactModel", repo_id: str) -> None:
    """README.md of an SAE or probe: what the model class says of itself, its extraction and its metrics."""
    text = model.card_text(repo_id)  # type: ignore[operator]
    card = render_card(
        title=repo_id.rsplit("/", 1)[-1],
        summary=text["summary"],
        usage=text["usage"],
        data=card_data(model.provenance, text["pipeline_tag"], text["tags"]),
        provenance=model.provenance,
        configuration=text["configuration"],
        metrics=model.metrics,
        trained=bool(model.metrics),
    )
    _save(card, folder)


def write_extractor_card(folder: Path, provenance: Provenance, layers: Sequence[Any], repo_id: str) -> None:
    card = render_card(
        title=repo_id.rsplit("/", 1)[-1],
        summary="Settings of a `DiffusionFeatureExtractor`: activations of a diffusion model on real images.",
        usage=(
            "from diffusion_sae import DiffusionFeatureExtractor\n\n"
            f'extractor = DiffusionFeatureExtractor.from_pretrained("{repo_id}")\n'
            'features = extractor("image.png")'
        ),
        data=card_data(provenance, "image-feature-extraction", ["feature-extraction"]),
        provenance=provenance,
        configuration=[(layer.name, f"{layer.channels} channels, stride {layer.stride} px") for layer in layers],
        metrics={},
        trained=True,
    )
    _save(card, folder)
