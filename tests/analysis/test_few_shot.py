"""Few-shot episodes: against a naive version, seeded, and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from diffusion_sae.analysis.few_shot import FewShotResult, few_shot
from diffusion_sae.features import FeatureSet


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_classes(classes: int = 6, images: int = 10, spread: float = 1.0, offset: float = 0.0) -> FeatureSet:
    labels = torch.arange(classes * images) % classes
    return FeatureSet.from_tensor(drawn(classes, 8)[labels] + spread * drawn(len(labels), 8, seed=1) + offset, labels)


def test_classes_that_are_points_are_always_told_apart() -> None:
    for head in ("prototype", "knn"):
        result = few_shot(make_classes(spread=1e-3), ways=3, shots=2, queries=4, episodes=20, head=head)
        assert (result.accuracies == 1).all()
        assert (result.mean, result.interval) == (1.0, 0.0)


def test_without_anything_to_see_it_is_at_chance() -> None:
    noise = FeatureSet.from_tensor(drawn(200, 8), torch.arange(200) % 4)
    result = few_shot(noise, ways=4, shots=5, queries=10, episodes=200)
    assert abs(result.mean - 0.25) < 0.03


def test_one_shot_is_the_nearest_support_image() -> None:
    """With one shot a prototype is its image, and one neighbour is the nearest: by hand the largest cosine."""
    features = make_classes(spread=1.5)
    prototype, nearest = (
        few_shot(features, ways=3, shots=1, queries=5, episodes=40, head=head) for head in ("prototype", "knn")
    )
    assert torch.equal(prototype.accuracies, nearest.accuracies)
    assert 1 / 3 < prototype.mean < 1
    expected = []
    for episode in range(40):
        generator = torch.Generator().manual_seed(episode)
        classes = torch.randperm(6, generator=generator)[:3].tolist()
        rows = [torch.nonzero(features.labels == c).flatten() for c in classes]
        rows = [one[torch.randperm(10, generator=generator)] for one in rows]
        support = F.normalize(features[torch.cat([one[:1] for one in rows])], dim=1)
        right = [
            float((support @ F.normalize(features[one[place : place + 1]], dim=1)[0]).argmax()) == c
            for c, one in enumerate(rows)
            for place in range(1, 6)
        ]
        expected.append(sum(right) / len(right))
    torch.testing.assert_close(prototype.accuracies, torch.tensor(expected))


def test_an_episode_depends_on_its_number_and_the_seed_alone() -> None:
    features, settings = make_classes(), {"ways": 3, "shots": 1, "queries": 5}
    long, short = (few_shot(features, episodes=episodes, **settings) for episodes in (20, 7))
    assert torch.equal(long.accuracies[:7], short.accuracies)
    assert not torch.equal(few_shot(features, episodes=20, seed=1, **settings).accuracies, long.accuracies)


def test_centring_by_a_base_set_takes_away_what_all_images_share() -> None:
    settings = {"ways": 4, "shots": 1, "queries": 5, "episodes": 100}
    plain, shifted = (make_classes(offset=offset) for offset in (0.0, 30.0))
    centred = [few_shot(one, base=one, feature_norm="center", **settings).mean for one in (plain, shifted)]
    assert centred[1] == pytest.approx(centred[0], abs=0.005)
    assert few_shot(shifted, **settings).mean < centred[1]


def test_the_interval_is_that_of_the_mean() -> None:
    result = FewShotResult(torch.tensor([0.5, 0.7, 0.9, 0.7]))
    assert result.mean == pytest.approx(0.7)
    assert result.interval == pytest.approx(1.96 * (0.08 / 3) ** 0.5 / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 7}, r"7 classes with 6 images \(shots \+ queries\) are needed, 6 of 6 have so many"),
        ({"shots": 6}, r"3 classes with 11 images \(shots \+ queries\) are needed, 0 of 6"),
        ({"ways": 1}, "ways must be an integer ≥ 2, got 1"),
        ({"head": "linear"}, "head must be one of 'prototype', 'knn', got 'linear'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_shot(make_classes(), **{"ways": 3, "shots": 1, "queries": 5, "episodes": 3, **changes})


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="need one class label an image"):
        few_shot(FeatureSet.from_tensor(drawn(20, 8)))
    with pytest.raises(ValueError, match="need one row an image"):
        few_shot(FeatureSet([drawn(20, 8)], rows_per_image=2, labels=torch.arange(10) % 2))
