"""Sparse codes of many rows, from a store to the disk, against the encoder's product of the same rows alone.

    python benchmarks/sae_encoding.py --threads 2 --rows 1000000 --out docs/results/sae-encoding.json     # 1.4 GB
    python benchmarks/sae_encoding.py --rows 8192 --rounds 1                                              # a trial

`encode` is the whole of `encode_features`: hashes, reading, encoder, selection, writing, opening. `product` is
`torch.mm` of the same rows in fp32, in the same blocks as the encoder's, into one kept buffer; rows are read outside of
its time. The sides take turns, and which is first alternates; the ratio is one of medians.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import command, machine

from diffusion_sae import FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig, SparseCodes, encode_features
from diffusion_sae._files import read_json, write_json
from diffusion_sae.features import FeatureSet, StoreWriter
from diffusion_sae.features.columns import StringColumn
from diffusion_sae.provenance import Provenance
from diffusion_sae.sae.encoder import row_block
from diffusion_sae.sae.screening import counted, without_screening

KEY = ("up_ft1", 25)
SHARD_IMAGES = 16_384


def write_store(folder: Path, rows: int, width: int) -> FeatureSet:
    """Pooled features in fp16, a row an image."""
    record = Provenance(model="synthetic", layers=KEY[:1], timesteps=KEY[1:], weights="none")
    writer = StoreWriter(
        folder,
        record,
        source_names=StringColumn.numbers(rows),
        labels=[None] * rows,
        class_names=None,
        shard_size=SHARD_IMAGES,
        store_dtype="float16",
    )
    for number in writer.missing:
        shard, images = writer.new_shard(), writer.part.rows(number)
        names, generator = [str(row) for row in images], torch.Generator().manual_seed(number)
        values = torch.randn(len(images), width, generator=generator)
        shard.add({KEY: values}, names, names, [None] * len(images))
        writer.write(number, shard)
    writer.finish()
    return FeatureStore(folder).select(*KEY)


def product(sae: KSparseAutoencoder, features: FeatureSet, batch_size: int) -> float:
    """Seconds in `torch.mm` alone."""
    W_enc, seconds = sae.W_enc.detach(), 0.0
    block = row_block(batch_size, sae.config.num_latents, W_enc.device, W_enc.element_size())
    buffer = torch.empty(block, sae.config.num_latents)
    for batch in features.batches(batch_size):
        started = time.perf_counter()
        for part in batch.split(block):
            torch.mm(part, W_enc, out=buffer[: len(part)])
        seconds += time.perf_counter() - started
    return seconds


def encode(sae: KSparseAutoencoder, features: FeatureSet, folder: Path, settings: dict[str, Any]) -> float:
    started = time.perf_counter()
    encode_features(sae, features, folder, progress=False, **settings)
    return time.perf_counter() - started


def use(folder: Path) -> dict[str, Any]:
    """What is asked of the codes afterwards."""
    result: dict[str, Any] = {"disk_mb": round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 1)}
    made = SparseCodes(folder)
    latent = int(made.density().argmax())
    some = torch.randint(len(made), (4096,), generator=torch.Generator().manual_seed(0))
    calls = {
        "all_batches": lambda: sum(len(batch.top_acts) for batch in made.batches()),
        "for_latent": lambda: made.for_latent(latent),
        "random_4096_rows": lambda: made[some],
    }
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        result[f"seconds_{name}"] = round(time.perf_counter() - started, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON; what it holds of other shapes stays")
    parser.add_argument("--rows", type=int, default=200_000, help="rows (default: 200000)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side runs (default: 5)")
    parser.add_argument("--d-in", type=int, default=640, help="width of the rows (default: 640)")
    parser.add_argument("--num-latents", type=int, default=10_240, help="latents (default: 10240)")
    parser.add_argument("--k", type=int, default=32, help="active latents of a row (default: 32)")
    parser.add_argument("--batch-size", type=int, default=8192, help="rows encoded at a time (default: 8192)")
    parser.add_argument("--format", choices=("parquet", "safetensors"), default="parquet", help="default: parquet")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--in-fp32", action="store_true", help="as on a processor without bf16: nothing is screened")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = ("rows", "d_in", "num_latents", "k", "batch_size", "format")
    result: dict[str, Any] = {
        "command": command(),
        "machine": machine(),
        **{name: getattr(args, name) for name in options},
    }
    print(json.dumps(result, indent=2))
    config = KSparseAutoencoderConfig(d_in=args.d_in, num_latents=args.num_latents, k=args.k)
    sae = KSparseAutoencoder(config).eval()
    seconds: dict[str, list[float]] = {"product": [], "encode": []}
    with tempfile.TemporaryDirectory() as work:
        features = write_store(Path(work, "store"), args.rows, args.d_in)
        few, folder = FeatureSet.from_tensor(features[: 2 * args.batch_size]), Path(work, "encoded")
        settings = {"batch_size": args.batch_size, "format": args.format}
        product(sae, few, args.batch_size)  # warm
        encode(sae, few, Path(work, "warm"), settings)
        for number in range(args.rounds):
            for side in sorted(seconds, reverse=bool(number % 2)):
                shutil.rmtree(folder, ignore_errors=True)
                if side == "encode":
                    with counted() as screened, without_screening() if args.in_fp32 else nullcontext():
                        seconds[side].append(encode(sae, features, folder, settings))
                    result["screened_rows"], result["redone_rows"] = screened.rows, screened.redone
                    result["use"] = use(folder)
                else:
                    seconds[side].append(product(sae, features, args.batch_size))
            print(f"round {number + 1}: {', '.join(f'{side} {times[-1]:.2f} s' for side, times in seconds.items())}")
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    result["seconds"] = {side: [round(one, 3) for one in times] for side, times in seconds.items()}
    result["rows_per_second"] = {side: round(args.rows / median) for side, median in medians.items()}
    result["throughput_over_product"] = round(medians["product"] / medians["encode"], 3)
    print(json.dumps(result, indent=2))
    if args.out is not None:
        shapes = read_json(args.out)["shapes"] if args.out.is_file() else {}
        name = ",".join(str(result[name]) for name in ("rows", "d_in", "num_latents", "k"))
        shapes[name + ("; in fp32" if args.in_fp32 else "")] = result
        write_json(args.out, {"shapes": shapes})


if __name__ == "__main__":
    main()
