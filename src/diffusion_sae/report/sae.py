"""The report of SAEs on the images of a store: from features to what `build` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..analysis.firing import find_firing, fvu_of_encoded, statistics_of
from ..analysis.latents import LatentStatistics
from ..analysis.naming import ClassScores, NameScores, VocabularyScores, name_latents, read_vocabulary
from ..extraction.images import image_id, to_pixel_value
from ..extraction.sources import ImageSource
from ..extraction.text_image import TextImageModel
from ..features import FeatureSet
from ..sae.code_files import MANIFEST, Manifest
from ..sae.encoding import encode_features
from ..sae.modeling import KSparseAutoencoder
from ..sae.sparse_codes import SparseCodes
from .build import Report, write_report
from .latents import PURITY_OF, Dictionary, Labels, Name, Words

COMPARED = 8
"""Images whose content is compared with what the store says of them."""


@dataclass(frozen=True)
class Vocabulary:
    """Words that latents are named by, and the images of the report in the same space."""

    clip: str
    scores: VocabularyScores

    @classmethod
    def embed(cls, clip: str, words: str | Path | None, source: ImageSource) -> Self:
        """
        Args:
            clip: Hub id or folder of a CLIP or SigLIP of transformers.
            words: file of words, as `read_vocabulary` takes it; None for the packaged ones.
            source: the images of the report.
        """
        model = TextImageModel.from_pretrained(clip)
        return cls(clip, VocabularyScores.of_model(model, read_vocabulary(words), source))


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

    def encode(self) -> SparseCodes:
        as_it_is: dict[str, Any] = {}
        if (Path(self.encoded) / MANIFEST).is_file():  # whatever `encode` was told of its files, their content serves
            manifest = Manifest.read(Path(self.encoded))
            as_it_is = {"format": manifest.format, "file_rows": manifest.file_rows}
        return encode_features(self.sae, self.features, self.encoded, **as_it_is)

    def dictionary(self, vocabulary: Vocabulary | None = None) -> Dictionary:
        encoded = self.encode()
        firing = find_firing(encoded)
        statistics = statistics_of(firing, PURITY_OF)
        names, words = _names(statistics, self.features, vocabulary)
        return Dictionary(
            self.name,
            self.sae,
            encoded,
            firing,
            {**names, **_recorded_names(self.sae)},
            words,
            fvu_of_encoded(self.sae, self.features, encoded),
            self.path,
        )


def _names(
    statistics: LatentStatistics, features: FeatureSet, vocabulary: Vocabulary | None
) -> tuple[dict[int, Name], Words | None]:
    """From the vocabulary, else from the classes of the images, else none."""
    labels, words = labels_of(features), None
    if vocabulary is not None:
        scores: NameScores = vocabulary.scores
        weights = statistics.top_acts.clamp_min(1e-30)  # of a latent that fires nowhere, too, a mean is taken
        directions = vocabulary.scores.directions(statistics.top_images, weights)
        directions[statistics.top_acts.amax(1) <= 0] = 0  # it fires nowhere: no text is to find it
        words = Words(vocabulary.clip, directions)
    elif labels is not None:
        scores = ClassScores(torch.from_numpy(labels.values), labels.names)
    else:
        return {}, None
    named = name_latents(statistics, scores)
    names = {n.latent_index: Name(n.name, n.score, n.unit, n.runner_up, n.chance) for n in named}
    return names, words


def _recorded_names(sae: KSparseAutoencoder) -> dict[int, Name]:
    """Those that the SAE's table of latents holds: they come before others."""
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
    folder: str | Path,
    title: str,
    trained: Sequence[Trained],
    source: ImageSource,
    vocabulary: Vocabulary | None = None,
    **shown: Any,
) -> dict[str, Any]:
    """Write a report of SAEs on the same images.

    Args:
        folder: of the report.
        title: what it is about.
        trained: the first one's features give labels and the record of the extraction.
        source: the images that the features were extracted from, in their order.
        vocabulary: what latents are named by; without one, by the classes of their images.
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
    result = write_report(folder, report, [one.dictionary(vocabulary) for one in trained])
    return {"page": result["page"], **_figures(result["saes"][0])}


def _figures(sae: Mapping[str, Any]) -> dict[str, Any]:
    figures = {"FVU": f"{sae['fvu']:.3f}", "L0": f"{sae['l0']:.1f}", "Dead latents": f"{sae['dead']:.1%}"}
    if sae["purity"] is not None:
        figures["Label purity"] = f"{sae['purity']:.2f}"
    return {"figures": figures, "purity": sae["purity"], "shuffled_purity": sae["shuffledPurity"]}
