"""The formats, and which one a checkpoint has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._config import check_choice
from ..._files import atomic_folder
from ..safe_files import refuse_not_finite
from . import dictionary_learning, overcomplete, revelio, sae_lens, sdxl_unbox, sparsify
from .checkpoint import Checkpoint
from .options import ForeignOptions
from .weights import ForeignSAE

OURS = "diffusion_sae"


@dataclass(frozen=True)
class Format:
    title: str
    files: str
    """What it is recognised by."""
    recognise: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, ForeignOptions], ForeignSAE]
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Any]], None] | None = None


# in this order: the last two are recognised by tensors in a file of any name
FORMATS = {
    "sae_lens": Format(
        "SAELens", "cfg.json, sae_weights.safetensors", sae_lens.recognise, sae_lens.read, sae_lens.write
    ),
    "saeuron": Format("SAeUron", "cfg.json, sae.safetensors", sparsify.recognise_saeuron, sparsify.read_saeuron),
    "sparsify": Format("sparsify", "cfg.json, sae.safetensors", sparsify.recognise, sparsify.read, sparsify.write),
    "dictionary_learning": Format(
        "dictionary_learning", "ae.pt, config.json", dictionary_learning.recognise, dictionary_learning.read
    ),
    "sdxl_unbox": Format("sdxl-unbox", "config.json, state_dict.pth", sdxl_unbox.recognise, sdxl_unbox.read),
    "overcomplete": Format(
        "overcomplete", "a state dict with encoder.final_block.0.weight", overcomplete.recognise, overcomplete.read
    ),
    "revelio": Format("Revelio", "a state dict of W_enc, b_enc, W_dec, b_dec", revelio.recognise, revelio.read),
}
WRITTEN = tuple(name for name, one in FORMATS.items() if one.write is not None)


def format_of(checkpoint: Checkpoint) -> str:
    """Name in FORMATS, or `diffusion_sae` for an artifact of this library.

    Raises:
        ValueError: if it is none of them.
    """
    if checkpoint.has("config.json") and checkpoint.json("config.json").get("model_type") == "k-sparse-autoencoder":
        return OURS
    for name, one in FORMATS.items():
        if one.recognise(checkpoint):
            return name
    found = sorted(path.name for path in checkpoint.folder.iterdir())
    known = "; ".join(f"{name} ({one.files})" for name, one in FORMATS.items())
    raise ValueError(
        f"{checkpoint.source!r} is no checkpoint that is known. It has {', '.join(found[:10]) or 'no files'}; known "
        f"are {known}. Give subfolder, or filename and format, if it is one of them under another name."
    )


def format_at(source: str | Path, options: ForeignOptions, **hub: Any) -> str:
    """`options.format`, or what the checkpoint is recognised as; arguments and errors as `read_foreign`."""
    return options.format or format_of(Checkpoint.open(source, options, **hub))


def read_foreign(source: str | Path, options: ForeignOptions, **hub: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An SAE of another library as arguments of KSparseAutoencoderConfig and its state dict.

    Args:
        source: folder, file or Hub id.
        options: which format it has, and what its files do not say.
        **hub: token, cache_dir, local_files_only.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged or hostile, or cannot be represented exactly.
    """
    check_choice("format", options.format, (None, *FORMATS))
    checkpoint = Checkpoint.open(source, options, **hub)
    name = options.format or format_of(checkpoint)
    if name == OURS:
        raise ValueError(f"{checkpoint.source!r} is an artifact of this library: load it with from_pretrained.")
    try:
        foreign = FORMATS[name].read(checkpoint, options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint.source!r} lacks {Path(error.filename or '').name}: {FORMATS[name].title} has "
            f"{FORMATS[name].files}."
        ) from error
    activation = foreign.config["activation"]
    if options.activation not in (None, activation):
        raise ValueError(
            f"This {FORMATS[name].title} SAE has the activation {activation!r}, and activation = "
            f"{options.activation!r} would be another model. Leave it out."
        )
    tensors = foreign.tensors()
    refuse_not_finite(tensors, f"{checkpoint.source!r}, converted")
    size = {"d_in": foreign.weights.d_in, "num_latents": foreign.weights.num_latents}
    config = {"k": min(32, size["num_latents"])} | foreign.config | size  # of relu and jumprelu k is only aimed at
    config["converted_from"] = f"{FORMATS[name].title}: {checkpoint.origin()}"
    return config, tensors


def write_foreign(
    folder: str | Path,
    format: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write an SAE as another library reads it; the folder is complete or untouched.

    Raises:
        ValueError: for a format that is not written, or an SAE that it cannot say exactly.
    """
    check_choice("format", format, WRITTEN)
    write: Any = FORMATS[format].write
    with atomic_folder(folder) as temporary:
        write(temporary, config, tensors, metadata)
