import pytest
import torch
from torch.testing import assert_close

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.dictionaries import random_dictionary
from diffusion_sae.analysis.readout import mean_features, pool_code, probe_splits, read_out, with_shuffled_labels
from diffusion_sae.features import FeatureSet
from diffusion_sae.sae.code import SparseCode
from diffusion_sae.sae.evaluation import evaluate_sae

IMAGES, POSITIONS, WIDTH = 30, 4, 6


def tokens(images: int = IMAGES, seed: int = 0, labels: bool = True) -> FeatureSet:
    """Images of three classes, whose positions lie about the point of their class."""
    generator = torch.Generator().manual_seed(seed)
    of_image = torch.arange(images) % 3
    rows = torch.eye(WIDTH)[of_image].repeat_interleave(POSITIONS, 0)
    rows = rows + 0.2 * torch.randn(rows.shape, generator=generator)
    return FeatureSet([rows], rows_per_image=POSITIONS, labels=of_image if labels else None)


def test_pooling_by_hand() -> None:
    """Two images of two positions: latent 1 is active twice in the first image and once in the second."""
    code = SparseCode(
        torch.tensor([[2.0, 1.0], [4.0, 0.0], [3.0, 1.0], [5.0, 0.0]]), torch.tensor([[1, 0], [1, 0], [1, 2], [2, 0]])
    )
    assert pool_code(code, 2, 3, "mean").tolist() == [[0.5, 3.0, 0.0], [0.0, 1.5, 3.0]]
    assert pool_code(code, 2, 3, "max").tolist() == [[1.0, 4.0, 0.0], [0.0, 3.0, 5.0]]


def test_metrics_are_those_of_evaluate_sae() -> None:
    sae, features = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=WIDTH, num_latents=24, k=3)), tokens()
    ours, theirs = read_out(sae, features, images_per_batch=7).metrics, evaluate_sae(sae, features)
    assert (ours.l0, ours.dead_latents, ours.rows) == (theirs.l0, theirs.dead_latents, theirs.rows)
    assert ours.fvu == pytest.approx(theirs.fvu)


def test_pooled_codes_are_those_of_the_dense_view() -> None:
    features = tokens()
    dictionary = random_dictionary(features[:], 20, 3)
    pooled = read_out(dictionary, features, images_per_batch=7).pooled
    code = dictionary.encode(features[:])
    dense = code.to_dense(20).unflatten(0, (IMAGES, POSITIONS))
    assert_close(pooled["mean"][:], dense.mean(1))
    assert_close(pooled["max"][:], dense.amax(1))
    assert_close(pooled["reconstruction"][:], dictionary.decode(code).unflatten(0, (IMAGES, POSITIONS)).mean(1))
    assert torch.equal(pooled["mean"].image_labels, features.image_labels)


def test_rows_without_variance() -> None:
    with pytest.raises(ValueError, match="no variance to explain"):
        read_out(random_dictionary(tokens()[:], 20, 3), FeatureSet([torch.ones(8, WIDTH)], rows_per_image=POSITIONS))


def test_the_probe_knows_the_classes_and_shuffled_labels_do_not() -> None:
    splits = {"train": tokens(90), "validation": tokens(60, 1), "test": tokens(60, 2)}
    pooled = {split: mean_features(features) for split, features in splits.items()}
    assert probe_splits(pooled, l2_path=(1e-3,)).test_accuracy == 1
    control = with_shuffled_labels(pooled)
    assert torch.equal(control["test"].image_labels, pooled["test"].image_labels)
    assert not torch.equal(control["train"].image_labels, pooled["train"].image_labels)
    assert torch.equal(control["train"].image_labels.sort().values, pooled["train"].image_labels.sort().values)
    assert probe_splits(control, l2_path=(1e-3,)).test_accuracy < 0.7


def test_no_labels_to_shuffle() -> None:
    with pytest.raises(ValueError, match="no labels to shuffle"):
        with_shuffled_labels({"train": tokens(labels=False)})
