"""EleutherAI's sparsify, and SAeUron, which grew out of it (`cfg.json`, `sae.safetensors`).

Both take TopK of ReLU: relu_topk. SAeUron's `input_unit_norm` is sample_layer_norm; its `encode` leaves that to its
`forward`, which is what is kept here. Its BatchTopK and image-wise TopK choose among all rows of a batch or an image
and have no threshold: a row's latents depend on other rows, which no encoder here does. SAeUron's own scripts switch
both off and take TopK of each row, which `activation="relu_topk"` says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..._config import refuse_unknown
from ..._files import write_json
from .checkpoint import Checkpoint, whole_number
from .options import ForeignOptions
from .weights import ForeignSAE, batch_threshold, require_size, take

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
PLACES = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
SHARED = ("expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "d_in")
OF_SPARSIFY = (*SHARED, "activation", "skip_connection", "transcode", "signed")
OF_SAEURON = ("batch_topk", "sample_topk", "input_unit_norm")


def recognise(checkpoint: Checkpoint) -> bool:
    if checkpoint.chosen not in (None, WEIGHTS) or not (checkpoint.folder / WEIGHTS).is_file():
        return False
    return not set(OF_SAEURON) & set(checkpoint.json(CONFIG)) if checkpoint.has(CONFIG, WEIGHTS) else True


def recognise_saeuron(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS) and bool(set(OF_SAEURON) & set(checkpoint.json(CONFIG)))


def read(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    config = checkpoint.json(CONFIG)
    refuse_unknown(config, OF_SPARSIFY, f"sparsify's {CONFIG}")
    for key, reason in {
        "skip_connection": "its W_skip adds a linear map of the input to the reconstruction",
        "transcode": "it predicts another module's output and does not subtract b_dec",
        "signed": "it keeps the largest magnitudes, and no activation here does",
    }.items():
        if config.get(key):
            raise ValueError(f"A sparsify coder with {key} cannot be converted: {reason}.")
    if config.get("activation", "topk") != "topk":
        raise ValueError(
            f"sparsify's activation {config['activation']!r} cannot be converted: groupmax takes one latent of each of "
            "k groups, and no activation here does. topk can."
        )
    return _read(checkpoint, config, options)


def read_saeuron(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    config = checkpoint.json(CONFIG)
    refuse_unknown(config, (*SHARED, *OF_SAEURON), f"SAeUron's {CONFIG}")
    for key, rows in {"batch_topk": "a batch", "sample_topk": "an image"}.items():
        if config.get(key) and options.activation is None:
            raise ValueError(
                f"An SAeUron SAE with {key} chooses among all rows of {rows}, and its files hold no threshold that "
                "would choose row by row. Give activation='relu_topk' for TopK of each row, as SAeUron's own scripts "
                "evaluate it, or activation='batchtopk' and threshold."
            )
    made = _read(checkpoint, config, options)
    if options.activation == "batchtopk":
        if options.threshold is None:
            raise ValueError("activation='batchtopk' needs threshold: the files hold none.")
        made.config["activation"] = "batchtopk"
        made.thresholds = batch_threshold(options.threshold, made.weights)
    if config.get("input_unit_norm"):
        made.config["input_norm"] = "sample_layer_norm"
    return made


def _read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ForeignOptions) -> ForeignSAE:
    weights = take(checkpoint.tensors(WEIGHTS), PLACES, WEIGHTS)
    require_size(config, {"d_in": weights.d_in, "num_latents": weights.num_latents}, CONFIG)
    return ForeignSAE({"activation": "relu_topk", "k": options.k or whole_number(config, "k", CONFIG)}, weights)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:  # noqa: ARG001
    """What `SparseCoder.load_from_disk` of sparsify reads; it has TopK of rows as they are, and nothing else."""
    if config["activation"] not in ("topk", "relu_topk"):
        raise ValueError(
            f"sparsify has no {config['activation']!r}: only topk and relu_topk, which have the same latents, can be "
            "written."
        )
    if config["input_norm"] != "none":
        raise ValueError(f"sparsify has no input_norm, and this SAE has {config['input_norm']!r}.")
    written = {
        path.removesuffix(".T"): tensors[name].T if path.endswith(".T") else tensors[name]
        for name, path in PLACES.items()
    }
    settings = {
        "activation": "topk",
        # where num_latents is given, it is not used
        "expansion_factor": max(1, config["num_latents"] // config["d_in"]),
        "normalize_decoder": True,
        "num_latents": config["num_latents"],
        "k": config["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config["d_in"],
    }
    save_file({name: value.contiguous() for name, value in written.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, settings)
