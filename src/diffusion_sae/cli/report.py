"""`diffusion-sae report SAE STORE DATASET OUTPUT_DIR`, or `diffusion-sae report SWEEP [OUTPUT_DIR]`."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .selection import add_labels, add_selection, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", help="folder, embedded name or Hub id of a k-SAE; or the folder of a finished sweep")
    parser.add_argument(
        "store", nargs="?", help="feature store of its images; of a sweep: folder of the report (default: in it)"
    )
    parser.add_argument("dataset", nargs="?", help="the images the store was made of")
    parser.add_argument("output_dir", nargs="?", help="folder of the report")
    parser.add_argument("--split", default="train", help="split of a named data set (default: train)")
    parser.add_argument("--title", help="what the report is about (default: the SAE's name)")
    parser.add_argument(
        "--encoded", metavar="DIR", help="sparse codes of the store, made there if need be (default: made and deleted)"
    )
    add_selection(parser)
    add_labels(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if (Path(args.sae) / "sweep.json").is_file():
        from ..report.sweep import write_sweep_report

        return write_sweep_report(args.sae, args.store)
    if args.output_dir is None:
        raise ValueError(
            "A report needs an SAE, its store, its images and a folder to write: SAE STORE DATASET OUTPUT_DIR; or the "
            f"folder of a finished sweep, which {args.sae} is not: it has no sweep.json."
        )
    from .. import FeatureStore, KSparseAutoencoder
    from ..extraction.sources import open_images
    from ..report.sae import Trained, report_saes

    sae = KSparseAutoencoder.from_pretrained(args.sae)
    features = select(FeatureStore(args.store), args, sae.config.timesteps)
    source = open_images(args.dataset, args.split).first(features.num_images)
    with kept_or_temporary(args.encoded, args.output_dir) as encoded:
        trained = Trained(args.sae, sae, features, encoded, args.sae)
        return report_saes(args.output_dir, args.title or args.sae, [trained], source)


@contextmanager
def kept_or_temporary(folder: str | None, output_dir: str) -> Iterator[Path]:
    """The given folder; or one in the output folder that is deleted once all is done, so that a killed call goes on."""
    if folder is not None:
        yield Path(folder)
        return
    temporary = Path(output_dir) / ".encoded"
    yield temporary
    shutil.rmtree(temporary)


def show(result: dict[str, Any]) -> str:
    if "findings" in result:
        return f"{len(result['figures'])} figures and {result['findings']}\n{result['page']}"
    figures = ", ".join(f"{name} {value}" for name, value in result["figures"].items())
    shuffled = result["shuffled_purity"]
    baseline = "" if shuffled is None else f" (shuffled labels: {shuffled:.2f})"
    return f"{figures}{baseline}\n{result['page']}"
