"""The table of an SAE's latents, from the features of images."""

import pyarrow as pa
import torch

from ..features import FeatureSet
from ..sae.latent_table import MAX_TOP_IMAGES, SCHEMA, LatentSource, LatentTable
from ..sae.modeling import KSparseAutoencoder
from .latents import LatentStatistics, label_purity, latent_statistics


def latent_table(
    sae: KSparseAutoencoder,
    features: FeatureSet,
    *,
    n: int = 16,
    dataset: str | None = None,
    split: str | None = None,
    labels: str | None = None,
) -> LatentTable:
    """Density, activations, top images and labels of every latent: what `sae.latents` takes and an artifact carries.

    One pass over the features, in memory that does not grow with the number of images.

    Args:
        sae: the autoencoder; the features must come from its extraction.
        features: pooled or token features of a store; if its images have one label each, so have the latents.
        n: top images kept of each latent; its label is that of most of them, and None where fewer than n are active.
        dataset, split, labels: what the images and the labels are called, for the record.

    Raises:
        ValueError: for features of another extraction or without image ids, and for n beyond 1…1024.
    """
    if features.image_ids is None:
        raise ValueError("The features have no image ids: take them from a FeatureStore, not from a tensor.")
    if not 1 <= n <= MAX_TOP_IMAGES:
        raise ValueError(f"n must lie in 1…{MAX_TOP_IMAGES} images a latent, got {n}.")
    return table_of(latent_statistics(sae, features, n), features, dataset=dataset, split=split, labels=labels)


def table_of(
    statistics: LatentStatistics,
    features: FeatureSet,
    *,
    dataset: str | None = None,
    split: str | None = None,
    labels: str | None = None,
) -> LatentTable:
    """The table of statistics that are there already; arguments as in `latent_table`."""
    num_latents, n = statistics.top_acts.shape
    columns = {
        "latent_index": pa.array(range(num_latents), pa.int32()),
        "density": pa.array(statistics.density.numpy()),
        "mean_activation": pa.array(statistics.mean_acts.numpy()),
        "max_activation": pa.array(statistics.max_acts.contiguous().numpy()),
        **_top_images(statistics, features),
        **_labels(statistics, features),
    }
    for name in SCHEMA.names:
        columns.setdefault(name, pa.nulls(num_latents, SCHEMA.field(name).type))
    made_of = LatentSource(
        num_images=statistics.num_images, images_per_latent=n, dataset=dataset, split=split, labels=labels
    )
    return LatentTable(pa.table({name: columns[name] for name in SCHEMA.names}), made_of)


def _top_images(statistics: LatentStatistics, features: FeatureSet) -> dict[str, pa.Array]:
    active = statistics.top_acts > 0
    ends = torch.cat([torch.zeros(1, dtype=torch.long), active.sum(1).cumsum(0)]).int()
    ids = pa.array(list(features.image_ids or ()), pa.string())
    names, acts = ids.take(pa.array(statistics.top_images[active].numpy())), statistics.top_acts[active].numpy()
    offsets = pa.array(ends.numpy())
    return {
        "top_image_ids": pa.ListArray.from_arrays(offsets, names),
        "top_activations": pa.ListArray.from_arrays(offsets, pa.array(acts)),
    }


def _labels(statistics: LatentStatistics, features: FeatureSet) -> dict[str, pa.Array]:
    if features.image_labels is None or features.image_labels.ndim > 1:
        return {}
    found = label_purity(statistics, features.image_labels)
    names = features.class_names or [str(i) for i in range(int(features.image_labels.max()) + 1)]
    label: list[str | None] = [None] * len(statistics.density)
    purity: list[float | None] = [None] * len(statistics.density)
    for latent, one, share in zip(found.latents.tolist(), found.label.tolist(), found.purity.tolist(), strict=True):
        label[latent], purity[latent] = names[one], share
    return {"label": pa.array(label, pa.string()), "purity": pa.array(purity, pa.float32())}
