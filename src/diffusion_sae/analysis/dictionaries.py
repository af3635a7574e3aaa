"""Dictionaries that are not trained as an SAE is, coded at its sparsity: PCA, k-means, NMF, random directions."""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._config import check, check_choice, check_integer
from .._optional import missing
from ..sae.code import SparseCode
from ..sae.configuration import KSparseAutoencoderConfig
from ..sae.initialisation import initial_weights

CODERS = ("matching_pursuit", "top_k", "projection")
_BATCH = 512  # rows that are coded at a time; matching pursuit holds 2 k d_in numbers a row
_DEPENDENT = 1e-3  # part of a direction outside the span of those taken, below which it adds nothing in fp32


@dataclass(frozen=True)
class SparseDictionary:
    """Fixed directions about a fixed point, and a way to choose k of them for each row:

        x̂ = Σ z_i W_dec[i] + b_dec,    at most k of the z_i are not 0.

    The coders:

    - `matching_pursuit`: orthogonal matching pursuit (Pati et al. 1993), the coder that Coates & Ng 2011 ("The
      importance of encoding versus training with sparse coding and vector quantization", §2.2) put behind k-means and
      random dictionaries. Coefficients have either sign and are the least-squares ones of the chosen directions.
    - `top_k`: what a k-SAE with a tied encoder does, z = scale · ReLU(TopK(W_dec (x − b_dec))).
    - `projection`: z = W_dec (x − b_dec), all of it, for k orthonormal directions.
    """

    W_dec: Float[Tensor, "num_latents d_in"]
    """Rows of unit norm, or 0 for a direction that does not exist."""
    b_dec: Float[Tensor, " d_in"]
    k: int
    coder: str = "matching_pursuit"
    scale: float = 1.0
    """Of `top_k` alone, whose sum of many overlapping directions would otherwise overshoot."""

    def __post_init__(self) -> None:
        check_integer("k", self.k, 1, len(self.W_dec))
        check_choice("coder", self.coder, CODERS)
        width = self.W_dec.shape[1]
        fits = self.coder != "projection" or self.k == len(self.W_dec)
        check(fits, f"A projection uses all {len(self.W_dec)} directions, got k = {self.k}.")
        check(self.b_dec.shape == (width,), f"b_dec must be ({width},) as W_dec has it, got {tuple(self.b_dec.shape)}.")

    @torch.no_grad()
    def encode(self, features: Float[Tensor, "N d_in"]) -> SparseCode:
        """Active latents of each row, largest first, each row by itself."""
        if self.coder == "matching_pursuit":
            return matching_pursuit(features - self.b_dec, self.W_dec, self.k)
        acts, indices = ((features - self.b_dec) @ self.W_dec.T).topk(self.k, dim=1)
        return SparseCode(acts if self.coder == "projection" else acts.clamp_min(0) * self.scale, indices)

    @torch.no_grad()
    def decode(self, code: SparseCode) -> Float[Tensor, "N d_in"]:
        return code.to_dense(len(self.W_dec)) @ self.W_dec + self.b_dec


@torch.no_grad()
def matching_pursuit(
    targets: Float[Tensor, "N d_in"], directions: Float[Tensor, "num_latents d_in"], k: int
) -> SparseCode:
    """Orthogonal matching pursuit of all rows at once (Pati et al. 1993).

    Each step takes the direction with the largest |⟨residual, direction⟩| and takes the span of all that were taken out
    of the residual; at the end the coefficients solve min ‖x − Σ z_i d_i‖. A row that nothing is left of takes no more:
    beyond d_in directions there is nothing.

    Args:
        targets: rows, already centred.
        directions: of unit norm.
        k: directions a row.
    """
    check_integer("k", k, 1, len(directions))
    parts = [_pursue(rows, directions, k) for rows in targets.split(_BATCH)]
    return SparseCode(torch.cat([acts for acts, _ in parts]), torch.cat([indices for _, indices in parts]))


def _pursue(targets: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By Gram-Schmidt: the taken directions are Q R with Q orthonormal, and R z = Qᵀ x."""
    rows, d_in = targets.shape
    steps = min(k, d_in, len(directions))
    residual = targets.clone()
    basis = targets.new_zeros(rows, steps, d_in)  # Qᵀ of each row
    mixing = targets.new_zeros(rows, steps, steps)  # R of each row
    heights = targets.new_zeros(rows, steps)  # Qᵀ x of each row
    indices = torch.zeros(rows, k, dtype=torch.long, device=targets.device)
    enough = 1e-6 * targets.norm(dim=1)
    for step in range(steps):
        best = (residual @ directions.T).abs_().argmax(1)
        direction = directions[best]
        inside, across = _without(basis[:, :step], direction)
        more, across = _without(basis[:, :step], across)  # once more: fp32 leaves some of the span in it
        length = across.norm(dim=1)
        useful = (length > _DEPENDENT) & (residual.norm(dim=1) > enough)
        basis[:, step] = torch.where(useful[:, None], across / length[:, None].clamp_min(_DEPENDENT), 0)
        heights[:, step] = (basis[:, step] * residual).sum(1)
        residual -= heights[:, step, None] * basis[:, step]
        mixing[:, :step, step] = torch.where(useful[:, None], inside + more, 0)
        mixing[:, step, step] = torch.where(useful, length, 1)
        indices[:, step] = torch.where(useful, best, 0)
    acts = targets.new_zeros(rows, k)
    acts[:, :steps] = torch.linalg.solve_triangular(mixing, heights[:, :, None], upper=True)[:, :, 0]
    acts, order = acts.sort(dim=1, descending=True, stable=True)
    return acts, indices.gather(1, order)


def _without(basis: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of each vector in its row's orthonormal basis (N, j, d_in), and what is left without them."""
    inside = torch.bmm(basis, vectors[:, :, None])  # (N, j, 1)
    return inside[:, :, 0], vectors - torch.bmm(inside.transpose(1, 2), basis)[:, 0]


def fit_pca(rows: Float[Tensor, "N d_in"], k: int) -> SparseDictionary:
    """The k principal components, which every row uses: k numbers a row, but no choice among directions.

    No k fixed directions have a smaller FVU on `rows`. k is d_in at most.
    """
    center = rows.double().mean(0)
    centred = rows.double() - center
    variances, vectors = torch.linalg.eigh(centred.T @ centred)
    order = variances.argsort(descending=True)[:k]
    return SparseDictionary(vectors.T[order].float(), center.float(), min(k, rows.shape[1]), "projection")


def fit_kmeans(
    rows: Float[Tensor, "N d_in"], num_latents: int, k: int, seed: int = 0, *, coder: str = "matching_pursuit"
) -> SparseDictionary:
    """Centroids of scikit-learn's MiniBatchKMeans as directions about the mean row (Coates & Ng 2011, §2.1).

    The centroids start at random rows: k-means++ costs more than all that follows where there are thousands.
    """
    cluster = _sklearn("cluster")
    check_integer("num_latents", num_latents, k, len(rows))
    model = cluster.MiniBatchKMeans(
        num_latents, init="random", n_init=1, batch_size=4096, max_iter=20, random_state=seed
    ).fit(rows.numpy())
    center = rows.double().mean(0).float()
    return _coded(torch.from_numpy(model.cluster_centers_).float() - center, center, k, coder, rows)


def fit_nmf(
    rows: Float[Tensor, "N d_in"],
    num_latents: int,
    k: int,
    seed: int = 0,
    *,
    coder: str = "matching_pursuit",
    epochs: int = 10,
) -> SparseDictionary:
    """Components of scikit-learn's MiniBatchNMF (Lefèvre et al. 2011) as directions about the mean row.

    Features have both signs, so that NMF is given [ReLU(x − x̄), ReLU(x̄ − x)], of width 2 d_in; a component [p, n]
    is the direction p − n.
    """
    decomposition = _sklearn("decomposition")
    center = rows.double().mean(0).float()
    split = torch.cat([(rows - center).clamp_min(0), (center - rows).clamp_min(0)], dim=1)  # (N, 2 d_in)
    model = decomposition.MiniBatchNMF(
        num_latents, init="random", batch_size=2048, max_iter=epochs, max_no_improvement=None, tol=0, random_state=seed
    ).fit(split.numpy())
    positive, negative = torch.from_numpy(model.components_).float().chunk(2, dim=1)
    return _coded(positive - negative, center, k, coder, rows)


def random_dictionary(
    rows: Float[Tensor, "N d_in"], num_latents: int, k: int, seed: int = 0, *, coder: str = "top_k"
) -> SparseDictionary:
    """The decoder of a k-SAE at its initialisation: with `top_k` the untrained SAE itself, but for its scale."""
    config = KSparseAutoencoderConfig(d_in=rows.shape[1], num_latents=num_latents, k=k, init_seed=seed)
    return _coded(initial_weights(config)[1], rows.double().mean(0).float(), k, coder, rows)


def _coded(directions: Tensor, center: Tensor, k: int, coder: str, rows: Tensor) -> SparseDictionary:
    """For `top_k` with the scale that fits `rows` best, Σ⟨x − b_dec, x̂ − b_dec⟩ / Σ‖x̂ − b_dec‖²: so that a baseline
    does not lose by the sum's length alone.
    """
    bare = SparseDictionary(torch.nn.functional.normalize(directions, dim=1), center, k, coder)
    if coder != "top_k":
        return bare
    match = energy = 0.0
    for batch in rows.split(_BATCH):
        written = bare.decode(bare.encode(batch)) - bare.b_dec
        match += ((batch - bare.b_dec) * written).sum().item()
        energy += written.pow(2).sum().item()
    scale = match / energy if energy else 1.0
    return dataclasses.replace(bare, scale=scale)


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise missing("scikit-learn", "baselines", "This dictionary") from error
