"""What the model card of an SAE says."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .modeling import KSparseAutoencoder


def card_text(sae: "KSparseAutoencoder", repo_id: str) -> dict[str, Any]:
    """Content of the card of an SAE that is published as `repo_id`."""
    config = sae.config
    timesteps = "" if config.timesteps is None else f", timesteps={config.timesteps[0]}"
    return {
        "summary": f"A k-sparse autoencoder on the activations{sae.origin()}: {config.num_latents:,} latents over "
        f"{config.d_in} dimensions, {config.k} active at a time.",
        "usage": "from diffusion_sae import DiffusionFeatureExtractor, KSparseAutoencoder\n\n"
        f'sae = KSparseAutoencoder.from_pretrained("{repo_id}")\n'
        f'extractor = DiffusionFeatureExtractor.from_pretrained("{repo_id}")  # the one it was trained on\n'
        f'features = next(iter(extractor("image.png").values())).reshape(-1, {config.d_in})\n'
        f"top_acts, top_indices = sae.encode(features{timesteps})",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["sparse-autoencoder", "interpretability"],
        "configuration": [
            (k, getattr(config, k))
            for k in ("d_in", "num_latents", "expansion_factor", "k", "activation", "encoder_init", "converted_from")
            if getattr(config, k) is not None
        ],
    }
