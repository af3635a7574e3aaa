"""SAEs of other libraries, and SAEs for them: between a KSparseAutoencoder and `hub.conversion`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._config import check, check_choice
from ..hub.conversion import ForeignOptions, read_foreign, write_foreign
from .configuration import KSparseAutoencoderConfig

if TYPE_CHECKING:
    from .modeling import KSparseAutoencoder

HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only")


def load_foreign(cls: "type[KSparseAutoencoder]", source: str | Path, **options: Any) -> "KSparseAutoencoder":
    """Load an SAE of SAELens, sparsify, SAeUron, dictionary_learning, sdxl-unbox, overcomplete or Revelio.

    Args:
        source: folder, file or Hub id.
        **options: fields of `hub.conversion.ForeignOptions` (format, subfolder, k, activation, …); and token, cache_dir
            and local_files_only as in `from_pretrained`.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged, needs more than tensors to be read, or cannot be represented exactly.
    """
    hub = {name: options.pop(name) for name in HUB_ARGUMENTS if name in options}
    config, tensors = read_foreign(source, ForeignOptions.from_dict(options), **hub)
    settings = KSparseAutoencoderConfig(**config)
    with torch.device("meta"):  # nothing is drawn, and nothing of the config's size is made beside what was read
        sae = cls(settings)
    # both weights lie latent-major, as the class keeps them
    laid_out = {
        name: value.T.contiguous().T if name == "W_enc" else value.contiguous() for name, value in tensors.items()
    }
    sae.load_state_dict(laid_out, assign=True)
    return sae.eval()


def save_foreign(sae: "KSparseAutoencoder", folder: str | Path, format: str, timestep: int | None = None) -> None:
    """Write the SAE as another library reads it.

    Args:
        folder: complete or untouched afterwards.
        format: sae_lens or sparsify.
        timestep: of an SAE over several timesteps the one to write.

    Raises:
        ValueError: if that library cannot say it exactly.
    """
    tensors = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    known = sae.config.timesteps
    if known is None:
        check(timestep is None, f"timestep belongs to an SAE over several, and this one has none; got {timestep}.")
    else:
        check_choice("timestep, of an SAE over several timesteps,", timestep, known)
        place = known.index(timestep)
        # z of x / s, and s times the reconstruction
        scale = tensors.pop("timestep_scale")[place].double()
        b_dec = tensors["b_dec"][place]
        changed = {"W_enc": tensors["W_enc"].double() / scale, "W_dec": tensors["W_dec"].double() * scale}
        changed["b_dec"] = b_dec.double() * scale
        tensors |= {name: value.to(b_dec.dtype) for name, value in changed.items()}
    metadata: dict[str, Any] = {"diffusion_sae_converted_from": sae.config.converted_from}
    if sae.provenance is not None:
        layers, timesteps = sae.provenance.layers, [timestep] if known else list(sae.provenance.timesteps)
        metadata |= {"model_name": sae.provenance.model, "hook_name": ", ".join(layers), "timesteps": timesteps}
        metadata["diffusion_sae_fingerprint"] = sae.provenance.fingerprint
    write_foreign(folder, format, sae.config.record(), tensors, metadata)
