"""One FeatureSet of several timesteps of a store, against the sets of each alone."""

import pytest
import torch

from diffusion_sae._training import hold_out_images
from diffusion_sae.analysis.latents import image_activations, latent_statistics
from diffusion_sae.features import FeatureSet, FeatureStore, StoreWriter
from diffusion_sae.provenance import Provenance
from diffusion_sae.sae.configuration import KSparseAutoencoderConfig
from diffusion_sae.sae.modeling import KSparseAutoencoder

LAYER, TIMESTEPS, IMAGES, WIDTH = "up_ft1", (0, 25, 700), 7, 8
LABELS = [2, 0, 1, 1, 0, 2, 2]
IDS = [f"id-{i}" for i in range(IMAGES)]
SHAPES = {"mean": (), "tokens": (5,)}


@pytest.fixture(scope="module", params=SHAPES)
def store(request, tmp_path_factory):
    """Seven images in shards of three."""
    shape = (IMAGES, *SHAPES[request.param], WIDTH)
    record = Provenance(model="m", layers=(LAYER,), timesteps=TIMESTEPS, pooling=request.param, weights="abc")
    folder = tmp_path_factory.mktemp("store") / request.param
    writer = StoreWriter(folder, record, source_names=IDS, labels=LABELS, class_names=["a", "b", "c"], shard_size=3)
    generator = torch.Generator().manual_seed(0)
    features = {(LAYER, t): torch.randn(shape, generator=generator) for t in TIMESTEPS}
    for number in writer.missing:
        shard, rows = writer.new_shard(), writer.part.rows(number)
        shard.add({k: v[rows] for k, v in features.items()}, *([c[i] for i in rows] for c in (IDS, IDS, LABELS)))
        writer.write(number, shard)
    writer.finish()
    return FeatureStore(folder)


@pytest.mark.parametrize("timesteps", [TIMESTEPS, [700, 0], (25,)], ids=str)
def test_the_rows_of_each_timestep_one_after_another(store, timesteps):
    several, alone = store.select(LAYER, timesteps), [store.select(LAYER, t) for t in timesteps]
    assert torch.equal(several[:], torch.cat([features[:] for features in alone]))
    assert several.timesteps.tolist() == [t for t in timesteps for _ in range(len(alone[0]))]
    for name in ("image_index", "positions", "labels"):
        assert torch.equal(getattr(several, name), torch.cat([getattr(features, name) for features in alone])), name
    assert several.num_images == IMAGES
    assert several.image_ids == IDS
    assert several.image_labels.tolist() == LABELS
    assert several.rows_per_image == len(timesteps) * alone[0].rows_per_image
    assert several.positions_per_image == alone[0].positions_per_image
    rows = torch.tensor([len(several) - 1, 0, 3])
    assert torch.equal(several.timesteps_of(rows), several.timesteps[rows])
    assert torch.equal(several.mean(), several[:].double().mean(0).float())
    assert (f"t={tuple(timesteps)}" in repr(several)) == (len(timesteps) > 1)


def test_the_record_names_all_timesteps(store):
    assert store.select(LAYER, (700, 0)).provenance == store.provenance.select(LAYER, [700, 0])
    assert store.select(LAYER, (700, 0)).provenance.timesteps == (700, 0)
    fingerprints = {store.select(LAYER, t).provenance.fingerprint for t in ((0, 25), (25, 0), [25, 0])}
    assert len(fingerprints) == 1  # the order is no other extraction
    assert store.select(LAYER, [25]).provenance == store.select(LAYER, 25).provenance
    assert store.select(LAYER, TIMESTEPS).provenance == store.provenance


def test_timesteps_that_cannot_be_selected(store):
    with pytest.raises(ValueError, match=r"timestep must be one of 0, 25, 700, got 50"):
        store.select(LAYER, (25, 50))
    with pytest.raises(ValueError, match=r"timestep must be one of 0, 25, 700, got '25'"):
        store.select(LAYER, "25")
    with pytest.raises(ValueError, match=r"timesteps must not repeat, got \[25, 25\]"):
        store.select(LAYER, [25, 25])
    with pytest.raises(ValueError, match=r"timesteps must hold at least one timestep, got none"):
        store.select(LAYER, ())
    with pytest.raises(ValueError, match=r"layer must be one of 'up_ft1', got 'mid'"):
        store.select("mid", TIMESTEPS)


def test_an_image_is_held_out_at_all_timesteps(store):
    several, alone = store.select(LAYER, TIMESTEPS), store.select(LAYER, 25)
    train, held = hold_out_images(several, 2, seed=3)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(len(several)))
    images = several.image_index[held]
    assert len(held) == 2 * several.rows_per_image
    assert not set(images.tolist()) & set(several.image_index[train].tolist())
    assert set(images.tolist()) == set(alone.image_index[hold_out_images(alone, 2, seed=3)[1]].tolist())


@pytest.mark.parametrize("images", [1, 3, 100])
def test_all_rows_of_an_image_together(store, images):
    several = store.select(LAYER, TIMESTEPS)
    batches = list(several.image_batches(images))
    assert {len(batch) for batch in batches[:-1]} <= {images}
    for image, rows in enumerate(torch.cat(batches)):
        assert torch.equal(rows, several[several.image_index == image])
    alone = store.select(LAYER, 25)
    assert torch.equal(torch.cat(list(alone.image_batches(images))).flatten(0, 1), alone[:])


def test_latents_of_an_image_are_the_largest_over_its_timesteps(store):
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=WIDTH, num_latents=16, k=2))
    several = store.select(LAYER, TIMESTEPS)
    got = torch.cat(list(image_activations(sae, several, images_per_batch=3)))
    alone = [torch.cat(list(image_activations(sae, store.select(LAYER, t)))) for t in TIMESTEPS]
    torch.testing.assert_close(got, torch.stack(alone).amax(0))
    assert latent_statistics(sae, several, n=4).num_images == IMAGES


def test_timesteps_of_plain_rows_are_not_known():
    features = FeatureSet.from_tensor(torch.eye(3))
    assert features.timesteps is None
    assert features.timesteps_of(torch.tensor([1])) is None
    assert (features.num_timesteps, features.rows_per_timestep) == (1, 3)


def test_rows_that_do_not_fit_the_timesteps():
    with pytest.raises(ValueError, match=r"same number of rows at each timestep: 5 rows an image, 2 timesteps"):
        FeatureSet([torch.zeros(10, 4)], rows_per_image=5, timesteps=(0, 25))
