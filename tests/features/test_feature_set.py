"""Rows of features over several blocks, against a naive version."""

import pytest
import torch

from diffusion_sae.features import FeatureSet, ImageSubset, as_feature_set

ROWS = [5, 1, 7, 3]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def blocks(request):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 6, generator=generator).to(request.param) for n in ROWS]


def test_random_gather_equals_the_naive_version(blocks):
    """Rows of four blocks in random order, with repetitions, against one concatenated tensor."""
    features, whole = FeatureSet(blocks), torch.cat(blocks).float()
    assert len(features) == sum(ROWS)
    generator = torch.Generator().manual_seed(1)
    for count in (0, 1, 2, 50):
        rows = torch.randint(len(features), (count,), generator=generator)
        got = features[rows]
        assert got.dtype == torch.float32
        assert torch.equal(got, whole[rows])
        assert torch.equal(features[rows.tolist()], got)
    order = torch.randperm(len(features), generator=generator)
    assert torch.equal(features[order], whole[order])
    assert torch.equal(features.to_tensor(), whole)


@pytest.mark.parametrize("rows", [slice(None), slice(3, 9), slice(None, None, 4), slice(-2, None), slice(4, 4)])
def test_slices(blocks, rows):
    assert torch.equal(FeatureSet(blocks)[rows], torch.cat(blocks).float()[rows])


@pytest.mark.parametrize("joined", [False, True], ids=["many blocks", "one block"])
def test_masks_and_empty_selections(blocks, joined):
    whole = torch.cat(blocks)
    features = FeatureSet([whole] if joined else blocks)
    mask = torch.arange(len(whole)) % 3 == 0
    assert torch.equal(features[mask], whole[mask].float())
    assert features[torch.zeros(len(whole), dtype=torch.bool)].shape == (0, 6)
    assert features[[]].shape == (0, 6)
    with pytest.raises(IndexError):
        features[mask[:5]]


@pytest.mark.parametrize("joined", [False, True], ids=["many blocks", "one block"])
def test_rows_that_do_not_exist(blocks, joined):
    features = FeatureSet([torch.cat(blocks)] if joined else blocks)
    for rows in ([0, 16], [-1, 3], [99]):
        with pytest.raises(IndexError, match=rf"Rows must lie in 0…15, got {min(rows)}…{max(rows)}"):
            features[rows]


def test_batches_hold_every_row_once_in_order(blocks):
    features = FeatureSet(blocks)
    for batch_size in (1, 4, 16, 100):
        batches = list(features.batches(batch_size))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), torch.cat(blocks).float())


def test_positions_of_token_features():
    """Three images of four positions: a row is (image, position), image by image."""
    grid = torch.arange(3 * 4 * 2).view(3, 4, 2).float()
    features = FeatureSet(
        [grid[:2].flatten(0, 1), grid[2:].flatten(0, 1)],
        rows_per_image=4,
        labels=torch.tensor([7, 8, 7]),
        image_ids=["a", "b", "c"],
    )
    assert (len(features), features.num_images) == (12, 3)
    assert features.image_index.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert features.positions.tolist() == [0, 1, 2, 3] * 3
    assert features.labels.tolist() == [7] * 4 + [8] * 4 + [7] * 4
    assert features.image_labels.tolist() == [7, 8, 7]
    for row in range(12):
        expected = grid[features.image_index[row], features.positions[row]]
        assert torch.equal(features[[row]][0], expected)


def test_pooled_features_have_one_row_an_image():
    features = FeatureSet([torch.zeros(3, 2)], labels=torch.tensor([1, 0, 2]))
    assert features.image_index.tolist() == [0, 1, 2]
    assert features.positions.tolist() == [0, 0, 0]
    assert features.labels.tolist() == [1, 0, 2]
    assert FeatureSet([torch.zeros(3, 2)]).labels is None


@pytest.mark.parametrize(("shape", "width"), [((5, 8), 8), ((5, 8, 3, 4), 8), ((5, 9, 8), 8)])
def test_width(shape, width):
    features = FeatureSet([torch.zeros(shape)])
    assert features.d_in == width
    assert tuple(features.row_shape) == shape[1:]
    assert f"5 rows of {shape[1:]}" in repr(features)


def test_mean_is_accumulated_in_double_precision():
    """10,000 rows around 1,000: a sum in fp32 would be off by whole units."""
    features = torch.full((10_000, 2), 1000.0) + torch.tensor([0.25, -0.5])
    assert FeatureSet(list(features.split(3000))).mean().tolist() == [1000.25, 999.5]


def test_from_tensor():
    features = FeatureSet.from_tensor(torch.eye(3), labels=[2, 0, 1], class_names=["a", "b", "c"])
    assert features.labels.tolist() == [2, 0, 1]
    assert features.class_names == ["a", "b", "c"]
    assert as_feature_set(features) is features
    assert torch.equal(as_feature_set(torch.eye(3)).to_tensor(), torch.eye(3))


def test_refusals():
    with pytest.raises(ValueError, match="A FeatureSet needs at least one row, got none"):
        FeatureSet([])
    with pytest.raises(ValueError, match="A FeatureSet needs at least one row, got none"):
        FeatureSet([torch.zeros(0, 4)])
    with pytest.raises(ValueError, match="labels must have one entry an image: 3 images, 2 labels"):
        FeatureSet([torch.zeros(3, 4)], labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="image_ids must have one entry an image: 3 images, 6 image_ids"):
        FeatureSet([torch.zeros(6, 4)], rows_per_image=2, image_ids=list("abcdef"))


def test_non_finite_rows_are_named():
    features = torch.zeros(9000, 2)
    FeatureSet([features]).require_finite("The store")
    features[8500, 1] = torch.nan
    features[8999, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"The store holds NaN .*, first in rows \[8500, 8999\] of 9000"):
        FeatureSet(list(features.split(4000))).require_finite("The store")


def test_rows_of_tens_of_thousands_over_many_blocks():
    """Each row holds its own number: what is asked for comes, in order, from blocks of very different sizes."""
    numbers = torch.arange(60_000, dtype=torch.float32)[:, None] * torch.tensor([1.0, -2.0])
    sizes = [1, 9_999, 3, 20_000, 1, 1, 29_000, 995]
    features = FeatureSet(list(numbers.split(sizes)))
    generator = torch.Generator().manual_seed(0)
    for count in (1, 7, 4096, 60_000):
        rows = torch.randint(60_000, (count,), generator=generator)
        assert torch.equal(features[rows], numbers[rows])
    for start, stop in ((0, 60_000), (9_990, 10_010), (59_000, 60_000), (30_004, 30_005), (5, 5), (10, 2)):
        assert torch.equal(features[start:stop], numbers[start:stop])
        assert torch.equal(features[start:stop:7], numbers[start:stop:7])


@pytest.mark.parametrize("images", [[1, 2, 5], [4, 0, 3, 0], [6]], ids=str)
@pytest.mark.parametrize("timesteps", [(), (25, 100)], ids=["unknown", "two"])
def test_some_images_are_those_of_the_whole(images, timesteps):
    """Of seven images with three positions each, at no known timestep or at two."""
    at = max(1, len(timesteps))
    numbers = torch.arange(7 * 3 * at * 2).float().view(at, 7, 3, 2)
    whole = FeatureSet(
        [numbers.flatten(0, 2).half()[: 20 * at], numbers.flatten(0, 2).half()[20 * at :]],
        rows_per_image=3 * at,
        labels=torch.arange(7) % 3,
        image_ids=[f"image {i}" for i in range(7)],
        class_names=["a", "b", "c"],
        timesteps=timesteps,
    )
    subset, expected = ImageSubset(whole, torch.tensor(images)), numbers[:, images].flatten(0, 2)
    assert (len(subset), subset.num_images, subset.of_timesteps) == (len(expected), len(images), timesteps)
    assert torch.equal(subset[:], expected)
    assert torch.equal(torch.cat([*subset.batches(4)]), expected)
    assert torch.equal(subset[2:7], expected[2:7])
    backwards = torch.arange(len(expected)).flip(0)
    assert torch.equal(subset[backwards], expected.flip(0))
    ascending = torch.arange(0, len(expected), 2)
    assert torch.equal(subset.stored(ascending), expected[ascending].half())
    assert subset.image_labels.tolist() == [i % 3 for i in images]
    assert subset.image_ids == [f"image {i}" for i in images]
    assert torch.equal(subset.mean(), expected.mean(0))
    assert torch.equal(ImageSubset(subset, torch.tensor([0]))[:], numbers[:, images[:1]].flatten(0, 2))
    relabelled = subset.with_labels(torch.zeros(len(images), dtype=torch.long), ["all"])
    assert torch.equal(relabelled[:], expected)
    assert relabelled.class_names == ["all"]
    with pytest.raises(IndexError, match=rf"Rows must lie in 0…{len(expected) - 1}"):
        subset[[len(expected)]]
    with pytest.raises(ValueError, match="labels must have one entry an image"):
        subset.with_labels(torch.zeros(99))
