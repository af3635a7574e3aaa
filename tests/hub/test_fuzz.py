"""Hundreds of thousands of damaged and hostile files: whatever they hold, the error is one of the library's own.

A case is a document that is right, with up to four changes: values of any kind and size in any place, keys taken out or
added, bytes overwritten. A seed makes a batch of cases; hypothesis chooses the seeds and reports the one that fails.

    python -m pytest tests/hub/test_fuzz.py -m "not slow"            # a few hundred cases a target
    python -m pytest tests/hub/test_fuzz.py -m slow                  # 2,500
    FUZZ_SEEDS=4000 python -m pytest tests/hub/test_fuzz.py -m slow  # 100,000: minutes a target
"""

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from diffusion_sae import DiffusionProbeConfig, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae._files import parse_json
from diffusion_sae.features.layout import Manifest, parse_header
from diffusion_sae.hub.conversion import ForeignOptions, read_foreign
from diffusion_sae.hub.conversion.checkpoint import Checkpoint
from diffusion_sae.hub.conversion.pickles import read_pickle, tensors_of
from diffusion_sae.hub.conversion.registry import FORMATS
from diffusion_sae.hub.safe_files import refuse_not_finite, shards_of, tensor_table
from diffusion_sae.provenance import Provenance

OWN_ERRORS = (ValueError, OSError, StrictDataclassError)
BATCH = 25  # cases a seed
FEW, MANY = 8, int(os.environ.get("FUZZ_SEEDS", "100"))  # seeds
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        24,
        2**31,
        2**63,
        10**30,
        -(10**30),
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "topk",
        "relu",
        "jumprelu",
        "../../etc/passwd",
        "/dev/zero",
        "a" * 5000,
        "\0",
        "\ud800",
        "6.0.0",
        "none",
    ),
    *([], [1], [[]], [None], ["x"], [3, 1], [0, -1], {}, {"a": 1}, {"k": 3}, {"a": {"b": [1]}}, [10**20]),
]
D_IN, NUM_LATENTS = 3, 6
RECORD = Provenance(model="a/b", layers=("up_ft1",), timesteps=(25,), image_size=64, weights="0" * 16)


def places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    found: list[tuple[Any, Any]] = []
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inside):
        found.append((content, key))
        found += places(value)
    return found


def changed(document: Any, draw: random.Random) -> Any:
    document = copy.deepcopy(document)
    for _ in range(draw.randint(0, 4)):
        where = places(document)
        if not where:
            return document
        container, key = draw.choice(where)
        action = draw.random()
        if action < 0.7:
            container[key] = copy.deepcopy(draw.choice(VALUES))
        elif action < 0.85 or isinstance(container, list):
            del container[key]
        else:
            container[draw.choice(("x", "__class__", "k", "metadata", "shape"))] = copy.deepcopy(draw.choice(VALUES))
    return document


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Now and then: bytes overwritten, cut off or repeated."""
    if draw.random() < 0.7 or not content:
        return content
    at, action = draw.randrange(len(content)), draw.random()
    if action < 0.6:
        return content[:at] + draw.randbytes(draw.randint(1, 8)) + content[at + 4 :]
    return content[:at] if action < 0.8 else content + content[at:]


def text_of(document: Any, draw: random.Random) -> bytes:
    return damaged(json.dumps(changed(document, draw)).encode(), draw)


SAE = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=2, timesteps=[25, 100]).to_dict()
PROBE = DiffusionProbeConfig(d_in=D_IN, head="attention", id2label={0: "a", 1: "b"}).to_dict()
MARK = {
    "shard": f"shard-00000 of {RECORD.fingerprint} over f",
    **{"rows": 2, "bytes": {".safetensors": 9, ".parquet": 9}, "sha256": {".safetensors": "0", ".parquet": "0"}},
    "skipped": [{"source": "a", "reason": "b"}],
}
MANIFEST = {
    **{"format_version": 2, "provenance": RECORD.to_dict(), "dtype": "float32", "class_names": ["a"], "labelled": True},
    "parts": [{"data_fingerprint": "f", "num_images": 2, "shard_size": 2, "first_shard": 0}],
    **{"complete": True, "shards": [MARK]},
}
INDEX = {
    "metadata": {"total_size": 9},
    "weight_map": {"W_enc": "model-00001-of-00002.safetensors", "b_dec": "b.safetensors"},
}
HEADER = {
    "__metadata__": {"shard": "x"},
    "W_enc": {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]},
    "b_enc": {"dtype": "F16", "shape": [6], "data_offsets": [72, 84]},
}


def fuzz_config(draw: random.Random, folder: Path) -> None:
    content = parse_json(text_of(draw.choice((SAE, PROBE)), draw), "config.json")
    kind = draw.choice((KSparseAutoencoderConfig, DiffusionProbeConfig))
    if isinstance(content, dict) and content.get("num_labels") is None:
        kind.from_dict(content)


def fuzz_provenance(draw: random.Random, folder: Path) -> None:
    path = folder / "extractor_config.json"
    path.write_bytes(text_of({**RECORD.to_dict(), "fingerprint": RECORD.fingerprint}, draw))
    Provenance.load(path).describe()


def fuzz_manifest(draw: random.Random, folder: Path) -> None:
    manifest = Manifest.parse(text_of(MANIFEST, draw), "manifest.json")
    manifest.record.select("up_ft1", 25)
    for number in range(len(manifest.shards)):
        manifest.part_of(number).rows(number)
    manifest.labels_named(None)


def fuzz_index(draw: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(text_of(INDEX, draw))
    for name, shard in shards_of(path).items():
        assert isinstance(name, str)
        assert Path(shard).name == shard


def fuzz_header(draw: random.Random, folder: Path) -> None:
    header = text_of(HEADER, draw)
    parse_header(header, "header")
    path = folder / "model.safetensors"
    length = draw.choice((len(header), len(header), len(header), 0, 2**63, len(header) + 3))
    path.write_bytes(damaged(struct.pack("<Q", length) + header + bytes(84), draw))
    tensor_table(path)


def drawn_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(D_IN, NUM_LATENTS, generator=generator),
        "b_enc": torch.randn(NUM_LATENTS, generator=generator),
        "W_dec": torch.randn(NUM_LATENTS, D_IN, generator=generator),
        "b_dec": torch.randn(D_IN, generator=generator),
    }


T = drawn_tensors()
LINEAR = {
    "encoder.weight": T["W_enc"].T,
    "encoder.bias": T["b_enc"],
    "decoder.weight": T["W_dec"].T,
    "b_dec": T["b_dec"],
}
CODER = {**{key: value for key, value in LINEAR.items() if key != "decoder.weight"}, "W_dec": T["W_dec"]}
ONE, MANY_OF = torch.tensor(0.5), torch.rand(NUM_LATENTS, generator=torch.Generator().manual_seed(1))
LENS = {
    "d_in": D_IN,
    "d_sae": NUM_LATENTS,
    "k": 2,
    "apply_b_dec_to_input": False,
    "metadata": {"sae_lens_version": "6.0.0"},
}
LENS |= {"normalize_activations": "none", "rescale_acts_by_decoder_norm": True}
OLD = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": False, "d_in": D_IN}
SPARSIFY = {"d_in": D_IN, "k": 2, "num_latents": 0, "activation": "topk", "transcode": False, "expansion_factor": 2}
SAEURON = {"d_in": D_IN, "k": 2, "batch_topk": False, "input_unit_norm": True, "num_latents": 0}
UNBOX = {
    "encoder.weight": T["W_enc"].T,
    "latent_bias": T["b_enc"],
    "decoder.weight": T["W_dec"].T,
    "pre_bias": T["b_dec"],
}
OVERCOMPLETE = {
    "encoder.final_block.0.weight": T["W_enc"].T,
    **{"encoder.final_block.0.bias": T["b_enc"], "dictionary._weights": T["W_dec"], "dictionary.multiplier": ONE},
}
BATCH_TOP_K = {"k": torch.tensor(2), "threshold": ONE}
FOREIGN: list[tuple[str, dict[str, Any], str, str, dict[str, Tensor]]] = [
    *(
        ("sae_lens", LENS | {"architecture": kind}, "cfg.json", "sae_weights.safetensors", tensors)
        for kind, tensors in {
            "topk": T,
            "jumprelu": T | {"threshold": MANY_OF},
            "batchtopk": T | {"topk_threshold": ONE},
            "gated": {
                "W_enc": T["W_enc"],
                "b_mag": T["b_enc"],
                "b_gate": MANY_OF,
                "r_mag": MANY_OF,
                "W_dec": T["W_dec"],
                "b_dec": T["b_dec"],
            },
        }.items()
    ),
    ("sae_lens", OLD, "cfg.json", "sae_weights.safetensors", T),
    ("sparsify", SPARSIFY, "cfg.json", "sae.safetensors", CODER),
    ("saeuron", SAEURON, "cfg.json", "sae.safetensors", CODER),
    (
        "dictionary_learning",
        {"trainer": {"dict_class": "AutoEncoderTopK", "k": 2}},
        "config.json",
        "ae.pt",
        LINEAR | BATCH_TOP_K,
    ),
    (
        "dictionary_learning",
        {"trainer": {"dict_class": "MatryoshkaBatchTopKSAE"}},
        "config.json",
        "ae.pt",
        T | BATCH_TOP_K | {"group_sizes": torch.tensor([2, 4])},
    ),
    (
        "dictionary_learning",
        {"trainer": {"dict_class": "JumpReluAutoEncoder"}},
        "config.json",
        "ae.pt",
        T | {"threshold": MANY_OF},
    ),
    (
        "dictionary_learning",
        {"trainer": {"dict_class": "AutoEncoder"}},
        "config.json",
        "ae.pt",
        {**{k: v for k, v in LINEAR.items() if k != "b_dec"}, "bias": T["b_dec"]},
    ),
    ("sdxl_unbox", {"k": 2, "d_model": D_IN, "n_dirs_local": NUM_LATENTS}, "config.json", "state_dict.pth", UNBOX),
    ("overcomplete", {}, "no.json", "weights.pt", OVERCOMPLETE),
    ("revelio", {}, "no.json", "weights.pt", T),
]
OPTIONS: dict[str, Any] = {"k": 2, "activation": None, "threshold": 0.5, "normalization": "l2", "scaling_factor": 2.0}
OF_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    *(lambda t: t.T if t.ndim == 2 else t, lambda t: t[..., :0], lambda t: t[None], lambda t: t.reshape(-1)[0]),
    *(lambda t: t.long(), lambda t: t > 0, lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.double() * 1e200),
    *(lambda t: t * float("nan"), lambda t: t * 0, lambda t: t.expand(5, *t.shape), lambda t: t.to(torch.complex64)),
    *(lambda t: ~t if t.dtype == torch.bool else -t, lambda t: t.to_sparse(), lambda t: [1], lambda t: None),
)


def _is_plain(value: Any) -> bool:
    """What each of OF_TENSORS can be applied to."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_complex()
        and value.numel() > 0 < value.ndim
    )


class InMemory(Checkpoint):
    """As a folder with these files; what reading the files themselves can meet is fuzzed by the other targets."""

    content: dict[str, Any]
    texts: dict[str, bytes]

    def has(self, *names: str) -> bool:
        return set(names) <= {*self.content, *self.texts}

    def json(self, name: str) -> dict[str, Any]:
        if name not in self.texts:
            raise FileNotFoundError(2, "no such file", name)
        content = parse_json(self.texts[name], name)
        if not isinstance(content, dict):
            raise ValueError(f"{name} holds no object")  # noqa: TRY004
        return content

    def sole_weights(self) -> str | None:
        return next(iter(self.content))

    def tensors(self, name: str) -> dict[str, Tensor]:
        self.read[name] = found = tensors_of(self.content[name], name)
        refuse_not_finite(found, name)
        return found


def fuzz_foreign(draw: random.Random, folder: Path) -> None:
    format, config, config_name, weights_name, tensors = draw.choice(FOREIGN)
    tensors = dict(tensors)
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        name = draw.choice(sorted(tensors))
        action = draw.random()
        if action < 0.75 and _is_plain(tensors[name]):
            tensors[name] = draw.choice(OF_TENSORS)(tensors[name])
        elif action < 0.9:
            tensors[draw.choice(("W_skip", "b_dec", "dictionary.C", "scaling_factor"))] = tensors.pop(name)
        if not tensors:
            return
    options = ForeignOptions.from_dict(
        changed(OPTIONS, draw) if draw.random() < 0.5 else {"k": 2, "activation": "relu_topk"}
    )
    checkpoint = InMemory(folder, "fuzzed")
    checkpoint.content, checkpoint.texts = {weights_name: tensors}, {config_name: text_of(config, draw)}
    foreign = FORMATS[format].read(checkpoint, options)
    refuse_not_finite(foreign.tensors(), "converted")
    size = {"d_in": foreign.weights.d_in, "num_latents": foreign.weights.num_latents}
    settings = KSparseAutoencoderConfig(**{"k": 2} | foreign.config | size)
    with torch.device("meta"):
        sae = KSparseAutoencoder(settings)
    sae.load_state_dict(foreign.tensors(), assign=True)
    sae.eval()(torch.ones(2, settings.d_in, dtype=sae.dtype))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("archive") / "weights.pt"
    torch.save({"state_dict": T}, path)
    return path.read_bytes()


def fuzz_pickle(draw: random.Random, folder: Path, content: bytes) -> None:
    path = folder / "weights.pt"
    start = content.find(b"\x80\x02}")  # the pickle, where a change means most
    at = draw.randrange(start, start + 400) if draw.random() < 0.8 else draw.randrange(len(content))
    path.write_bytes(content[:at] + draw.randbytes(draw.randint(1, 3)) + content[at + draw.randint(0, 3) :])
    tensors_of(read_pickle(path), "weights.pt")


def fuzz_file(draw: random.Random, folder: Path) -> None:
    """Whole folders: a file of a format under a changed name and text."""
    _, config, config_name, weights_name, tensors = draw.choice(FOREIGN)
    for path in folder.iterdir():
        path.unlink()
    (folder / config_name).write_bytes(text_of(config, draw))
    path = folder / draw.choice((weights_name, "sae.safetensors", "sae_weights.safetensors"))
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
        path.write_bytes(damaged(path.read_bytes(), draw))
    else:
        torch.save(tensors, path)
    read_foreign(folder, ForeignOptions(k=2, activation=draw.choice((None, "relu_topk", "batchtopk"))))


TARGETS = {
    "config": fuzz_config,
    "provenance": fuzz_provenance,
    "manifest": fuzz_manifest,
    "index": fuzz_index,
    "header": fuzz_header,
    "foreign": fuzz_foreign,
    "foreign-files": fuzz_file,
}


def attempts(seed: int, target: Callable[[random.Random], None]) -> Iterator[int]:
    for case in range(BATCH):
        try:
            target(random.Random(f"{seed} {case}"))
        except OWN_ERRORS:
            yield 1
        else:
            yield 0


def run(target: Callable[[random.Random], None], seeds: int) -> None:
    refused = []

    @settings(
        max_examples=seeds, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**64))
    def cases(seed: int) -> None:
        refused.extend(attempts(seed, target))

    cases()
    assert len(refused) >= seeds * BATCH
    assert 0.05 < sum(refused) / len(refused) < 0.999, "some are right and some are wrong"


@pytest.mark.parametrize("name", TARGETS)
def test_some_cases(name: str, tmp_path: Path) -> None:
    run(lambda draw: TARGETS[name](draw, tmp_path), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_cases(name: str, tmp_path: Path) -> None:
    # whole folders are slow to write, and "foreign" has the same formats
    run(lambda draw: TARGETS[name](draw, tmp_path), MANY // 10 if name == "foreign-files" else MANY)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_pickles(seeds: int, tmp_path: Path, archive: bytes) -> None:
    run(lambda draw: fuzz_pickle(draw, tmp_path, archive), seeds)
