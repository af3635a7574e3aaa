"""`diffusion-sae report SAE STORE DATASET OUTPUT_DIR`, or `diffusion-sae report SWEEP [OUTPUT_DIR]`."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .selection import add_labels, add_selection, select

if TYPE_CHECKING:
    import numpy as np

    from ..features import FeatureSet
    from ..report.sae import Trained
    from ..sae.modeling import KSparseAutoencoder

METHODS = ("pca", "umap", "tsne")  # of analysis.maps, which loads torch
COLOURED = 48
"""Images whose positions are shown as colours."""


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
    parser.add_argument(
        "--also",
        nargs=2,
        action="append",
        metavar=("SAE", "STORE"),
        help="a further SAE with its store of these images",
    )
    parser.add_argument("--sweep", metavar="DIR", help="folder of a finished sweep, for the view of layers × timesteps")
    parser.add_argument(
        "--map",
        nargs="+",
        choices=METHODS,
        default=["pca"],
        metavar="METHOD",
        help="maps of the images by their features: pca, umap, tsne (default: pca)",
    )
    parser.add_argument(
        "--positions", metavar="STORE", help="token store of several layers and timesteps of these images, to colour"
    )
    parser.add_argument("--clip", metavar="MODEL", help="CLIP or SigLIP of transformers that latents are named by")
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="words that --clip names latents by, one a line (default: the packaged)"
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
    if args.vocabulary is not None and args.clip is None:
        raise ValueError("--vocabulary belongs to --clip, the model that fits its words to images. Give both.")
    from ..analysis.maps import image_map
    from ..analysis.sweep.results import SweepResults
    from ..extraction.sources import open_images
    from ..report.grids import sweep_grids
    from ..report.sae import Vocabulary, report_saes

    pairs = [(args.sae, args.store), *(args.also or ())]
    sources = [_features(args, *pair) for pair in pairs]
    source = open_images(args.dataset, args.split).first(sources[0][1].num_images)
    vocabulary = None if args.clip is None else Vocabulary.embed(args.clip, args.vocabulary, source)
    grids = [] if args.sweep is None else sweep_grids(SweepResults.read(args.sweep))
    with _kept_or_temporary(args.encoded, args.output_dir) as folder:
        trained = [
            _trained(name, *one, folder if i == 0 else folder.with_name(f"{folder.name}-{i}"))
            for i, ((name, _), one) in enumerate(zip(pairs, sources, strict=True))
        ]
        return report_saes(
            args.output_dir,
            args.title or args.sae,
            trained,
            source,
            vocabulary,
            grids=grids,
            maps={f"{name.upper()} of the features": image_map(sources[0][1], name).points for name in args.map},
            colours={} if args.positions is None else _colours(args.positions),
        )


def _colours(store: str) -> "dict[tuple[str, int], np.ndarray]":
    from .. import FeatureStore
    from ..analysis.maps import colour_maps
    from ..report.build import to_bytes

    opened = FeatureStore(store)
    maps = colour_maps(opened, range(min(COLOURED, len(opened))))
    return {cell: to_bytes(own.rgb) for cell, own in maps.items()}


def _features(args: argparse.Namespace, name: str, store: str) -> "tuple[KSparseAutoencoder, FeatureSet]":
    from .. import FeatureStore, KSparseAutoencoder

    sae = KSparseAutoencoder.from_pretrained(name)
    return sae, select(FeatureStore(store), args, sae.config.timesteps)


def _trained(name: str, sae: "KSparseAutoencoder", features: "FeatureSet", folder: Path) -> "Trained":
    from ..report.sae import Trained

    return Trained(name, sae, features, folder, str(Path(name).resolve()) if Path(name).is_dir() else name)


@contextmanager
def _kept_or_temporary(folder: str | None, output_dir: str) -> Iterator[Path]:
    """The given folder; or one in the output folder that is deleted once all is done, so that a killed call goes on."""
    if folder is not None:
        yield Path(folder)
        return
    temporary = Path(output_dir) / ".encoded"
    yield temporary / "0"
    shutil.rmtree(temporary)


def show(result: dict[str, Any]) -> str:
    if "findings" in result:
        return f"{len(result['figures'])} figures and {result['findings']}\n{result['page']}"
    figures = ", ".join(f"{name} {value}" for name, value in result["figures"].items())
    shuffled = result["shuffled_purity"]
    baseline = "" if shuffled is None else f" (shuffled labels: {shuffled:.2f})"
    return f"{figures}{baseline}\n{result['page']}"
