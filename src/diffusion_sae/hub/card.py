"""Model cards: data first, then text from the packaged template. Each number comes from the artifact's metrics."""

import html
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .._files import write_atomically
from ..provenance import ExtractorConfig, Provenance
from .card_metadata import card_data

if TYPE_CHECKING:
    from .artifact import ArtifactModel

TEMPLATE = Path(__file__).parent / "card.md"
LIMITS = (
    "It describes what this layer of this model holds at this timestep, and nothing about other models, layers or "
    "timesteps. A latent's name, where there is one, is a summary of the images that activate it most."
)
ALWAYS_SHOWN = ("model", "layers", "timesteps", "pooling", "prompt", "seed", "image_size", "dtype")
_DATA, _TRAINING, _NOTE = "data", "training", "note"


def cell(value: object) -> str:
    """A text as it is in a cell of a Markdown table, whatever is in it."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def _code(value: object) -> str:
    text = cell(value).replace("`", "'")
    return f"`{text}`" if text else "(empty)"


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested metrics as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for name, value in sorted(content.items()):  # as metrics.json has them, so that a loaded card is the saved one
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            rows.append((cell(prefix + name), f"{value:.4g}"))
        elif isinstance(value, int | str):
            rows.append((cell(prefix + name), cell(value)))
    return rows


def _settings(provenance: Provenance | None) -> list[tuple[str, str]]:
    """What identifies the extraction, and every setting that is not at its default."""
    if provenance is None:
        return []
    usual = ExtractorConfig().to_dict()
    settings = {k: v for k, v in provenance.listed() if k in ALWAYS_SHOWN or v != usual[k]}
    if provenance.weights:  # else of an extraction that nobody has done yet
        settings |= {"weights": provenance.weights, "fingerprint": provenance.fingerprint}
    return [(name, _code(value)) for name, value in settings.items()]


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
    latents: Mapping[str, Any] | None = None,
) -> ModelCard:
    measured = {key: value for key, value in metrics.items() if key not in (_DATA, _TRAINING, _NOTE)}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        summary=html.escape(summary, quote=False),
        usage=usage,
        provenance=_settings(provenance),
        configuration=[(name, cell(value)) for name, value in configuration],
        measured=_flat(measured),
        measured_note=cell(metrics.get(_NOTE, "As in `metrics.json`.")),
        training=_flat(metrics.get(_TRAINING, {})),
        dataset=_flat(metrics.get(_DATA, {})),
        trained=trained,
        latents=latents,
        limits=LIMITS,
        version=importlib.metadata.version("diffusion-sae"),
    )


def _save(card: ModelCard, folder: Path) -> None:
    write_atomically(folder / "README.md", lambda path: path.write_text(str(card), encoding="utf-8"))


def artifact_card(model: "ArtifactModel", repo_id: str, subfolder: str = "", trained: bool = True) -> ModelCard:
    """What the model class says of itself, its extraction and its metrics."""
    text = model.card_text(repo_id, subfolder)  # type: ignore[operator]
    title = "/".join(filter(None, (repo_id.rsplit("/", 1)[-1], subfolder)))
    return render_card(
        title=title,
        summary=text["summary"],
        usage=text["usage"],
        data=card_data(model.provenance, text["pipeline_tag"], text["tags"], title, model.metrics),
        provenance=model.provenance,
        configuration=text["configuration"],
        metrics=model.metrics,
        trained=trained and bool(model.metrics),
        latents=text.get("latents"),
    )


def write_artifact_card(folder: Path, model: "ArtifactModel", repo_id: str, subfolder: str = "") -> None:
    """README.md of an SAE or probe."""
    _save(artifact_card(model, repo_id, subfolder), folder)


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
