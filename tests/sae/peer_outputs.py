"""What the classes of the released SAE libraries give for the weights handed in: the oracle of `test_peers.py`.

    python peer_outputs.py INPUTS.safetensors OUTPUTS.safetensors

Runs in the environment of `benchmarks/peers/environment.py`, which cannot import diffusion_sae. An output is named
`dtype/biases/library/case/tensor` or, of a training step, `step/library/case/tensor`.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

import sae_lens as sl
import sparsify
from sae_lens.saes.sae import TrainStepInput
from stubs import import_dictionary_learning, import_overcomplete

import_dictionary_learning()
import_overcomplete()
import dictionary_learning.dictionary as dl  # noqa: E402
import overcomplete.sae as oc  # noqa: E402
from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, standard, top_k  # noqa: E402

Tensors = dict[str, Tensor]
Places = dict[str, str]
DISTRIBUTIONS = ("sae-lens", "eai-sparsify", "dictionary-learning", "overcomplete")

# where each library keeps a weight; `.T`: transposed
DIRECT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
SPARSIFY = DIRECT | {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"}
LINEAR = SPARSIFY | {"W_dec": "decoder.weight.T"}
SL_GATED = DIRECT | {"b_enc": "b_mag", "b_gate": "b_gate", "r_mag": "r_mag"}
DL_GATED = {
    "W_enc": "encoder.weight.T",
    "b_enc": "mag_bias",
    "b_gate": "gate_bias",
    "r_mag": "r_mag",
    "W_dec": "decoder.weight.T",
    "b_dec": "decoder_bias",
}
THRESHOLDS = {"thresholds": "threshold"}
THRESHOLD = {"threshold": "threshold"}
OVERCOMPLETE = {
    "W_enc": "encoder.final_block.0.weight.T",
    "b_enc": "encoder.final_block.0.bias",
    "W_dec": "dictionary._weights",
    "multiplier": "dictionary.multiplier",
}
MULTIPLIER: dict[str, Any] = {"dictionary_params": {"use_multiplier": True}}


class Peer(NamedTuple):
    """A class with its weights, as it is called outside of its training."""

    encode: Callable[[Tensor], Tensor]
    """To dense latents."""
    reconstruct: Callable[[Tensor], Tensor]


def view(module: nn.Module, path: str, *, gradient: bool = False) -> Tensor:
    value = attrgetter(path.removesuffix(".T"))(module)
    value = value.grad if gradient else value.data
    return value.T if path.endswith(".T") else value


def place(module: Any, weights: Tensors, places: Places) -> Any:
    """The module with the weights, of which none may be left as the library drew it."""
    module = module.to(weights["W_enc"].dtype)
    for name, path in places.items():
        view(module, path).copy_(weights[name])
    drawn = {name for name, _ in module.named_parameters()} - {path.removesuffix(".T") for path in places.values()}
    if drawn:
        raise ValueError(f"{type(module).__name__}: no weights were given for {sorted(drawn)}.")
    return module


def shape_of(weights: Tensors) -> tuple[int, int]:
    """d_in, num_latents."""
    return weights["W_enc"].shape[0], weights["W_enc"].shape[1]


def sae_lens_settings(weights: Tensors) -> dict[str, Any]:
    d_in, num_latents = shape_of(weights)
    return {"d_in": d_in, "d_sae": num_latents, "dtype": str(weights["W_enc"].dtype).removeprefix("torch.")}


def sae_lens_peers(weights: Tensors) -> Iterator[tuple[str, Peer]]:
    settings, k = sae_lens_settings(weights), int(weights["k"])
    training = place(
        sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(**settings, k=k)),
        weights,
        DIRECT | {"threshold": "topk_threshold"},
    )
    with TemporaryDirectory() as folder:  # this library saves a BatchTopK as a JumpReLU
        training.save_inference_model(folder)
        saved = sl.SAE.load_from_disk(folder)
    if not isinstance(saved, sl.JumpReLUSAE):
        raise TypeError(f"a BatchTopK was saved as {type(saved).__name__}.")
    jump = DIRECT | THRESHOLDS
    for name, sae in {
        "topk": place(sl.TopKSAE(sl.TopKSAEConfig(**settings, k=k)), weights, DIRECT),
        "topk-rescaled": place(
            sl.TopKSAE(sl.TopKSAEConfig(**settings, k=k, rescale_acts_by_decoder_norm=True)), weights, DIRECT
        ),
        "topk-layer-norm": place(
            sl.TopKSAE(sl.TopKSAEConfig(**settings, k=k, normalize_activations="layer_norm")), weights, DIRECT
        ),
        "topk-constant-norm": place(
            sl.TopKSAE(sl.TopKSAEConfig(**settings, k=k, normalize_activations="constant_norm_rescale")),
            weights,
            DIRECT,
        ),
        "batchtopk": saved,
        "batchtopk-training": training,
        "jumprelu": place(sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**settings)), weights, jump),
        "jumprelu-unsubtracted": place(
            sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**settings, apply_b_dec_to_input=False)), weights, jump
        ),
        "gated": place(sl.GatedSAE(sl.GatedSAEConfig(**settings)), weights, SL_GATED),
        "standard": place(sl.StandardSAE(sl.StandardSAEConfig(**settings)), weights, DIRECT),
    }.items():
        yield f"sae-lens/{name}", Peer(sae.encode, sae)


def sparsify_coder(weights: Tensors, **settings: Any) -> Any:
    d_in, num_latents = shape_of(weights)
    config = sparsify.SparseCoderConfig(num_latents=num_latents, k=int(weights["k"]), **settings)
    return place(sparsify.SparseCoder(d_in, config), weights, SPARSIFY)


def sparsify_peers(weights: Tensors) -> Iterator[tuple[str, Peer]]:
    coder = sparsify_coder(weights)

    def encode(features: Tensor) -> Tensor:
        acts, indices, pre_acts = coder.encode(features)
        return torch.zeros_like(pre_acts).scatter(1, indices, acts)

    yield "sparsify/topk", Peer(encode, lambda features: coder(features).sae_out)


def dictionary_learning_peers(weights: Tensors) -> Iterator[tuple[str, Peer]]:
    shape, k = shape_of(weights), int(weights["k"])
    groups = weights["matryoshka_sizes"].diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    topk = place(top_k.AutoEncoderTopK(*shape, k), weights, LINEAR | THRESHOLD)
    nested = place(matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(*shape, k, groups), weights, DIRECT | THRESHOLD)
    batch = place(batch_top_k.BatchTopKSAE(*shape, k), weights, LINEAR | THRESHOLD)
    for name, sae in {
        "topk": topk,
        "batchtopk": batch,
        "matryoshka": nested,
        "jumprelu": place(dl.JumpReluAutoEncoder(*shape), weights, DIRECT | THRESHOLDS),
        "gated": place(dl.GatedAutoEncoder(*shape), weights, DL_GATED),
        "standard": place(dl.AutoEncoder(*shape), weights, LINEAR | {"b_dec": "bias"}),
        "standard-unsubtracted": place(dl.AutoEncoderNew(*shape), weights, LINEAR | {"b_dec": "decoder.bias"}),
    }.items():
        yield f"dictionary-learning/{name}", Peer(sae.encode, sae)
    for name, sae, use_threshold in (
        ("topk-threshold", topk, True),
        ("batchtopk-training", batch, False),
        ("matryoshka-training", nested, False),
    ):

        def encode(features: Tensor, sae: Any = sae, use_threshold: bool = use_threshold) -> Tensor:
            return sae.encode(features, use_threshold=use_threshold)

        yield f"dictionary-learning/{name}", Peer(encode, lambda x, encode=encode, sae=sae: sae.decode(encode(x)))


def overcomplete_peers(weights: Tensors) -> Iterator[tuple[str, Peer]]:
    shape, k = shape_of(weights), int(weights["k"])
    rows = len(weights["features"])
    signed = oc.EncoderFactory.create_module("linear", *shape, output_activation=nn.Identity)
    batch_k = rows * k  # of the whole batch
    saes = {
        "topk": oc.TopKSAE(*shape, top_k=k, **MULTIPLIER),
        "topk-signed": oc.TopKSAE(*shape, top_k=k, encoder_module=signed, **MULTIPLIER),
        "batchtopk": oc.BatchTopKSAE(*shape, top_k=batch_k, **MULTIPLIER),
        "batchtopk-training": oc.BatchTopKSAE(*shape, top_k=batch_k, **MULTIPLIER),
        "jumprelu": oc.JumpSAE(*shape, **MULTIPLIER),
    }
    saes["batchtopk"].running_threshold = weights["threshold"]  # not a buffer there
    for name, sae in saes.items():
        places = OVERCOMPLETE | ({"log_thresholds": "thresholds"} if name == "jumprelu" else {})
        place(sae, weights, places).train(name.endswith("-training"))
        yield f"overcomplete/{name}", Peer(lambda x, sae=sae: sae.encode(x)[1], lambda x, sae=sae: sae(x)[2])


def with_gradients(module: Any, places: Places, loss: Tensor) -> Tensors:
    """The loss and its gradients in the weights that are learned."""
    loss.backward()
    learned = {name for name, _ in module.named_parameters()}
    return {"loss": loss.detach()} | {
        f"gradient of {name}": view(module, path, gradient=True)
        for name, path in places.items()
        if path.removesuffix(".T") in learned
    }


def sae_lens_steps(weights: Tensors) -> Iterator[tuple[str, Tensors]]:
    """`training_forward_pass`."""
    settings, k = sae_lens_settings(weights), int(weights["k"])
    widths, coefficient = weights["matryoshka_sizes"].tolist(), float(weights["coefficient"])
    bandwidth = float(weights["bandwidth"])
    topk = sl.TopKTrainingSAEConfig(**settings, k=k, rescale_acts_by_decoder_norm=False)
    nested = sl.MatryoshkaBatchTopKTrainingSAEConfig(**settings, k=k, matryoshka_widths=widths)
    jump = sl.JumpReLUTrainingSAEConfig(**settings, jumprelu_bandwidth=bandwidth)
    batch = DIRECT | {"threshold": "topk_threshold"}
    for name, sae, places, dead in (
        ("topk", sl.TopKTrainingSAE(topk), DIRECT, weights["dead"].bool()),
        ("batchtopk", sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(**settings, k=k)), batch, None),
        ("matryoshka", sl.MatryoshkaBatchTopKTrainingSAE(nested), batch, None),
        ("jumprelu", sl.JumpReLUTrainingSAE(jump), DIRECT | THRESHOLDS, None),
        ("standard", sl.StandardTrainingSAE(sl.StandardTrainingSAEConfig(**settings)), DIRECT, None),
    ):
        place(sae, weights, places)
        coefficients = {"l1": coefficient, "l0": coefficient}
        given = TrainStepInput(weights["even"], coefficients, dead, n_training_steps=0, is_logging_step=False)
        output = sae.training_forward_pass(given)
        found = with_gradients(sae, places, output.loss)
        if "topk_threshold" in places.values():
            found["threshold"] = sae.topk_threshold
        yield f"sae-lens/{name}", found


def sparsify_steps(weights: Tensors) -> Iterator[tuple[str, Tensors]]:
    """`SparseCoder.forward`, whose FVU is the loss of its trainer."""
    coder = sparsify_coder(weights, multi_topk=True)
    output = coder(weights["even"], dead_mask=weights["dead"].bool())
    other = {"auxk": output.auxk_loss.detach(), "multi-topk": output.multi_topk_fvu.detach()}
    yield "sparsify/topk", with_gradients(coder, SPARSIFY, output.fvu) | other


def dictionary_learning_steps(weights: Tensors) -> Iterator[tuple[str, Tensors]]:
    """`loss` of the trainers."""
    d_in, num_latents = shape_of(weights)
    sizes, coefficient = weights["matryoshka_sizes"].tolist(), float(weights["coefficient"])
    common: dict[str, Any] = {
        "steps": 10**6,
        "activation_dim": d_in,
        "dict_size": num_latents,
        "layer": 0,
        "lm_name": "none",
        "warmup_steps": 0,
        "device": "cpu",
    }
    k = {"k": int(weights["k"])}
    groups = {"group_fractions": [0.25, 0.25, 0.5]}
    free = {"sparsity_warmup_steps": None}
    jump = common | free | {"target_l0": k["k"], "bandwidth": float(weights["bandwidth"])}
    for name, trainer, places in (
        ("topk", top_k.TopKTrainer(**common, **k), LINEAR),
        ("batchtopk", batch_top_k.BatchTopKTrainer(**common, **k), LINEAR),
        ("matryoshka", matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(**common, **k, **groups), DIRECT),
        ("jumprelu", jumprelu.JumpReluTrainer(**jump, sparsity_penalty=0.0), DIRECT | THRESHOLDS),
        ("jumprelu-l0", jumprelu.JumpReluTrainer(**jump, sparsity_penalty=coefficient), DIRECT | THRESHOLDS),
        (
            "standard",
            standard.StandardTrainerAprilUpdate(**common, **free, l1_penalty=coefficient),
            LINEAR | {"b_dec": "bias"},
        ),
    ):
        if "k" in dict(trainer.ae.named_buffers()):
            places = places | THRESHOLD
        place(trainer.ae, weights, places)
        if name == "topk":  # the trainer calls a latent dead after this many rows
            trainer.num_tokens_since_fired[weights["dead"].bool()] = trainer.dead_feature_threshold
        if name == "matryoshka" and trainer.ae.group_sizes.cumsum(0).tolist() != sizes:
            raise ValueError(f"group_fractions are {trainer.ae.group_sizes.tolist()}, not {sizes}.")
        # after `threshold_start_step`, from when on the threshold is averaged
        found = with_gradients(trainer.ae, places, trainer.loss(weights["even"], step=1001))
        if "threshold" in places:
            found["threshold"] = trainer.ae.threshold
        yield f"dictionary-learning/{name}", found


def overcomplete_steps(weights: Tensors) -> Iterator[tuple[str, Tensors]]:
    """The mean squared error that all of its losses begin with."""
    shape, features = shape_of(weights), weights["even"]
    jump = oc.JumpSAE(*shape, kernel="rectangle", bandwidth=float(weights["bandwidth"]), **MULTIPLIER)
    for name, sae, places in (
        ("topk", oc.TopKSAE(*shape, top_k=int(weights["k"]), **MULTIPLIER), OVERCOMPLETE),
        ("jumprelu", jump, OVERCOMPLETE | {"log_thresholds": "thresholds"}),
    ):
        place(sae, weights, places).train()
        yield f"overcomplete/{name}", with_gradients(sae, places, (features - sae(features)[2]).square().mean())


def main(inputs: str, outputs: str) -> None:
    torch.set_num_threads(1)
    given = load_file(inputs)
    found: Tensors = {}
    for dtype in (torch.float32, torch.float64):
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
        for biases in ("b_enc", "scarce_b_enc"):
            weights["b_enc"] = given[biases].to(dtype)
            for peers in (sae_lens_peers, sparsify_peers, dictionary_learning_peers, overcomplete_peers):
                for name, peer in peers(weights):
                    key = f"{str(dtype).removeprefix('torch.')}/{biases}/{name}"
                    with torch.no_grad():
                        found[f"{key}/latent_acts"] = peer.encode(weights["features"])
                        found[f"{key}/reconstruction"] = peer.reconstruct(weights["features"])
    for steps in (sae_lens_steps, sparsify_steps, dictionary_learning_steps, overcomplete_steps):
        for name, values in steps(given):
            found |= {f"step/{name}/{tensor}": value for tensor, value in values.items()}
    copies = {name: value.detach().contiguous().clone() for name, value in found.items()}
    save_file(copies, outputs, metadata={name: version(name) for name in DISTRIBUTIONS})


if __name__ == "__main__":
    main(*sys.argv[1:])
