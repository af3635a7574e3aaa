"""Whether a unit (a latent, a neuron, a direction) stands for one thing, judged by the images that activate it most.

`top_labels` (units, n) are the labels of each unit's n top images. Numbers of few images are biased: compare with the
same metric under shuffled labels (`baselines`), never with the bound of its range.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Labels = Int[Tensor, "units n"]


def label_std(top_labels: Labels) -> Float[Tensor, " units"]:
    """√(mean over the top images of (c − c̄)²) of their class numbers c, ≥ 0; lower is purer (Revelio).

    It depends on how classes are numbered: neighbours in the list count as near. The other metrics do not.
    """
    return top_labels.double().std(1, correction=0)


def label_counts(top_labels: Labels, classes: int) -> Int[Tensor, "units classes"]:
    """How many of a unit's top images have each label."""
    counts = torch.zeros(len(top_labels), classes, dtype=torch.long)
    return counts.scatter_add_(1, top_labels, torch.ones_like(top_labels))


def purity(top_labels: Labels) -> tuple[Float[Tensor, " units"], Int[Tensor, " units"]]:
    """max_c p_c, in [1/n, 1], the share of the most common label among the top images, and that label (the least of
    equals). Higher is purer; invariant under a renumbering of the classes.
    """
    classes = int(top_labels.max()) + 1 if top_labels.numel() else 1
    most, label = label_counts(top_labels, classes).max(1)
    return most / top_labels.shape[1], label


def base_rate_of(labels: Int[Tensor, " images"]) -> Float[Tensor, " classes"]:
    """Share of each class among all images."""
    return torch.bincount(labels).double() / len(labels)


def label_entropy(top_labels: Labels, base_rate: Float[Tensor, " classes"]) -> Float[Tensor, " units"]:
    """H(p) / H(q), ≥ 0, of the labels p of the top images and q of all images: 0 is one label, 1 as mixed as the data.

    With few images the entropy of a random choice lies below 1.
    """
    return _entropy(_shares(top_labels, base_rate)) / _entropy(base_rate.double()[None])


def label_divergence(top_labels: Labels, base_rate: Float[Tensor, " classes"]) -> Float[Tensor, " units"]:
    """Σ_c p_c log₂(p_c / q_c) in bits, in [0, −log₂ min q]: how far the labels p of the top images are from the base
    rate q. One rare label counts more than one frequent label, which purity and entropy do not see.
    """
    shares = _shares(top_labels, base_rate)
    return torch.special.xlogy(shares, shares / base_rate.double().clamp_min(1e-300)).sum(1) / torch.log(
        torch.tensor(2.0, dtype=torch.float64)
    )


def _shares(top_labels: Labels, base_rate: Float[Tensor, " classes"]) -> Float[Tensor, "units classes"]:
    classes, total = len(base_rate), base_rate.double().sum().item()
    if bool((base_rate < 0).any()) or not abs(total - 1) <= 1e-4:  # a NaN is not within it either
        raise ValueError(
            f"base_rate must be the share of each class, ≥ 0 with the sum 1, got the least {base_rate.min().item():g} "
            f"and the sum {total:g}. Give base_rate_of(labels) of all images."
        )
    if top_labels.numel() and not 0 <= int(top_labels.min()) <= int(top_labels.max()) < classes:
        raise ValueError(
            f"Top images must have labels in 0…{classes - 1}, the classes of base_rate, got {int(top_labels.min())}…"
            f"{int(top_labels.max())}. Give the base rate of the same images."
        )
    if top_labels.numel() and bool((base_rate[top_labels.unique()] == 0).any()):
        raise ValueError("Top images have labels whose base rate is 0. Give the base rate of the same images.")
    return label_counts(top_labels, classes).double() / top_labels.shape[1]


def _entropy(shares: Float[Tensor, "units classes"]) -> Float[Tensor, " units"]:
    return torch.special.entr(shares).sum(1)


def hierarchical_agreement(*levels: Labels) -> Float[Tensor, " units"]:
    """Mean over pairs of top images, and over L levels of labels from coarse to fine, of whether they agree down to
    that level: the depth of their lowest common ancestor over L, in [0, 1]; higher is purer.

    After the depth of the common ancestor in Pach et al. 2025; with one level the share of pairs of the same label.
    """
    if not levels or len({tuple(level.shape) for level in levels}) != 1 or levels[0].shape[1] < 2:
        shapes = ", ".join(str(tuple(level.shape)) for level in levels)
        raise ValueError(f"Levels must be labels (units, n) of one shape with n ≥ 2, got {shapes or 'none'}.")
    n = levels[0].shape[1]
    agree = torch.ones(len(levels[0]), n, n, dtype=torch.bool)
    depth = torch.zeros(len(levels[0]), dtype=torch.float64)
    for level in levels:
        agree &= level[:, :, None] == level[:, None, :]
        depth += agree.sum((1, 2)) - n  # without each image and itself
    return depth / (len(levels) * n * (n - 1))


class Monosemanticity:
    """Monosemanticity score of units over all images (Pach et al. 2025, as its authors' code computes it):

        MS = Σ_{n≠m} a_n a_m s_nm / Σ_{n≠m} a_n a_m,    a = (z − min z) / (max z − min z)

    with activations z of a unit and cosines s of the images' embeddings under an independent encoder; in [−1, 1],
    higher is purer, NaN for units that are at their least on all images but one. Invariant under a shift and a positive
    scale of a unit's activations, a scale of each embedding, a rotation of all.

    As Σ_{n≠m} a_n a_m s_nm = ‖Σ a_n e_n‖² − Σ a_n² with ‖e_n‖ = 1, one pass over the images gives it exactly, in memory
    of units × embedding, for no pair of images is formed.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []
        self._range: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(self, activations: Float[Tensor, "b units"], embeddings: Float[Tensor, "b e"]) -> None:
        """More images."""
        if len(activations) != len(embeddings):
            raise ValueError(f"Got the activations of {len(activations)} images and {len(embeddings)} embeddings.")
        if bool((embeddings.norm(dim=1) == 0).any()):
            raise ValueError("An embedding is all 0 and has no direction.")
        acts, unit = activations.double(), torch.nn.functional.normalize(embeddings.double(), dim=1)
        new = [acts.T @ unit, unit.sum(0), acts.sum(0), acts.square().sum(0)]
        low, high = acts.amin(0), acts.amax(0)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._sums = new if not self._sums else [old + more for old, more in zip(self._sums, new, strict=True)]
        self._range, self._count = (low, high), self._count + len(acts)

    def compute(self) -> Float[Tensor, " units"]:
        if self._range is None:
            raise ValueError("There are no images: call update first.")
        (weighted, embedding, total, squares), (low, high) = self._sums, self._range
        width = high - low
        direction = (weighted - low[:, None] * embedding) / width[:, None]
        own = (squares - 2 * low * total + self._count * low.square()) / width.square()
        weight = ((total - self._count * low) / width).square() - own
        score = (direction.square().sum(1) - own) / weight
        return torch.where((width > 0) & (weight > 1e-9), score, torch.nan)


def monosemanticity(
    activations: Float[Tensor, "images units"], embeddings: Float[Tensor, "images e"]
) -> Float[Tensor, " units"]:
    """See `Monosemanticity`."""
    score = Monosemanticity()
    score.update(activations, embeddings)
    return score.compute()
