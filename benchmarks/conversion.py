"""Do converted SAEs compute what the libraries they come from compute? The table of `docs/conversion.md`.

    python benchmarks/conversion.py    # under a minute, once the environment of the peers is made

Weights are drawn, put into the classes of the released libraries (peers/environment.py), and saved by them; we convert
the files and compare latents and reconstructions with what the library gives for the same rows. The other way, SAEs of
ours are written for SAELens and sparsify, which load them. Then files that cannot be converted are offered, and their
errors noted. A difference is the largest over all rows, divided by the largest number of the tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae._files import write_atomically, write_json
from diffusion_sae.hub.conversion.registry import FORMATS
from diffusion_sae.sae.code import SparseCode

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "tests" / "sae"
sys.path[:0] = [str(ROOT / "benchmarks" / "peers"), str(PEERS)]
from environment import peer_python  # noqa: E402
from peer_weights import draw_weights  # noqa: E402

ROWS, D_IN, NUM_LATENTS, K, SIZES = 40, 96, 768, 16, [192, 384, 768]
TIMESTEPS, AT = [25, 100], 100
PAGE, RESULTS = ROOT / "docs" / "conversion.md", ROOT / "docs" / "results" / "conversion.json"
DISTRIBUTION = {"sae_lens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}
DISTRIBUTION |= {"overcomplete": "overcomplete"}
# of what the files do not say
OPTIONS: dict[str, dict[str, Any]] = {
    "dictionary_learning/topk-threshold": {"activation": "batchtopk"},
    "overcomplete/topk": {"activation": "relu_topk", "k": K, "filename": "state.pt"},
    "overcomplete/topk-signed": {"activation": "signed_topk", "k": K},
    "overcomplete/batchtopk": {"activation": "batchtopk", "k": K, "threshold": 1.5},
    "overcomplete/standard": {"activation": "relu"},
    **{
        f"overcomplete/topk-{norm}": {"activation": "relu_topk", "k": K, "normalization": norm}
        for norm in ("max_l2", "l1", "max_l1", "identity")
    },
}
FOLDERS = {"dictionary_learning/topk-threshold": "dictionary_learning/topk"}
OF_SPARSIFY = ("activation", "skip_connection", "transcode")  # settings that SAeUron has not
Tensors = dict[str, Tensor]


class Row(NamedTuple):
    library: str
    case: str
    here: str
    """activation and input_norm of our config."""
    latents: float
    reconstruction: float


def drawn() -> Tensors:
    """Weights for all, and rows that share a mean and are sums of some of 400 directions."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(400, D_IN, generator=generator), dim=1)
    present = torch.rand(ROWS, 400, generator=generator) < 30 / 400
    return draw_weights((present * (torch.rand(ROWS, 400, generator=generator) + 0.5)) @ directions + 0.3)


def in_peers(action: str, inputs: Path, folder: Path) -> tuple[Tensors, dict[str, str]]:
    script = PEERS / "peer_files.py"
    subprocess.run([peer_python(), script, action, inputs, folder], check=True)
    with safe_open(folder / "outputs.safetensors", "pt") as file:
        versions = file.metadata()
    return load_file(folder / "outputs.safetensors"), versions


@torch.no_grad()
def ours(sae: KSparseAutoencoder, features: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Dense latents and the reconstruction; where there is a `decode`, of the code alone."""
    output = sae(features, **given)
    dense = sae.encode(features, **given).to_dense(NUM_LATENTS)
    torch.testing.assert_close(SparseCode(output.top_acts, output.top_indices).to_dense(NUM_LATENTS), dense)
    if sae.config.input_norm == "none":
        return dense, sae.decode(sae.encode(features, **given), **given)
    return dense, output.reconstruction


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def described(config: Any) -> str:
    return config.activation + ("" if config.input_norm == "none" else f", {config.input_norm}")


def read_from_peers(weights: Tensors, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Their files, converted."""
    save_file(weights, folder / "inputs.safetensors")
    outputs, versions = in_peers("save", folder / "inputs.safetensors", folder)
    rows = []
    for name in sorted({key.rpartition("/")[0] for key in outputs}):
        sae = KSparseAutoencoder.from_foreign(folder / FOLDERS.get(name, name), **OPTIONS.get(name, {}))
        got = ours(sae, weights["features"].float())
        expected = (outputs[f"{name}/latent_acts"], outputs[f"{name}/reconstruction"])
        rows.append(Row(*name.split("/"), described(sae.config), *map(difference, got, expected)))
    return rows, versions


def exported(weights: Tensors) -> Iterator[tuple[str, str, KSparseAutoencoder, dict[str, Any]]]:
    """Format, case, SAE, timestep."""
    thresholds = {"batchtopk": {"threshold": weights["threshold"]}}
    thresholds["jumprelu"] = {"log_threshold": weights["thresholds"].log()}
    cases: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
        **{name: (("sae_lens", "sparsify"), name, {}) for name in ("topk", "relu_topk")},
        **{name: (("sae_lens",), name, {}) for name in ("batchtopk", "jumprelu", "relu")},
        "batchtopk, matryoshka_sizes": (("sae_lens",), "batchtopk", {"matryoshka_sizes": SIZES}),
        "topk, sample_layer_norm": (("sae_lens",), "topk", {"input_norm": "sample_layer_norm"}),
        "topk, constant_norm": (("sae_lens",), "topk", {"input_norm": "constant_norm"}),
        "topk, one of two timesteps": (("sae_lens", "sparsify"), "topk", {"timesteps": TIMESTEPS}),
    }
    for name, (formats, activation, settings) in cases.items():
        config = KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, activation=activation, **settings)
        sae = KSparseAutoencoder(config).eval()
        state = {key: weights[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")} | thresholds.get(activation, {})
        if config.timesteps:
            state |= {"b_dec": torch.stack([weights["b_dec"], 0.5 * weights["b_dec"]])}
            state |= {"timestep_scale": torch.tensor([0.8, 1.3])}
        sae.load_state_dict(state)
        for format in formats:
            yield format, name, sae, {"timestep": AT} if config.timesteps else {}


def written_for_peers(weights: Tensors, folder: Path) -> list[Row]:
    """Our SAEs, loaded by them."""
    expected = {}
    features = weights["features"].float()
    for format, name, sae, timestep in exported(weights):
        sae.save_foreign(folder / format / name, format, **timestep)
        given = {"timesteps": AT} if timestep else {}
        expected[f"{format}/{name}"] = (described(sae.config), ours(sae, features, **given))
    save_file(weights, folder / "inputs.safetensors")
    outputs, _ = in_peers("load", folder / "inputs.safetensors", folder)
    rows = []
    for key, (here, mine) in expected.items():
        theirs = (outputs[f"{key}/latent_acts"], outputs[f"{key}/reconstruction"])
        rows.append(Row(*key.split("/"), here, *map(difference, theirs, mine)))
    return rows


def refusals(folder: Path) -> list[tuple[str, str, str]]:
    """What cannot be converted, with the reason that the error gives."""

    def edited(library: str, case: str, file: str, without: tuple[str, ...] = (), **changes: Any) -> Callable[[], Any]:
        def attempt() -> None:
            source = folder / library / case / file
            before = source.read_text(encoding="utf-8")
            content = json.loads(before)
            settings = content.get("trainer", content)
            settings |= changes
            for key in without:
                del settings[key]
            source.write_text(json.dumps(content), encoding="utf-8")
            try:
                KSparseAutoencoder.from_foreign(source.parent)
            finally:
                source.write_text(before, encoding="utf-8")

        return attempt

    def writing(format: str, **settings: Any) -> Callable[[], Any]:
        config = KSparseAutoencoderConfig(d_in=4, num_latents=8, k=2, **settings)
        return lambda: KSparseAutoencoder(config).save_foreign(folder / "refused", format)

    lens, coder = ("sae_lens", "topk", "cfg.json"), ("sparsify", "topk", "cfg.json")
    kinds = ("abstopk", "matching_pursuit", "temporal", "transcoder")
    attempts: list[tuple[str, str, Callable[[], Any]]] = [
        *(("sae_lens → here", kind, edited(*lens, architecture=kind)) for kind in kinds),
        ("sae_lens → here", "whitening", edited(*lens, normalize_activations="covariance_whitening")),
        (
            *("sae_lens → here", "average norm without its factor"),
            edited(*lens, normalize_activations="expected_average_only_in"),
        ),
        *(
            ("sparsify → here", name, edited(*coder, **change))
            for name, change in {
                "groupmax": {"activation": "groupmax"},
                "skip connection": {"skip_connection": True},
                "transcoder": {"transcode": True},
            }.items()
        ),
        ("saeuron → here", "BatchTopK", edited(*coder, OF_SPARSIFY, batch_topk=True)),
        ("saeuron → here", "TopK of an image", edited(*coder, OF_SPARSIFY, sample_topk=True)),
        (
            "dictionary_learning → here",
            "other classes",
            edited("dictionary_learning", "topk", "config.json", dict_class="CrossCoder"),
        ),
        (
            *("overcomplete → here", "a pickled module"),
            lambda: KSparseAutoencoder.from_foreign(folder / "overcomplete" / "topk", filename="module.pt"),
        ),
        ("here → sae_lens", "signed_topk", writing("sae_lens", activation="signed_topk")),
        ("here → sae_lens", "layer_norm", writing("sae_lens", input_norm="layer_norm")),
        ("here → sparsify", "batchtopk", writing("sparsify", activation="batchtopk")),
        ("here → sparsify", "constant_norm", writing("sparsify", input_norm="constant_norm")),
    ]
    found = []
    for direction, what, attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            found.append((direction, what, str(error).splitlines()[0]))
        else:
            raise RuntimeError(f"{direction}, {what}: it was converted.")
    return found


def measure() -> dict[str, Any]:
    weights = drawn()
    with tempfile.TemporaryDirectory() as name:
        saved, loaded = Path(name, "saved"), Path(name, "loaded")
        saved.mkdir()
        loaded.mkdir()
        read, versions = read_from_peers(weights, saved)
        written = written_for_peers(weights, loaded)
        refused = refusals(saved)
    return {
        "versions": versions,
        "sizes": {"rows": ROWS, "d_in": D_IN, "num_latents": NUM_LATENTS, "k": K},
        "read": [row._asdict() for row in read],
        "written": [row._asdict() for row in written],
        "refused": [dict(zip(("direction", "what", "reason"), row, strict=True)) for row in refused],
    }


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '·') for cell in line)} |" for line in lines)


def tables(result: dict[str, Any]) -> str:
    """The generated part of the page."""
    sizes = result["sizes"]
    versions = {
        library: f"{FORMATS[library].title} {result['versions'][name]}" for library, name in DISTRIBUTION.items()
    }
    columns = ("library", "case", "here", "latents", "reconstruction")

    def measured(rows: list[dict[str, Any]]) -> str:
        cells = [
            (
                versions[row["library"]],
                row["case"],
                row["here"],
                f"{row['latents']:.1e}",
                f"{row['reconstruction']:.1e}",
            )
            for row in rows
        ]
        return table(columns, cells)

    return (
        f"{sizes['rows']} rows, d_in {sizes['d_in']}, {sizes['num_latents']} latents, k {sizes['k']}, float32; largest "
        "difference over the largest number.\n\n"
        f"### Their files, read here\n\n{measured(result['read'])}\n\n"
        f"### Our SAEs, loaded by them\n\n{measured(result['written'])}\n\n"
        "### Refused\n\n"
        + table(
            ("direction", "what", "the error"),
            [(row["direction"], row["what"], row["reason"]) for row in result["refused"]],
        )
        + "\n"
    )


MARK = "<!-- generated by benchmarks/conversion.py -->\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"results (default: {RESULTS.relative_to(ROOT)})")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure()
    write_json(args.out, result)
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    write_atomically(PAGE, lambda path: path.write_text(before + MARK + tables(result), encoding="utf-8"))
    worst = max(row[part] for row in (*result["read"], *result["written"]) for part in ("latents", "reconstruction"))
    print(f"{len(result['read'])} read, {len(result['written'])} written, largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
