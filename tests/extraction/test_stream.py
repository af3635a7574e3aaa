"""Batches of features that are extracted on the way, against a store of the same images and against direct calls."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SAETrainer, SAETrainingArguments
from diffusion_sae._training import hold_out_images
from diffusion_sae.extraction.images import ImageError
from diffusion_sae.features import FeatureSource, ShuffledBatches
from diffusion_sae.sae.trainer import train_together

LAYER = "up_ft1"
POOLINGS = ("mean", "max", "tokens")


@pytest.fixture(scope="module", params=POOLINGS)
def extractor(request, make_sd_extractor):
    return make_sd_extractor(layers=("bottleneck", LAYER), timesteps=(25, 100), pooling=request.param)


@pytest.fixture(scope="module")
def tokens_extractor(make_sd_extractor):
    return make_sd_extractor(layers=LAYER, timesteps=(25, 100), pooling="tokens")


@pytest.fixture
def count_forwards(tokens_extractor):
    """Images that went through the denoiser, which all extractors share."""
    count = [0]

    def hook(_module, args, kwargs):
        count[0] += len(kwargs.get("sample", ()))  # none where the pipeline itself calls it

    handle = tokens_extractor.backbone.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    yield count
    handle.remove()


def stream_of(extractor, data, timestep=25, batch_size=4, **options):
    return extractor.stream(data, LAYER, timestep, batch_size=batch_size, **{"progress": False, **options})


def buffer_of(images, stream):
    """Options for a buffer of so many images."""
    return {"buffer_bytes": images * stream.rows_per_image * (4 * stream.d_in + 16)}


def close(mine, other):
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def reference(extractor, images, timesteps):
    """(images, rows, d_in) from a direct call."""
    out = extractor(images)
    return torch.cat([out[LAYER, t].reshape(len(images), -1, out[LAYER, t].shape[-1]) for t in timesteps], 1)


@pytest.mark.parametrize("timesteps", [25, (100, 25)], ids=str)
def test_every_row_once_an_epoch(extractor, images, timesteps):
    """In buffers of five of the twelve images, batches across them, for two epochs."""
    rows = reference(extractor, images, (timesteps,) if isinstance(timesteps, int) else timesteps).flatten(0, 1)
    whole = stream_of(extractor, images, timesteps)
    stream = stream_of(extractor, images, timesteps, **buffer_of(5, whole), images_per_forward=2)
    assert (len(stream), stream.d_in, stream.order.num_groups) == (len(rows), rows.shape[1], 3)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        batches = [stream.batch(step) for step in steps]
        for step, batch in zip(steps, batches, strict=True):
            numbers = stream.order.rows_of(step)
            close(batch, rows[numbers])
            assert torch.equal(stream.images_of(step), numbers // stream.rows_per_image)
        epochs.append(torch.cat([stream.order.rows_of(step) for step in steps]))
    assert [len(set(numbers.tolist())) for numbers in epochs] == [len(rows)] * 2
    assert not torch.equal(*epochs)


def test_batches_are_those_of_a_store(extractor, images, tmp_path):
    """In one buffer the order and the held-out images are those of ShuffledBatches with the same seed."""
    features = extractor.extract(images, tmp_path, progress=False).select(LAYER, 25)
    train, held = hold_out_images(features, 3, seed=7)
    stored = ShuffledBatches(features, 4, seed=7, rows=train)
    stream = stream_of(extractor, images, seed=7, hold_out=3)
    assert (len(stream), stream.steps_per_epoch) == (len(stored), stored.steps_per_epoch)
    for step in (0, 1, stream.steps_per_epoch, 50):
        close(stream.batch(step), stored.batch(step))
    close(stream.held_out()[:], features[held])
    assert stream.held_out().image_ids == stored.held_out().image_ids
    close(stream.mean(), stored.mean())
    for mine, other in zip(stream.moments()[1:], stored.moments()[1:], strict=True):
        close(mine, other)
    assert stream.provenance == features.provenance
    assert stream_of(extractor, images).held_out() is None


def test_timesteps_of_the_rows(extractor, images):
    stream = stream_of(extractor, images, (100, 25))
    assert stream.provenance.timesteps == (100, 25)
    by_timestep = {t: reference(extractor, images, (t,)) for t in (100, 25)}
    seen = set()
    for step in range(stream.steps_per_epoch):
        rows = zip(stream.batch(step), stream.images_of(step).tolist(), stream.timesteps_of(step).tolist(), strict=True)
        for row, image, t in rows:
            assert (by_timestep[t][image] - row).abs().amax(1).min() < 1e-5
            seen.add((image, t))
    assert len(seen) == 24


def test_held_out_images_have_their_rows_at_all_timesteps(extractor, image_folder, tmp_path):
    features = extractor.extract(image_folder, tmp_path, progress=False).select(LAYER, (100, 25))
    stream = stream_of(extractor, image_folder, (100, 25), hold_out=3, seed=7)
    left, train_and_held = stream.held_out(), hold_out_images(features, 3, seed=7)
    close(left[:], features[train_and_held[1]])
    for name in ("timesteps", "labels", "positions"):
        assert torch.equal(getattr(left, name), getattr(features, name)[train_and_held[1]]), name
    assert (left.num_images, left.class_names, left.provenance) == (3, features.class_names, features.provenance)
    assert not set(stream.images.tolist()) & set(features.image_index[train_and_held[1]].tolist())
    stored = ShuffledBatches(features, 4, rows=train_and_held[0]).moments()
    assert stream.moments().timesteps == stored.timesteps == (100, 25)
    for mine, other in zip(stream.moments()[1:], stored[1:], strict=True):
        close(mine, other)


def test_any_step_at_once(tokens_extractor, images):
    """Bit for bit what the undisturbed run gave, also backwards, and after `close`."""
    options = buffer_of(5, stream_of(tokens_extractor, images)) | {"batch_size": 24, "images_per_forward": 2}
    undisturbed = stream_of(tokens_extractor, images, **options)
    expected = [undisturbed.batch(step) for step in range(2 * undisturbed.steps_per_epoch + 3)]
    jumping = stream_of(tokens_extractor, images, **options)
    for step in (len(expected) - 1, 3, 4, 0, undisturbed.steps_per_epoch):
        assert torch.equal(jumping.batch(step), expected[step]), step
        jumping.close()
        assert torch.equal(jumping.batch(step), expected[step]), step


def test_a_resumed_run_extracts_the_buffer_of_its_step_alone(tokens_extractor, images, count_forwards):
    whole = stream_of(tokens_extractor, images)
    stream = stream_of(tokens_extractor, images, **buffer_of(4, whole), images_per_forward=3)
    assert stream.order.num_groups == 3
    count_forwards[0] = 0
    stream.batch(7 * stream.steps_per_epoch)
    assert count_forwards == [4]
    for step in range(7 * stream.steps_per_epoch, 8 * stream.steps_per_epoch):
        stream.batch(step)
        assert [len(future.result().rows) for future in stream._buffers.values()] == [4 * stream.rows_per_image]
    assert count_forwards == [12]  # each image once an epoch


def test_what_fits_is_extracted_once(tokens_extractor, images, count_forwards):
    stream = stream_of(tokens_extractor, images)
    count_forwards[0] = 0
    for step in range(3 * stream.steps_per_epoch):
        stream.batch(step)
    stream.mean()
    assert count_forwards == [12]


def test_layers_and_timesteps_that_are_not_asked_for_are_not_computed(extractor, images, count_forwards):
    stream = stream_of(extractor, images, 100)
    count_forwards[0] = 0
    stream.batch(0)
    assert count_forwards == [12]
    assert list(stream.extractor(images[:1])) == [(LAYER, 100)]
    assert stream.extractor.provenance == extractor.provenance.select(LAYER, 100)
    assert len(extractor(images[:1])) == 4  # which is left as it was


@pytest.mark.parametrize("buffered", [True, False], ids=["buffers", "one buffer"])
def test_shares_of_processes_make_the_batch(extractor, images, buffered):
    whole = stream_of(extractor, images)
    options = buffer_of(5, whole) if buffered else {}
    whole, *readers = (stream_of(extractor, images, **options) for _ in range(3))
    for step in range(2 * whole.steps_per_epoch):
        shares = [reader.batch(step, rank, 2) for rank, reader in enumerate(readers)]
        close(torch.cat(shares), whole.batch(step))
        timesteps = [reader.timesteps_of(step, rank, 2) for rank, reader in enumerate(readers)]
        assert torch.equal(torch.cat(timesteps), whole.timesteps_of(step))


def test_a_process_extracts_the_images_of_its_pooled_rows_alone(make_sd_extractor, images, count_forwards):
    extractor = make_sd_extractor(layers=LAYER, timesteps=25)
    stream = stream_of(extractor, images, **buffer_of(6, stream_of(extractor, images)))
    count_forwards[0] = 0
    for step in range(stream.steps_per_epoch):
        stream.batch(step, 1, 2)
    assert count_forwards == [6]


def test_folders_limits_and_prompts(make_sd_extractor, image_folder, images):
    extractor = make_sd_extractor(layers=LAYER, timesteps=25)
    limited = stream_of(extractor, image_folder, limit=5, batch_size=2)
    assert len(limited) == 5
    names = sorted(path for path in image_folder.rglob("*") if path.is_file())[:5]
    close(limited.batch(0), extractor(names)[LAYER, 25][limited.images_of(0)])
    prompted = make_sd_extractor(layers=LAYER, timesteps=25, prompt_from="image")
    prompts = [f"a bag {i % 3}" for i in range(12)]
    stream = stream_of(prompted, images, prompts=prompts)
    close(stream.batch(1), prompted(images, prompts=prompts)[LAYER, 25][stream.images_of(1)])


def test_it_is_a_source(extractor, images):
    stream = stream_of(extractor, images, seed=2)
    assert isinstance(stream, FeatureSource)
    rows = 12 * stream.rows_per_image
    expected = f"OnTheFlyFeatures({rows} rows of {stream.d_in}, 12 images, batches of 4, 1 buffers an epoch, seed 2)"
    assert repr(stream) == expected


def test_the_fingerprint_covers_images_extraction_and_order(make_sd_extractor, images):
    extractor = make_sd_extractor(layers=LAYER, timesteps=(25, 100))
    small = buffer_of(6, stream_of(extractor, images))
    streams = [
        stream_of(extractor, images),
        stream_of(extractor, images[::-1]),
        stream_of(extractor, images[:11]),
        stream_of(extractor, images, hold_out=2),
        stream_of(extractor, images, 100),
        stream_of(extractor, images, (25, 100)),
        stream_of(extractor, images, seed=1),
        stream_of(extractor, images, batch_size=6),
        stream_of(extractor, images, **small),
        stream_of(make_sd_extractor(layers=LAYER, timesteps=(25, 100), seed=1), images),
    ]
    fingerprints = [stream.fingerprint() for stream in streams]
    assert len(set(fingerprints)) == len(streams)
    assert stream_of(extractor, images, images_per_forward=3).fingerprint() == fingerprints[0]


def test_a_broken_image_is_named(make_sd_extractor, images):
    content = [{"image": image} for image in images[:3]]
    table = Dataset.from_list(content, features=Features({"image": Image()}))
    broken = [*table.cast_column("image", Image(decode=False))["image"], {"bytes": b"broken", "path": None}]
    features = Features({"image": Image(), "text": Value("string")})
    data = Dataset.from_dict({"image": broken, "text": ["a"] * 4}, features=features)
    stream = stream_of(make_sd_extractor(layers=LAYER), data, batch_size=1)
    for _ in range(2):
        with pytest.raises(ImageError, match=r"Cannot read the image 'row 3 of the data set'"):
            stream.batch(0)


def test_features_that_are_no_numbers(make_sd_extractor, images, monkeypatch):
    extractor = make_sd_extractor(layers=LAYER)
    stream = stream_of(extractor, images)
    original = type(extractor).features_of

    def overflowing(self, *args):
        features = original(self, *args)
        features[LAYER, 25][0, 0] = torch.inf
        return features

    monkeypatch.setattr(type(extractor), "features_of", overflowing)
    with pytest.raises(ValueError, match=r"up_ft1@25 came out as NaN or infinite for 0"):
        stream.batch(0)


def test_refusals(make_sd_extractor, images):
    extractor = make_sd_extractor(layers=LAYER, timesteps=(25, 100), pooling="tokens")
    for wrong, message in [
        ({"timestep": 50}, r"timestep must be one of 25, 100, got 50"),
        ({"timestep": (25, 25)}, r"timesteps must not repeat, got \[25, 25\]"),
        ({"hold_out": 12}, r"12 images are too few to hold out 12 of them"),
        ({"hold_out": -1}, r"hold_out must be an integer ≥ 0, got -1"),
        ({"limit": 0}, r"limit must be an integer ≥ 1, got 0"),
        ({"buffer_bytes": 0}, r"buffer_bytes must be an integer ≥ 1, got 0"),
        ({"images_per_forward": 0}, r"images_per_forward must be an integer ≥ 1, got 0"),
        ({"batch_size": 10**6}, r"A batch of 1000000 rows cannot be had from \d+ rows"),
        ({"buffer_bytes": 100}, r"A buffer of \d+ rows is too small for batches of 4 rows and blocks of \d+"),
        ({"prompts": ["a"] * 12}, r"prompts were given, but prompt_from='config' does not take them"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_of(extractor, images, **wrong)
    with pytest.raises(ValueError, match=r"layer must be one of 'up_ft1', got 'bottleneck'"):
        extractor.stream(images, "bottleneck", 25, batch_size=4)
    with pytest.raises(ValueError, match=r"pooling must be mean, max or tokens, got 'none'"):
        stream_of(make_sd_extractor(layers=LAYER, pooling="none"), images)


def test_several_saes_are_trained_on_one_stream(tokens_extractor, images, count_forwards, tmp_path):
    """Each image is extracted once for all of them, and each SAE is what it is when trained alone."""

    def trainers(folder, which):
        stream = stream_of(tokens_extractor, images, batch_size=32, hold_out=3)
        settings = {"max_steps": 6, "batch_size": 32, "logging_steps": 2}
        return [
            SAETrainer(
                KSparseAutoencoder(KSparseAutoencoderConfig(d_in=stream.d_in, num_latents=64, **one)),
                stream,
                SAETrainingArguments(output_dir=str(folder / str(i)), **settings),
            )
            for i, one in enumerate([{"k": 2}, {"k": 4, "activation": "batchtopk"}])
            if i in which
        ]

    together = trainers(tmp_path / "together", (0, 1))
    results = train_together(together, progress=False)
    extracted = count_forwards[0]
    for i in (0, 1):
        count_forwards[0] = 0
        (alone,) = trainers(tmp_path / f"alone{i}", (i,))
        assert alone.train(progress=False).metrics == results[i].metrics
        for name, value in alone.sae.state_dict().items():
            assert torch.equal(value, together[i].sae.state_dict()[name]), name
    assert extracted <= count_forwards[0], "no more than one of them alone"
    assert together[0].sae.metrics["held_out"]["rows"] == 3 * together[0].source.rows_per_image
