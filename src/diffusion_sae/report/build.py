"""From results to what the page shows."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..analysis.latents import LatentStatistics, label_purity, latent_statistics, purest_latents, shuffled_labels
from ..extraction.sources import ImageSource
from ..features import FeatureSet
from ..probes.modeling import DiffusionProbe
from ..provenance import Provenance
from ..sae.evaluation import evaluate_sae
from ..sae.modeling import KSparseAutoencoder
from .page import Example, Figure, LatentPanel, PageData, Prediction, write_page

TOP_IMAGES = 10


@dataclasses.dataclass(frozen=True)
class LatentFindings:
    """Latents of an SAE on labelled images: panels of the purest, and the mean purity of all beside its baseline."""

    panels: list[LatentPanel]
    purity: float | None
    """None if no latent has enough active images."""
    shuffled_purity: float | None
    measured: int
    """Latents that at least `TOP_IMAGES` images activate."""
    num_latents: int


def find_latents(
    sae: KSparseAutoencoder, features: FeatureSet, source: ImageSource, panels: int = 24
) -> LatentFindings:
    """Statistics of the latents on the images that `features` were extracted from.

    Args:
        sae: the autoencoder.
        features: pooled or token features of the source's images, with labels.
        source: the images themselves.
        panels: how many of the purest latents get a panel.
    """
    if features.image_labels is None:
        raise ValueError("Naming latents needs labelled images: extract from class folders or a labelled data set.")
    if len(source) != features.num_images:
        raise ValueError(
            f"The store has {features.num_images} images, the data {len(source)}: give those it was made of."
        )
    statistics = latent_statistics(sae, features, TOP_IMAGES)
    labels = features.image_labels
    purity = label_purity(statistics, labels)
    shuffled = label_purity(statistics, shuffled_labels(labels))
    chosen = purest_latents(statistics, purity, panels)
    names = features.class_names or [str(i) for i in range(int(labels.max()) + 1)]
    return LatentFindings(
        panels=[
            _panel(
                statistics,
                int(purity.latents[i]),
                names[int(purity.label[i])],
                purity.purity[i].item(),
                names,
                source,
                labels,
            )
            for i in chosen
        ],
        purity=purity.mean,
        shuffled_purity=shuffled.mean,
        measured=len(purity.latents),
        num_latents=sae.config.num_latents,
    )


def _panel(
    statistics: LatentStatistics,
    latent: int,
    name: str,
    purity: float,
    names: Sequence[str],
    source: ImageSource,
    labels: torch.Tensor,
) -> LatentPanel:
    rows = zip(statistics.top_images[latent].tolist(), statistics.top_acts[latent].tolist(), strict=True)
    examples = [Example(source.read(i), names[int(labels[i])], act, source.names[int(i)]) for i, act in rows]
    return LatentPanel(
        latent_index=latent,
        name=name,
        purity=purity,
        density=statistics.density[latent].item(),
        max_activation=statistics.max_acts[latent].item(),
        examples=examples,
    )


def sae_figures(sae: KSparseAutoencoder, features: FeatureSet, findings: LatentFindings) -> list[Figure]:
    """The key numbers of an SAE on these features."""
    metrics = evaluate_sae(sae, features)
    rows = f"on {metrics.rows:,} rows of {features.num_images:,} images"
    figures = [
        Figure("FVU", f"{metrics.fvu:.3f}", f"fraction of variance unexplained {rows}; 0 is perfect"),
        Figure("L0", f"{metrics.l0:.1f}", f"active latents a row, of {findings.num_latents:,}"),
        Figure("Dead latents", f"{metrics.dead_latents:.1%}", f"active in no row, {rows}"),
    ]
    if findings.purity is not None and findings.shuffled_purity is not None:
        note = f"of the {TOP_IMAGES} top images, mean of {findings.measured:,} latents"
        shuffled = f"shuffled labels {findings.shuffled_purity:.2f}"
        figures.append(Figure("Label purity", f"{findings.purity:.2f}", f"{note}; {shuffled}"))
    return figures


def sample_predictions(
    probe: DiffusionProbe, features: FeatureSet, source: ImageSource, count: int
) -> list[Prediction]:
    """What the probe says of the first images."""
    scores = probe.predict(features[:count]).softmax(1)
    names = list(probe.config.id2label.values())
    predictions = []
    for i, row in enumerate(scores):
        best = row.topk(min(3, len(names)))
        label = source.labels[i]
        predictions.append(
            Prediction(
                source.read(i),
                "" if label is None else names[label],
                [(names[int(c)], float(p)) for p, c in zip(best.values, best.indices, strict=True)],
            )
        )
    return predictions


def provenance_rows(provenance: Provenance | None) -> dict[str, str]:
    if provenance is None:
        return {}
    rows = {key: str(value) for key, value in provenance.settings.to_dict().items() if value not in (None, "", False)}
    return rows | {"weights": provenance.weights, "fingerprint": provenance.fingerprint}


def write_sae_report(
    path: str | Path, sae: KSparseAutoencoder, features: FeatureSet, source: ImageSource, *, name: str, panels: int = 24
) -> dict[str, Any]:
    """A page of one SAE on labelled images; returns the numbers it shows."""
    findings = find_latents(sae, features, source, panels)
    figures = sae_figures(sae, features, findings)
    data = PageData(
        title=name,
        subtitle=f"A k-sparse autoencoder with {findings.num_latents:,} latents, {sae.config.k} active at a time.",
        figures=figures,
        baselines=[],
        grid=None,
        latents=findings.panels,
        shuffled_purity=findings.shuffled_purity,
        predictions=[],
        provenance=provenance_rows(sae.provenance),
        commands=[],
    )
    write_page(path, data)
    return {
        "page": str(path),
        "figures": {figure.label: figure.value for figure in figures},
        "purity": findings.purity,
        "shuffled_purity": findings.shuffled_purity,
    }
