"""A report: a folder that opens from the disk, offline. `index.html` shows what is in one folder of files beside it."""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from safetensors.torch import save_file

from .._files import require_writable_folder, write_atomically, write_json
from ..extraction.sources import ImageSource
from ..provenance import Provenance
from .grids import Grid
from .latents import Dictionary, Labels, write_dictionary
from .packing import DataFolder
from .thumbnails import write_thumbnails

STATIC = resources.files("diffusion_sae.report").joinpath("static")
"""Made of `page/` by `make page`."""
WORDS = "words.safetensors"
COLOUR_BLOCK = 16
"""Images a file of colours."""
FILES = "files-"
MARK = '<meta name="generator" content="diffusion-sae report">'
_POINTER = re.compile(r'"(files-\w+)/browser\.js"')


@dataclass(frozen=True)
class Bar:
    """One bar of the chart of accuracies; `highlight` marks the probe that the report is about."""

    name: str
    accuracy: float
    """0…1."""
    note: str = ""
    highlight: bool = False


@dataclass(frozen=True)
class Report:
    """All that a report shows beside its SAEs. What is empty or None is left out."""

    title: str
    source: ImageSource
    """The images that the SAEs' sparse codes are of, in their order."""
    labels: Labels | None = None
    crop: str = "center"
    """How the extraction made the images square."""
    maps: Mapping[str, Float[np.ndarray, "images 2"]] = field(default_factory=dict)
    """Places of the images in the plane, by what they were made of."""
    grids: Sequence[Grid] = ()
    colours: Mapping[tuple[str, int], UInt8[np.ndarray, "n side side 3"]] = field(default_factory=dict)
    """The first n images at each layer and timestep, as `analysis.maps.colour_maps` gives them, in bytes."""
    bars: Sequence[Bar] = ()
    predictions: Float[np.ndarray, "images classes"] | None = None
    """A probe's probabilities."""
    provenance: Provenance | None = None
    commands: Sequence[str] = ()


def write_report(folder: str | Path, report: Report, dictionaries: Sequence[Dictionary]) -> dict[str, Any]:
    """Write a report and return its summary; a kill leaves the report that was there before.

    Args:
        folder: made if need be; an earlier report in it is replaced.
        report: images, labels and more.
        dictionaries: one or several SAEs, each with its sparse codes of all these images.

    Raises:
        ValueError: for sparse codes of another number of images, and a folder with an `index.html` of something else.
    """
    folder = _require_own_folder(Path(folder))
    _check(report, dictionaries)
    files = Path(tempfile.mkdtemp(prefix=FILES, dir=folder))
    files.chmod(0o755)
    for name in ("browser.js", "browser.css"):
        (files / name).write_bytes(STATIC.joinpath(name).read_bytes())
    data = DataFolder(files / "data")
    sheets = write_thumbnails(data.root, report.source, report.crop)
    _write_images(data, report)
    _write_colours(data, report)
    described = [write_dictionary(data, f"sae{i}", one, report.labels) for i, one in enumerate(dictionaries)]
    summary = _summary(report, dictionaries, described) | {"sheets": sheets.to_dict()}
    data.write("report", summary)
    _write_browse(files, described, dictionaries)
    page = STATIC.joinpath("index.html").read_text(encoding="utf-8")
    write_atomically(folder / "index.html", lambda path: path.write_text(page.replace("FILES", files.name), "utf-8"))
    for other in folder.glob(f"{FILES}*"):
        if other != files:
            shutil.rmtree(other)
    return {"page": str((folder / "index.html").resolve()), "saes": described}


def _write_browse(files: Path, described: Sequence[dict[str, Any]], dictionaries: Sequence[Dictionary]) -> None:
    """What the server needs and the page does not: where the SAEs are."""
    saes = {}
    for entry, one in zip(described, dictionaries, strict=True):
        words = one.words
        saes[entry["key"]] = {
            "path": one.path,
            "weights": entry["fingerprint"],
            "latents": entry["latents"],
            "layer": one.layer,
            "timesteps": entry["timesteps"],
            "clip": None if words is None else words.clip,
        }
        if words is not None:
            content = {"directions": words.directions.float().contiguous()}
            write_atomically(files / f"{entry['key']}-{WORDS}", lambda path, held=content: save_file(held, path))
    write_json(files / "browse.json", {"saes": saes})


def files_of(folder: str | Path) -> Path:
    """The folder of files that a report shows.

    Raises:
        FileNotFoundError: if there is no report.
    """
    index = Path(folder) / "index.html"
    found = _POINTER.search(index.read_text(encoding="utf-8")) if index.is_file() else None
    if found is None:
        raise FileNotFoundError(f"{str(folder)!r} holds no report. Make one with `diffusion-sae report`.")
    return Path(folder) / found[1]


def _require_own_folder(folder: Path) -> Path:
    require_writable_folder(folder)
    index = folder / "index.html"
    if index.exists() and MARK not in index.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{index} is of something else, and would be overwritten. Choose another folder.")
    return folder


def _check(report: Report, dictionaries: Sequence[Dictionary]) -> None:
    if not dictionaries:
        raise ValueError("A report needs at least one SAE, got none.")
    images = len(report.source)
    for one in dictionaries:
        manifest = one.encoded.manifest
        if manifest.rows != images * manifest.rows_per_image:
            raise ValueError(
                f"The sparse codes of {one.name!r} are of {manifest.rows // manifest.rows_per_image} images, the data "
                f"have {images}: give the images that the store was made of."
            )
    sizes = {"labels": None if report.labels is None else len(report.labels.values)}
    layers, timesteps = _axes(report)
    if len(report.colours) != len(layers) * len(timesteps):
        raise ValueError(f"colours must be of each of {layers} at each of {timesteps}, got {list(report.colours)}.")
    sizes |= {f"the map {name!r}": len(places) for name, places in report.maps.items()}
    sizes["predictions"] = None if report.predictions is None else len(report.predictions)
    for name, size in sizes.items():
        if size not in (None, images):
            raise ValueError(f"{name} must have one entry an image: {images} images, {size} entries.")


def _write_images(data: DataFolder, report: Report) -> None:
    arrays: dict[str, np.ndarray] = {
        f"map{i}": places.astype(np.float32) for i, places in enumerate(report.maps.values())
    }
    if report.labels is not None:
        arrays["label"] = report.labels.values.astype(np.int32)
    if report.predictions is not None:
        best = np.argsort(-report.predictions, axis=1)[:, :3]
        arrays["guesses"] = best.astype(np.int32)
        arrays["chances"] = np.take_along_axis(report.predictions, best, 1).astype(np.float32)
    data.write("images", {"names": list(report.source.names)}, arrays)


def to_bytes(colours: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """0…1 as 0…255."""
    return np.rint(255 * colours).astype(np.uint8)


def _axes(report: Report) -> tuple[list[str], list[int]]:
    """Layers and timesteps of the colours, in their order."""
    return list(dict.fromkeys(layer for layer, _ in report.colours)), sorted({t for _, t in report.colours})


def _write_colours(data: DataFolder, report: Report) -> None:
    layers, timesteps = _axes(report)
    images = min((len(pixels) for pixels in report.colours.values()), default=0)
    for start in range(0, images, COLOUR_BLOCK):
        arrays = {
            f"l{i}t{j}": report.colours[layer, t][start : min(start + COLOUR_BLOCK, images)]
            for i, layer in enumerate(layers)
            for j, t in enumerate(timesteps)
        }
        data.write(f"pca-{start // COLOUR_BLOCK:04d}", None, arrays)


def _colours(report: Report) -> dict[str, Any] | None:
    if not report.colours:
        return None
    layers, timesteps = _axes(report)
    images = min(len(pixels) for pixels in report.colours.values())
    return {"layers": layers, "timesteps": timesteps, "images": list(range(images)), "block": COLOUR_BLOCK}


def _summary(report: Report, dictionaries: Sequence[Dictionary], described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    saes = []
    for one, entry in zip(dictionaries, described, strict=True):
        record = one.encoded.provenance
        saes.append(
            entry
            | {
                "layer": one.layer,
                "provenance": provenance_rows(record),
            }
        )
    return {
        "title": report.title,
        "classes": None if report.labels is None else list(report.labels.names),
        "maps": list(report.maps),
        "grids": [asdict(grid) for grid in report.grids],
        "pca": _colours(report),
        "bars": [asdict(bar) for bar in report.bars],
        "predictions": report.predictions is not None,
        "commands": list(report.commands),
        "saes": saes,
    }


def provenance_rows(provenance: Provenance | None) -> dict[str, str]:
    """What to show of an extraction: the settings that are set."""
    if provenance is None:
        return {}
    settings = provenance.settings.to_dict()
    rows = {
        key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for key, value in settings.items()
        if value not in (None, "", False, [], ())
    }
    return rows | {"weights": provenance.weights, "fingerprint": provenance.fingerprint}
