"""The report of SAEs on the images of a store: from features to what `build` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.firing import fvu_of_encoded
from ..extraction.images import image_id, to_pixel_value
from ..extraction.sources import ImageSource
from ..features import FeatureSet
from ..sae.code_files import MANIFEST, Manifest
from ..sae.encoding import encode_features
from ..sae.modeling import KSparseAutoencoder
from .build import Report, write_report
from .latents import Dictionary, Labels, Name

COMPARED = 8
"""Images whose content is compared with what the store says of them."""


@dataclass(frozen=True)
class Trained:
    """An SAE and the features it is shown on."""

    name: str
    sae: KSparseAutoencoder
    features: FeatureSet
    encoded: str | Path
    """Folder of the sparse codes; what is there already is used."""
    path: str | None = None
    """Where the SAE is kept, if `diffusion-sae browse` is to find it."""

    def dictionary(self, *, progress: bool = True) -> Dictionary:
        as_it_is: dict[str, Any] = {}
        if (Path(self.encoded) / MANIFEST).is_file():  # whatever `encode` was told of its files, their content serves
            manifest = Manifest.read(Path(self.encoded))
            as_it_is = {"format": manifest.format, "file_rows": manifest.file_rows}
        encoded = encode_features(self.sae, self.features, self.encoded, progress=progress, **as_it_is)
        fvu = fvu_of_encoded(self.sae, self.features, encoded)
        return Dictionary(self.name, self.sae, encoded, names_of(self.sae), fvu, self.path)


def names_of(sae: KSparseAutoencoder) -> Mapping[int, Name]:
    """The names that an SAE's table of latents holds."""
    if sae.latents is None:
        return {}
    columns = [sae.latents.table[name].to_pylist() for name in ("latent_index", "name", "name_score")]
    return {latent: Name(text, score) for latent, text, score in zip(*columns, strict=True) if text}


def labels_of(features: FeatureSet) -> Labels | None:
    if features.image_labels is None or features.image_labels.ndim != 1:
        return None
    values = features.image_labels.numpy().astype(np.int64)
    return Labels(values, features.class_names or [str(i) for i in range(int(values.max()) + 1)])


def _require_same_images(one: Trained, source: ImageSource) -> None:
    """By their number, and by the content of some of them: a page of other images would look like findings."""
    features, provenance = one.features, one.features.provenance
    if len(source) != features.num_images:
        raise ValueError(
            f"The store of {one.name!r} has {features.num_images} images, the data {len(source)}: give those it was "
            "made of."
        )
    if features.image_ids is None or provenance is None or provenance.image_size is None:
        return
    how = {"crop": provenance.crop, "resample": provenance.resample}
    for i in {round(place * (len(source) - 1) / (COMPARED - 1)) for place in range(COMPARED)}:
        if (
            image_id(to_pixel_value(source.read(i), provenance.image_size, source.names[i], **how))
            != features.image_ids[i]
        ):
            raise ValueError(
                f"Image {i} of the data, {source.names[i]!r}, is not image {i} of the store of {one.name!r}: give the "
                "images that it was made of, in their order. Was another --split meant?"
            )


def report_saes(
    folder: str | Path, title: str, trained: Sequence[Trained], source: ImageSource, **shown: Any
) -> dict[str, Any]:
    """Write a report of SAEs on the same images.

    Args:
        folder: of the report.
        title: what it is about.
        trained: the first one's features give labels and the record of the extraction.
        source: the images that the features were extracted from, in their order.
        shown: further fields of `Report`.

    Returns:
        `page`, its path, and the `figures` that it shows of the first SAE.

    Raises:
        ValueError: for features of other images.
    """
    for one in trained:
        _require_same_images(one, source)
    first = trained[0].features
    provenance = first.provenance
    report = Report(
        title,
        source,
        labels=labels_of(first),
        crop="center" if provenance is None else provenance.crop,
        **shown,
    )
    result = write_report(folder, report, [one.dictionary() for one in trained])
    return {"page": result["page"], **_figures(result["saes"][0])}


def _figures(sae: Mapping[str, Any]) -> dict[str, Any]:
    figures = {"FVU": f"{sae['fvu']:.3f}", "L0": f"{sae['l0']:.1f}", "Dead latents": f"{sae['dead']:.1%}"}
    if sae["purity"] is not None:
        figures["Label purity"] = f"{sae['purity']:.2f}"
    return {"figures": figures, "purity": sae["purity"], "shuffled_purity": sae["shuffledPurity"]}
