"""Which latent of one dictionary is which of another: between timesteps, layers, seeds and models."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...features import FeatureSet
from ...sae.modeling import KSparseAutoencoder
from ..latents import image_activations


@dataclass(frozen=True)
class Matching:
    """A one-to-one pairing that no other exceeds in the sum of similarities (Kuhn 1955)."""

    first: Int[Tensor, " pairs"]
    """Latents of the first dictionary, ascending; all of them, if it is not the larger one."""
    second: Int[Tensor, " pairs"]
    """Their partners."""
    similarity: Float[Tensor, " pairs"]

    @property
    def mean(self) -> float:
        """Mean similarity of the pairs, in [−1, 1]; compare with that of `matching_by_chance`."""
        return self.similarity.double().mean().item()

    def share_above(self, threshold: float) -> float:
        """Share of the pairs with a similarity above the threshold."""
        return (self.similarity > threshold).double().mean().item()


def match(similarity: Float[Tensor, "n m"]) -> Matching:
    """Hungarian assignment: the pairs i ↔ π(i) with the largest Σ_i s_{i π(i)}; min(n, m) of them.

    Invariant under the order of either side's latents. Time grows with the third power of the latents, memory with the
    second (20,480: 3.4 GB in fp64): match those that are alive.

    Raises:
        ValueError: for NaN or infinity, or nothing to match.
    """
    from scipy.optimize import linear_sum_assignment

    if similarity.ndim != 2 or not similarity.numel() or not bool(torch.isfinite(similarity).all()):
        raise ValueError(f"Similarities must be a finite (n, m) table, got the shape {tuple(similarity.shape)}.")
    first, second = map(
        torch.from_numpy, linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)
    )
    return Matching(first, second, similarity[first, second])


@torch.no_grad()
def cosine_similarities(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosine of every row of one decoder with every row of the other; 0 for a row of zeros. Signs count."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Decoders must be (num_latents, d_in) of the same d_in, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}. Across layers and models compare activations: `match_activations`."
        )
    return torch.nn.functional.normalize(first.float(), dim=1) @ torch.nn.functional.normalize(second.float(), dim=1).T


@torch.no_grad()
def activation_correlations(
    batches: Iterable[tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]],
) -> Float[Tensor, "n m"]:
    """Pearson correlation of the activations of every latent of one side with every one of the other, over all images,
    in one pass with sums in fp64; 0 for a latent that is the same on all images.

    Invariant under a shift and a positive scale of a latent's activations, and under the order of the images.
    """
    sums: list[Tensor] = []
    origin: tuple[Tensor, Tensor] | None = None
    count = 0
    for first, second in batches:
        x, y = first.double(), second.double()
        if len(x) != len(y):
            raise ValueError(f"Activations must be of the same images, got {len(x)} and {len(y)}.")
        origin = (x.mean(0), y.mean(0)) if origin is None else origin  # near the mean: sums of squares stay accurate
        x, y = x - origin[0], y - origin[1]
        new = [x.T @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0)]
        sums = new if not sums else [old.add_(more) for old, more in zip(sums, new, strict=True)]
        count += len(x)
    if not sums:
        raise ValueError("There are no activations to compare.")
    products, x_sum, y_sum, x_squares, y_squares = sums
    x_var, y_var = x_squares - x_sum.square() / count, y_squares - y_sum.square() / count
    # what rounding leaves of a constant's variance is no variance
    x_var, y_var = (torch.where(v > 1e-12 * s, v, torch.inf) for v, s in ((x_var, x_squares), (y_var, y_squares)))
    covariance = products.addr_(x_sum, y_sum, alpha=-1 / count)
    return covariance.div_(x_var.sqrt()[:, None]).div_(y_var.sqrt())


def match_decoders(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> Matching:
    """`match` by the cosine of decoder rows: SAEs of one layer, over seeds, timesteps and settings."""
    return match(cosine_similarities(first, second))


def match_activations(
    first: KSparseAutoencoder, first_features: FeatureSet, second: KSparseAutoencoder, second_features: FeatureSet
) -> Matching:
    """`match` by the correlation of activations over the same images: SAEs of any layers, timesteps and models.

    Raises:
        ValueError: for features of other images, or of another extraction than the SAE's.
    """
    mine, theirs = first_features.image_ids, second_features.image_ids
    same = first_features.num_images == second_features.num_images
    if not same or (mine is not None and theirs is not None and list(mine) != list(theirs)):
        raise ValueError("The two feature sets are not of the same images in the same order, so nothing corresponds.")
    first.require_features(first_features)
    second.require_features(second_features)
    sides = (image_activations(first, first_features), image_activations(second, second_features))
    return match(activation_correlations(zip(*sides, strict=True)))


def matching_by_chance(n: int, m: int, d: int, seed: int = 0) -> Matching:
    """The baseline of `match_decoders`: random directions. The best pairing of many finds similar ones by chance."""
    generator = torch.Generator().manual_seed(seed)
    return match_decoders(torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator))
