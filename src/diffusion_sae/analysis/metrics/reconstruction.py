"""How near a reconstruction is: of rows x (N, d_in) and x̂, with the error e = x − x̂, all in fp64.

`fvu` is the SAE's own, `sae.losses.fraction_of_variance_unexplained`; sums over more rows than fit into memory are
`sae.evaluation.evaluate_sae`'s.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ...sae.losses import fraction_of_variance_unexplained, normalized_mse


def fvu(reconstruction: Float[Tensor, "N d_in"], target: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """Σ‖e‖² / Σ‖x − x̄‖², in [0, ∞): 0 is perfect, 1 as good as the mean row. 1 − R² of regression.

    Invariant under a rotation, a scale and a shift of both, and under the order of the rows.

    Raises:
        ValueError: for target rows that are all equal, and so have no variance.
    """
    return fraction_of_variance_unexplained(*_checked(reconstruction, target, varying="fvu"))


def explained_variance(reconstruction: Float[Tensor, "N d_in"], target: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """1 − Σ_d Var(e_d) / Σ_d Var(x_d), in (−∞, 1]: a constant error costs nothing, which is all that sets it apart from
    1 − FVU. The definition of dictionary_learning, and scikit-learn's with `variance_weighted`.

    Raises:
        ValueError: for target rows that are all equal, and so have no variance.
    """
    reconstruction, target = _checked(reconstruction, target, varying="explained_variance")
    error = target - reconstruction
    return 1 - error.var(0, correction=0).sum() / target.var(0, correction=0).sum()


def uncentred_explained_variance(
    reconstruction: Float[Tensor, "N d_in"], target: Float[Tensor, "N d_in"]
) -> Float[Tensor, ""]:
    """mean over rows of 1 − ‖e‖² / ‖x‖², in (−∞, 1]: what Revelio calls explained variance.

    No mean is taken off: on rows far from 0 the mean row alone scores near 1, so that it says little without `fvu`.

    Raises:
        ValueError: for a target with a row of zeros, of whose length no share can be explained.
    """
    reconstruction, target = _checked(reconstruction, target)
    zero = (target == 0).all(1).nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"uncentred_explained_variance divides by the length of each target row, and {len(zero)} of {len(target)} "
            f"rows are all 0, the first is row {zero[0]}. Leave them out, or use fvu."
        )
    return 1 - normalized_mse(reconstruction, target)


def cosine(reconstruction: Float[Tensor, "N d_in"], target: Float[Tensor, "N d_in"]) -> Float[Tensor, ""]:
    """mean over rows of x̂·x / (‖x̂‖ ‖x‖), in [−1, 1]; blind to a wrong length. A row of zeros counts as 0."""
    return torch.nn.functional.cosine_similarity(*_checked(reconstruction, target)).mean()


def _checked(reconstruction: Tensor, target: Tensor, *, varying: str | None = None) -> tuple[Tensor, Tensor]:
    """In fp64; rows that are all equal are refused for a metric `varying` that divides by their variance."""
    if reconstruction.shape != target.shape or target.ndim != 2 or not len(target):
        raise ValueError(
            f"Reconstruction and target must both be (N, d_in) with N ≥ 1, got {tuple(reconstruction.shape)} and "
            f"{tuple(target.shape)}."
        )
    if varying is not None and bool((target == target[0]).all()):
        raise ValueError(
            f"{varying} divides by the variance of the target rows, and all {len(target)} of them are equal. Give rows "
            "of different images, at least two."
        )
    return reconstruction.double(), target.double()
