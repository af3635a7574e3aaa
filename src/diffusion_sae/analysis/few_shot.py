"""How well few labelled images are enough: n-way k-shot episodes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._config import check, check_choice, check_integer
from ..features import FeatureSet
from ..features.order import generator_of
from ..probes.configuration import DiffusionProbeConfig
from ..probes.examples import Examples
from ..probes.heads import MemoryHead, build_head
from ..probes.heads.base import Batches

HEADS = ("prototype", "knn")


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy over the episodes."""

    accuracies: Float[Tensor, " episodes"]

    @property
    def mean(self) -> float:
        return self.accuracies.double().mean().item()

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval of the mean: 1.96 s / √episodes."""
        return 1.96 * self.accuracies.double().std().item() / len(self.accuracies) ** 0.5


def few_shot(
    features: FeatureSet,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    head: str = "prototype",
    base: FeatureSet | None = None,
    feature_norm: str = "none",
    seed: int = 0,
) -> FewShotResult:
    """In each episode `ways` classes are drawn, of each `shots` images to learn from and `queries` others to be told
    apart (Vinyals et al. 2016, arXiv 1606.04080, §4.1). An episode depends on (seed, its number) alone.

    Args:
        features: one row an image, with class labels.
        ways, shots, queries, episodes: see above.
        head: prototype, or knn with as many neighbours as shots.
        base: features of other classes, whose moments `feature_norm` takes (SimpleShot, Wang et al. 2019, arXiv
            1911.04623, centres by them: feature_norm="center"); None: those of each episode's `ways` · `shots` images.
        feature_norm: as in DiffusionProbeConfig.
        seed: of the episodes.

    Raises:
        ValueError: if there are too few classes with shots + queries images, or the features are not one row an image.
    """
    for name, value, low in (
        ("ways", ways, 2),
        ("shots", shots, 1),
        ("queries", queries, 1),
        ("episodes", episodes, 2),
    ):
        check_integer(name, value, low)
    check_choice("head", head, HEADS)
    by_class = _images_by_class(features, ways, shots + queries)
    config = DiffusionProbeConfig(
        d_in=features.d_in,
        head=head,
        id2label={way: str(way) for way in range(ways)},
        num_neighbors=shots,
        feature_norm=feature_norm,
    )
    memory = build_head(config)
    assert isinstance(memory, MemoryHead)
    if base is not None:
        memory.learn_moments(Batches(Examples(base, whole_images=False), torch.arange(len(base))))
    accuracies = []
    for episode in range(episodes):
        generator = generator_of(seed=seed, epoch=episode)
        classes = torch.randperm(len(by_class), generator=generator)[:ways].tolist()
        drawn = [by_class[c][torch.randperm(len(by_class[c]), generator=generator)] for c in classes]
        support = features[torch.cat([rows[:shots] for rows in drawn])]
        query = features[torch.cat([rows[shots : shots + queries] for rows in drawn])]
        if base is None:
            memory.learn_moments([support])
        memory.remember(support, torch.arange(ways).repeat_interleave(shots))
        right = memory(query).argmax(1) == torch.arange(ways).repeat_interleave(queries)
        accuracies.append(right.float().mean())
    return FewShotResult(torch.stack(accuracies))


def _images_by_class(features: FeatureSet, ways: int, needed: int) -> list[Tensor]:
    """Rows of each class that has enough of them."""
    labels = features.image_labels
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise ValueError("Few-shot episodes need one class label an image, which these features lack.")
    check(
        features.rows_per_image == 1 and len(features.row_shape) == 1,
        f"Few-shot episodes need one row an image, got {features!r}. Extract with pooling='mean'.",
    )
    rows = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
    enough = [one for one in rows if len(one) >= needed]
    check(
        len(enough) >= ways,
        f"{ways} classes with {needed} images (shots + queries) are needed, {len(enough)} of {len(rows)} have so many. "
        "Give more images, or ask for fewer ways, shots or queries.",
    )
    return enough
