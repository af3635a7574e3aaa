"""The table of latents against a naive computation over all images."""

from pathlib import Path

import pytest
import torch

from diffusion_sae import FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.latent_table import latent_table
from diffusion_sae.features import FeatureSet


def dense_by_image(sae: KSparseAutoencoder, features: FeatureSet) -> torch.Tensor:
    """(images, num_latents): the largest activation over all rows of an image, one image at a time."""
    rows = []
    for image in range(features.num_images):
        own = torch.nonzero(features.image_index == image).flatten()
        timesteps = None if sae.config.timesteps is None else features.timesteps_of(own)
        code = sae.encode(features[own], timesteps)
        dense = torch.zeros(len(own), sae.config.num_latents).scatter(1, code.top_indices, code.top_acts)
        rows.append(dense.amax(0))
    return torch.stack(rows).detach()


@pytest.fixture(scope="module")
def store(make_sd_extractor, image_folder: Path, tmp_path_factory) -> FeatureStore:
    extractor = make_sd_extractor(layers=("up_ft1",), timesteps=(25, 500), pooling="tokens")
    return extractor.extract(str(image_folder), tmp_path_factory.mktemp("store"), progress=False)


@pytest.mark.parametrize("timesteps", [25, [25, 500]])
def test_every_latent(store: FeatureStore, timesteps: int | list[int]) -> None:
    features = store.select("up_ft1", timesteps)
    several = timesteps if isinstance(timesteps, list) else None
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, num_latents=64, k=2, timesteps=several))
    found = latent_table(sae, features, n=3, dataset="pictures", split="train", labels="label")
    dense = dense_by_image(sae, features)
    assert len(found) == 64
    ids = list(features.image_ids or ())
    for i, acts in enumerate(dense.T):
        record, active = found[i], acts[acts > 0]
        assert record.density == pytest.approx(len(active) / len(acts))
        assert record.mean_activation == pytest.approx(active.mean().item() if len(active) else 0.0, rel=1e-5)
        assert record.max_activation == pytest.approx(acts.max().item(), rel=1e-5)
        assert record.top_activations == pytest.approx(active.sort(descending=True).values[:3].tolist(), rel=1e-5)
        by_id = dict(zip(ids, acts.tolist(), strict=True))
        assert [by_id[image] for image in record.top_image_ids] == pytest.approx(record.top_activations, rel=1e-5)
        if len(active) < 3:
            assert (record.label, record.purity) == (None, None)
            continue
        assert features.image_labels is not None
        labels = [features.class_names[int(features.image_labels[ids.index(j)])] for j in record.top_image_ids]
        assert record.purity == pytest.approx(max(map(labels.count, labels)) / 3)
        assert labels.count(record.label) == max(map(labels.count, labels))
    assert 0 < (found.density == 0).sum() < 64
    assert (found.source.dataset, found.source.num_images, found.source.images_per_latent) == ("pictures", 12, 3)


def test_without_labels(store: FeatureStore) -> None:
    features = store.select("up_ft1", 25)
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, num_latents=64, k=2))
    features.image_labels = None
    assert latent_table(sae, features, n=3).table["label"].null_count == 64


def test_what_it_refuses(store: FeatureStore) -> None:
    features = store.select("up_ft1", 25)
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, num_latents=64, k=2))
    with pytest.raises(ValueError, match=r"n must lie in 1…1024 images a latent, got 0"):
        latent_table(sae, features, n=0)
    with pytest.raises(ValueError, match="The features have no image ids"):
        latent_table(sae, FeatureSet.from_tensor(features[:]))
