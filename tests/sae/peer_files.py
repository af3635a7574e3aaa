"""Files as the released SAE libraries write them, and what they make of files that are written for them.

    python peer_files.py save INPUTS.safetensors FOLDER    # FOLDER/<library>/<case>/…, FOLDER/outputs.safetensors
    python peer_files.py load INPUTS.safetensors FOLDER    # reads FOLDER/<library>/<case>/, writes outputs.safetensors

Runs in the environment of `benchmarks/peers/environment.py`, as `peer_outputs.py`, which places the weights. SAELens 6
writes no file of an older layout, but reads them: those are made here, and what it makes of them is the oracle.
"""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_outputs import (
    DIRECT,
    DISTRIBUTIONS,
    DL_GATED,
    LINEAR,
    MULTIPLIER,
    OVERCOMPLETE,
    SL_GATED,
    SPARSIFY,
    THRESHOLD,
    THRESHOLDS,
    Tensors,
    batch_top_k,
    dl,
    jumprelu,
    matryoshka_batch_top_k,
    nn,
    oc,
    place,
    sae_lens_settings,
    shape_of,
    sl,
    sparsify,
    standard,
    top_k,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALE = 0.7  # of activations that SAELens normalises by their average length


class Saved(NamedTuple):
    encode: Callable[[Tensor], Tensor]
    """To dense latents, of the library's own loader where it has one."""
    reconstruct: Callable[[Tensor], Tensor]


def load_sae_lens(folder: Path) -> Saved:
    sae = sl.SAE.load_from_disk(folder)
    return Saved(sae.encode, sae)


def sae_lens_files(weights: Tensors, folder: Path) -> Iterator[tuple[str, Saved]]:
    settings, k = sae_lens_settings(weights), int(weights["k"])
    inference: dict[str, tuple[Any, Any, dict[str, Any], dict[str, str]]] = {
        "topk": (sl.TopKSAE, sl.TopKSAEConfig, {"k": k}, DIRECT),
        "topk-rescaled": (sl.TopKSAE, sl.TopKSAEConfig, {"k": k, "rescale_acts_by_decoder_norm": True}, DIRECT),
        "topk-layer-norm": (sl.TopKSAE, sl.TopKSAEConfig, {"k": k, "normalize_activations": "layer_norm"}, DIRECT),
        "topk-constant-norm": (
            *(sl.TopKSAE, sl.TopKSAEConfig),
            *({"k": k, "normalize_activations": "constant_norm_rescale"}, DIRECT),
        ),
        "topk-unsubtracted": (sl.TopKSAE, sl.TopKSAEConfig, {"k": k, "apply_b_dec_to_input": False}, DIRECT),
        "jumprelu": (sl.JumpReLUSAE, sl.JumpReLUSAEConfig, {}, DIRECT | THRESHOLDS),
        "jumprelu-unsubtracted": (
            *(sl.JumpReLUSAE, sl.JumpReLUSAEConfig),
            *({"apply_b_dec_to_input": False}, DIRECT | THRESHOLDS),
        ),
        "gated": (sl.GatedSAE, sl.GatedSAEConfig, {}, SL_GATED),
        "standard": (sl.StandardSAE, sl.StandardSAEConfig, {}, DIRECT),
    }
    for name, (kind, config, own, places) in inference.items():
        place(kind(config(**settings, **own)), weights, places).save_model(folder / name)
        yield name, load_sae_lens(folder / name)
    batch = DIRECT | {"threshold": "topk_threshold"}
    widths = weights["matryoshka_sizes"].tolist()
    for name, kind, config in (
        ("batchtopk", sl.BatchTopKTrainingSAE, sl.BatchTopKTrainingSAEConfig(**settings, k=k)),
        (
            "matryoshka",
            sl.MatryoshkaBatchTopKTrainingSAE,
            sl.MatryoshkaBatchTopKTrainingSAEConfig(**settings, k=k, matryoshka_widths=widths),
        ),
    ):
        training = place(kind(config), weights, batch)
        training.save_inference_model(folder / name)
        saved = load_sae_lens(folder / name)
        yield name, saved
        training.save_model(folder / f"{name}-checkpoint")  # is used as the exported one is
        yield f"{name}-checkpoint", saved
    config = sl.BatchTopKTrainingSAEConfig(**settings, k=k, normalize_activations="expected_average_only_in")
    training = place(sl.BatchTopKTrainingSAE(config), weights, batch)
    training.save_model(folder / "average-norm-checkpoint")
    (folder / "average-norm-checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALE}))
    training.fold_activation_norm_scaling_factor(SCALE)
    training.save_inference_model(folder.parent / "folded")
    yield "average-norm-checkpoint", load_sae_lens(folder.parent / "folded")
    yield from old_sae_lens_files(weights, folder)


def old_sae_lens_files(weights: Tensors, folder: Path) -> Iterator[tuple[str, Saved]]:
    """As versions 3 to 5 wrote them."""
    d_in, num_latents = shape_of(weights)
    common = {"d_in": d_in, "d_sae": num_latents, "dtype": "float32", "model_name": "gpt2", "hook_layer": 0}
    common |= {"hook_name": "blocks.0.hook_resid_pre", "apply_b_dec_to_input": True, "context_size": 8}
    common |= {
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "sae_lens_training_version": "3.2.3",
    }
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": int(weights["k"])}}
    relu = {"activation_fn_str": "relu", "activation_fn_kwargs": {}}
    for name, own, places in (
        ("old-topk", topk | {"architecture": "standard"}, DIRECT),
        ("old-standard", relu | {"normalize_activations": False}, DIRECT),
        ("old-jumprelu", relu | {"architecture": "jumprelu"}, DIRECT | {"thresholds": "threshold"}),
    ):
        (folder / name).mkdir(parents=True)
        save_file({theirs: weights[ours] for ours, theirs in places.items()}, folder / name / "sae_weights.safetensors")
        (folder / name / "cfg.json").write_text(json.dumps(common | own))
        yield name, load_sae_lens(folder / name)


def load_sparsify(folder: Path) -> Saved:
    coder = sparsify.SparseCoder.load_from_disk(folder)

    def encode(features: Tensor) -> Tensor:
        acts, indices, pre_acts = coder.encode(features)
        return torch.zeros_like(pre_acts).scatter(1, indices, acts)

    return Saved(encode, lambda features: coder(features).sae_out)


def sparsify_files(weights: Tensors, folder: Path) -> Iterator[tuple[str, Saved]]:
    d_in, num_latents = shape_of(weights)
    config = sparsify.SparseCoderConfig(num_latents=num_latents, k=int(weights["k"]))
    place(sparsify.SparseCoder(d_in, config), weights, SPARSIFY).save_to_disk(folder / "topk")
    yield "topk", load_sparsify(folder / "topk")


def dictionary_learning_files(weights: Tensors, folder: Path) -> Iterator[tuple[str, Saved]]:
    d_in, num_latents = shape_of(weights)
    k = int(weights["k"])
    common: dict[str, Any] = {"steps": 10, "activation_dim": d_in, "dict_size": num_latents, "layer": 0}
    common |= {"lm_name": "none", "warmup_steps": 0, "device": "cpu"}
    free = {"sparsity_warmup_steps": None}
    shape = (d_in, num_latents)
    trainers: dict[str, tuple[Any, dict[str, str], Any]] = {
        "topk": (top_k.TopKTrainer(**common, k=k), LINEAR | THRESHOLD, top_k.AutoEncoderTopK),
        "batchtopk": (batch_top_k.BatchTopKTrainer(**common, k=k), LINEAR | THRESHOLD, batch_top_k.BatchTopKSAE),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**common, k=k, group_fractions=[0.25, 0.25, 0.5]),
            DIRECT | THRESHOLD,
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
        ),
        "jumprelu": (
            jumprelu.JumpReluTrainer(**common, **free, target_l0=k),
            DIRECT | THRESHOLDS,
            dl.JumpReluAutoEncoder,
        ),
        "standard": (
            standard.StandardTrainerAprilUpdate(**common, **free, l1_penalty=0.1),
            LINEAR | {"b_dec": "bias"},
            dl.AutoEncoder,
        ),
    }
    saved = {name: (trainer.ae, trainer.config, places, kind) for name, (trainer, places, kind) in trainers.items()}
    saved["gated"] = (dl.GatedAutoEncoder(*shape), {"dict_class": "GatedAutoEncoder"}, DL_GATED, dl.GatedAutoEncoder)
    of_new = LINEAR | {"b_dec": "decoder.bias"}
    saved["standard-new"] = (dl.AutoEncoderNew(*shape), {"dict_class": "AutoEncoderNew"}, of_new, dl.AutoEncoderNew)
    for name, (module, config, places, kind) in saved.items():
        (folder / name).mkdir(parents=True)
        torch.save(place(module, weights, places).state_dict(), folder / name / "ae.pt")
        (folder / name / "config.json").write_text(json.dumps({"trainer": config}))
        sae = kind.from_pretrained(folder / name / "ae.pt")
        yield name, Saved(sae.encode, sae)
        if name == "topk":

            def encode(x: Tensor, sae: Any = sae) -> Tensor:
                return sae.encode(x, use_threshold=True)

            yield "topk-threshold", Saved(encode, lambda x, sae=sae, encode=encode: sae.decode(encode(x)))


def overcomplete_files(weights: Tensors, folder: Path) -> Iterator[tuple[str, Saved]]:
    shape, k = shape_of(weights), int(weights["k"])
    signed = oc.EncoderFactory.create_module("linear", *shape, output_activation=nn.Identity)
    saes = {
        "topk": oc.TopKSAE(*shape, top_k=k, **MULTIPLIER),
        "topk-signed": oc.TopKSAE(*shape, top_k=k, encoder_module=signed, **MULTIPLIER),
        "batchtopk": oc.BatchTopKSAE(*shape, top_k=k, **MULTIPLIER),
        "jumprelu": oc.JumpSAE(*shape, **MULTIPLIER),
        "standard": oc.SAE(*shape, **MULTIPLIER),
    }
    for norm in ("max_l2", "l1", "max_l1", "identity"):
        saes[f"topk-{norm}"] = oc.TopKSAE(*shape, top_k=k, dictionary_params={"normalization": norm})
    saes["batchtopk"].running_threshold = weights["threshold"]  # no part of the state dict
    for name, sae in saes.items():
        places = OVERCOMPLETE | ({"log_thresholds": "thresholds"} if name == "jumprelu" else {})
        (folder / name).mkdir(parents=True)
        torch.save(place(sae, weights, places).state_dict(), folder / name / "state.pt")
        sae.eval()
        yield name, Saved(lambda x, sae=sae: sae.encode(x)[1], lambda x, sae=sae: sae(x)[2])
    torch.save(saes["topk"], folder / "topk" / "module.pt")  # as its examples save: refused


def main(action: str, inputs: str, name: str) -> None:
    torch.set_num_threads(1)
    folder, weights = Path(name), load_file(inputs)
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    found: Tensors = {}
    if action == "save":
        libraries = {"sae_lens": sae_lens_files, "sparsify": sparsify_files, "overcomplete": overcomplete_files}
        libraries["dictionary_learning"] = dictionary_learning_files
        cases = [
            (f"{library}/{case}", saved)
            for library, make in libraries.items()
            for case, saved in make(weights, folder / library)
        ]
    else:
        loaders = {"sae_lens": load_sae_lens, "sparsify": load_sparsify}
        cases = [
            (f"{library}/{case.name}", load(case))
            for library, load in loaders.items()
            for case in sorted((folder / library).iterdir())
        ]
    for case, saved in cases:
        with torch.no_grad():
            found[f"{case}/latent_acts"] = saved.encode(weights["features"])
            found[f"{case}/reconstruction"] = saved.reconstruct(weights["features"])
    copies = {key: value.detach().contiguous().clone() for key, value in found.items()}
    save_file(copies, folder / "outputs.safetensors", metadata={name: version(name) for name in DISTRIBUTIONS})


if __name__ == "__main__":
    main(*sys.argv[1:])
