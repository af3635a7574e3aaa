"""What an SAE is trained on, each a function of small tensors: no weights, no Hub."""

from jaxtyping import Float
from torch import Tensor

from .processes import WholeBatch
from .scratch import distances, of_sums
from .sparse import NormalizedMSE

WHOLE = WholeBatch()


def normalized_mse(reconstruction: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """mean over rows of ‖x̂ − x‖² / ‖x‖² (Gao et al. 2024, §2.1)."""
    return NormalizedMSE.apply(reconstruction, target)[0]  # type: ignore[index]


def fraction_of_variance_unexplained(reconstruction: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Σ‖x − x̂‖² / Σ‖x − x̄‖², with x̄ the mean row; 0 is perfect, 1 is as good as the mean."""
    return (target - reconstruction).to(of_sums(target)).pow(2).sum() / total_variance(target)


def total_variance(target: Tensor, shared: WholeBatch = WHOLE) -> Float[Tensor, ""]:
    """Σ‖x − x̄‖² over the rows; of a shared batch, whose mean x̄ is, the mean of all shares' sums."""
    mean = shared.mean(target.mean(0))
    return shared.mean(distances(target, mean.expand_as(target)).square().sum())


def auxk_loss(estimate: Tensor, residual: Tensor, shared: WholeBatch = WHOLE) -> Float[Tensor, ""]:
    """Σ‖e − ê‖² / Σ‖e‖², e = x − x̂ without gradient, ê what dead latents make of it (Gao et al. 2024, §A.2).

    ê has no b_dec: x̂ has it already, and e is what x̂ leaves over. The mean of all shares' losses is that of the batch.
    """
    residual = residual.detach().to(of_sums(residual))
    total = shared.mean(residual.pow(2).sum(), "residual")
    return (estimate - residual).pow(2).sum() / total.clamp_min(1e-12)


def l1_penalty(latent_acts: Tensor, decoder_norms: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """mean over rows of Σ_i z_i ‖W_dec[i]‖ / ‖x‖: relative to the row, as the reconstruction's loss is."""
    return ((latent_acts * decoder_norms).sum(-1) / target.norm(dim=-1).clamp_min(1e-12)).mean()


def l0_penalty(active: Tensor, k: int, shared: WholeBatch = WHOLE) -> Float[Tensor, ""]:
    """(L0 / k − 1)², L0 the mean number of active latents: k as the aim (Rajamanoharan et al. 2024, §A).

    The mean of all shares' gradients is that of the batch, whose L0 it is.
    """
    l0 = active.sum(-1).mean()
    return (l0 - l0.detach() + shared.mean(l0.detach(), "l0")).div(k).sub(1).pow(2)
