"""What the model card of an SAE says."""

from typing import TYPE_CHECKING, Any

from ..hub.card import cell
from .latent_table import SHEET_NAME, LatentTable

if TYPE_CHECKING:
    from .modeling import KSparseAutoencoder

SHOWN = 12  # latents, as on the sheet


def card_text(sae: "KSparseAutoencoder", repo_id: str, subfolder: str = "") -> dict[str, Any]:
    """Content of the card of an SAE that is published as `repo_id`, or within it in a sub-folder."""
    config = sae.config
    timesteps = "" if config.timesteps is None else f", timesteps={config.timesteps[0]}"
    address = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    return {
        "summary": f"A k-sparse autoencoder on the activations{sae.origin()}: {config.num_latents:,} latents over "
        f"{config.d_in} dimensions, {config.k} active at a time.",
        "usage": "from diffusion_sae import DiffusionFeatureExtractor, KSparseAutoencoder\n\n"
        f"sae = KSparseAutoencoder.from_pretrained({address})\n"
        f"extractor = DiffusionFeatureExtractor.from_pretrained({address})  # the one it was trained on\n"
        f'features = next(iter(extractor("image.png").values())).reshape(-1, {config.d_in})\n'
        f"top_acts, top_indices = sae.encode(features{timesteps})",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["sparse-autoencoder", "interpretability"],
        "configuration": [
            (k, getattr(config, k))
            for k in ("d_in", "num_latents", "expansion_factor", "k", "activation", "encoder_init", "converted_from")
            if getattr(config, k) is not None
        ],
        "latents": None if sae.latents is None else _latents(sae.latents, sheet=sae.latent_sheet is not None),
    }


def _latents(table: LatentTable, *, sheet: bool) -> dict[str, Any] | None:
    shown = [table[i] for i in table.most_interpretable(SHOWN)]
    if not shown:
        return None
    source = table.source
    images = f"{source.num_images:,} images" + (f" of {cell(source.dataset)}" if source.dataset else "")
    images += f" ({cell(source.split)})" if source.split else ""
    active = int((table.density > 0).sum())
    named = any(record.name for record in shown)
    return {
        "summary": f"On {images}, {active:,} of {len(table):,} latents are active. Those whose "
        f"{source.images_per_latent} top images agree most in their label, in turns over the labels:",
        "sheet": SHEET_NAME if sheet else None,
        "title": "name" if named else "label",
        "rows": [
            (
                record.latent_index,
                cell(record.name or record.label or ""),
                "" if record.purity is None else f"{record.purity:.2f}",
                f"{record.density:.1%}",
                f"{record.max_activation:.3g}",
            )
            for record in shown
        ],
    }
