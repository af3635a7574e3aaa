"""KSparseAutoencoder: the model, free of training and of the Hub's details."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..features import FeatureSet
from ..hub.artifact import ArtifactModel
from ..provenance import require_same_provenance
from .activations import batch_top_k
from .card import card_text
from .code import KSparseAutoencoderOutput, SparseCode
from .configuration import PENALISED, TOP_K, KSparseAutoencoderConfig
from .encoder import encode_above, encode_top_k
from .export_code import ExportsCode
from .foreign import load_foreign, save_foreign
from .initialisation import initial_weights
from .latent_table import DescribedLatents
from .losses import WHOLE, auxk_loss, normalized_mse, total_variance
from .penalised import penalised_pass
from .processes import WholeBatch
from .rows import Rows, Timesteps, checked_features, timestep_index
from .sparse import Choose, NormalizedMSE, SparseGradients, apply_decode_rows, apply_encode

INITIAL_THRESHOLD = 0.001  # of a JumpReLU (Rajamanoharan et al. 2024, §5), until a training sets it by its features


class KSparseAutoencoder(DescribedLatents, ExportsCode, ArtifactModel):
    """A k-sparse autoencoder (Makhzani & Frey 2013; Gao et al. 2024, §2.3; Revelio, §3.2):

        z = act(W_encᵀ (x − b_dec) + b_enc),    x̂ = W_decᵀ z + b_dec

    with features x (d_in), `W_enc` (d_in, num_latents), `W_dec` (num_latents, d_in), whose rows have unit norm when
    they are trained: a row is the direction that its latent writes. `act` is ReLU(TopK(·)) or what `config.activation`
    names (see `activations`); most of z is 0, and all that follows the encoder's product touches the rest alone.

    With `config.input_norm` or `config.timesteps` x stands for (x − shift) / scale, and x̂ for shift + scale · x̂: the
    row's own moments (`_row_norms`), or 0 and the timestep's scale, which then has a `b_dec` of its own as well.
    """

    config_class = KSparseAutoencoderConfig
    config: Any
    base_model_prefix = "sae"
    main_input_name = "features"
    threshold: Tensor
    """() θ of `batchtopk`, 0 before training."""
    timestep_scale: Tensor
    """(timesteps,) what the rows of each are divided by."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d_in, num_latents = config.d_in, config.num_latents
        # both weights lie latent-major in memory: an update passes over them once, latent by latent
        self.W_enc = nn.Parameter(torch.empty(num_latents, d_in).T)
        self.b_enc = nn.Parameter(torch.empty(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_in))
        self.b_dec = nn.Parameter(torch.empty(d_in if config.timesteps is None else (len(config.timesteps), d_in)))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((num_latents,), math.log(INITIAL_THRESHOLD)))
        elif config.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
        if config.timesteps is not None:
            self.register_buffer("timestep_scale", torch.ones(len(config.timesteps)))
        self._collect: SparseGradients | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        sae = loaded[0] if isinstance(loaded, tuple) else loaded
        with torch.no_grad():
            sae.W_enc.data = sae.W_enc.T.contiguous().T  # the file holds it as its shape says
        return loaded

    from_foreign = classmethod(load_foreign)
    save_foreign = save_foreign

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self or self.W_dec.is_meta:
            return
        W_enc, W_dec = initial_weights(self.config)
        for name, value in (("W_dec", W_dec), ("W_enc", W_enc)):
            nn.Parameter.copy_(getattr(self, name), value)
        self.b_enc.zero_()
        self.b_dec.zero_()

    def _timestep_index(self, timesteps: Timesteps, rows: int) -> Int[Tensor, " N"] | None:
        return timestep_index(timesteps, rows, self.config.timesteps, self.b_dec.device)

    def _rows(self, features: Tensor, timesteps: Timesteps = None) -> Rows:
        features = checked_features(features, self.config.d_in).to(self.dtype)
        index = self._timestep_index(timesteps, len(features))
        bias = self.b_dec if index is None else self.b_dec[index]
        scale = None if index is None else self.timestep_scale[index, None]
        return Rows.of(features, bias, scale, input_norm=self.config.input_norm)

    def pre_acts(
        self, features: Float[Tensor, "N d_in"], timesteps: Timesteps = None
    ) -> Float[Tensor, "N num_latents"]:
        """W_encᵀ (x − b_dec) + b_enc, dense: for a look at few rows."""
        return self._dense_pre_acts(self._rows(features, timesteps))

    def _dense_pre_acts(self, rows: Rows) -> Float[Tensor, "N num_latents"]:
        return torch.addmm(self.b_enc, rows.normalised - rows.bias, self.W_enc)

    def _encoded(self, rows: Rows, choose: Choose, subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return apply_encode(rows.normalised, rows.bias, self.W_enc.T, self.b_enc, choose, subset, self._collect)

    def _above_threshold(self, rows: Rows) -> SparseCode:
        acts, indices = self._encoded(rows, partial(encode_above, threshold=self.activation_threshold()))
        return SparseCode(F.relu(acts), indices)

    def _chosen(self, rows: Rows, *, k: int | None = None, subset: Tensor | None = None) -> SparseCode:
        """TopK of the pre-activations in no order, ReLU applied as the config says."""
        wanted = self.config.k if k is None else k
        latents = self.config.num_latents if subset is None else len(subset)
        if wanted > latents:
            raise ValueError(f"k must be at most the number of latents, {latents}, got {wanted}.")
        choose = partial(encode_top_k, k=wanted)
        values, indices = self._encoded(rows, choose, subset)
        return SparseCode(values if self.config.activation == "signed_topk" else F.relu(values), indices)

    def encode(self, features: Float[Tensor, "N d_in"], timesteps: Timesteps = None) -> SparseCode:
        """Active latents of each row, which depend on that row alone.

        Args:
            features: (N, d_in).
            timesteps: of an SAE over several timesteps: each row's, or one for all.

        Raises:
            ValueError: for another width, NaN or infinity, or timesteps that the SAE does not know.
        """
        rows = self._rows(features, timesteps)
        acts, indices = self._chosen(rows) if self.config.activation in TOP_K else self._above_threshold(rows)
        acts, order = acts.sort(dim=1, descending=True, stable=True)
        return SparseCode(acts, indices.gather(1, order))

    def activation_threshold(self) -> Float[Tensor, "*num_latents"]:
        """θ: latents are active above it (batchtopk: one for all, 0 before training; jumprelu: one each; relu: 0)."""
        if self.config.activation == "jumprelu":
            return self.log_threshold.exp()
        return self.threshold if self.config.activation == "batchtopk" else self.b_enc.new_zeros(())

    def decode(self, code: SparseCode, timesteps: Timesteps = None) -> Float[Tensor, "N d_in"]:
        """Σ z_i W_dec[i] + b_dec over the active latents alone.

        Raises:
            ValueError: with an input_norm, where the scale of a row is not in its code; call the SAE on features.
        """
        if self.config.input_norm != "none":
            raise ValueError(
                f"With input_norm={self.config.input_norm!r} a code does not say how long its row was. Use "
                "sae(features), whose reconstruction is scaled back."
            )
        index = self._timestep_index(timesteps, len(code.top_acts))
        if index is None:
            return self._decoded(code, self.b_dec)
        return self.timestep_scale[index, None] * self._decoded(code, self.b_dec[index])

    def _decoded(self, code: SparseCode, bias: Tensor | None = None) -> Float[Tensor, "N d_in"]:
        return apply_decode_rows(code.top_acts, code.top_indices, self.W_dec, bias, self._collect)

    @contextmanager
    def sparse_gradients(self) -> Iterator[SparseGradients]:
        """Within it, `backward` forms the gradients of W_enc and W_dec not at all, but notes what they are sums of."""
        self._collect = SparseGradients(len(self.W_dec))
        try:
            yield self._collect
        finally:
            self._collect = None

    def forward(
        self,
        features: Float[Tensor, "N d_in"],
        dead_latents: Bool[Tensor, " num_latents"] | None = None,
        auxk: int = 0,
        auxk_alpha: float = 1 / 32,
        *,
        timesteps: Timesteps = None,
        k: int | None = None,
        multi_topk_alpha: float = 0.0,
        sparsity_coefficient: float = 0.0,
        shared: WholeBatch = WHOLE,
    ) -> KSparseAutoencoderOutput:
        """Reconstruct features. In training mode batchtopk chooses among all rows of the batch, and relu and jumprelu
        compute all latents, for their penalties; in evaluation mode a row's latents are those of `encode`.

        Args:
            features: (N, d_in).
            dead_latents: latents that have not been active for long; with `auxk` > 0 they learn the residual.
            auxk: how many of the dead latents reconstruct the residual of a row.
            auxk_alpha: weight of that loss (Gao et al. 2024, §A.2: 1/32).
            timesteps: of an SAE over several timesteps: each row's, or one for all.
            k: another k than the config's, while it is annealed.
            multi_topk_alpha: weight of the loss with 4 k latents (Gao et al. 2024, §A.6, "Multi-TopK": 1/8), by which
                more latents than k still help; not for relu and jumprelu.
            sparsity_coefficient: weight of the penalty of `relu` and `jumprelu`.
            shared: the batch, where `features` are a process's share of it; all must call together.
        """
        rows = self._rows(features, timesteps)
        target = features.to(self.dtype)
        sparsity = target.new_zeros(())
        if self.config.activation in PENALISED and self.training:
            code, decoded, sparsity = penalised_pass(self, rows, target, shared)
            reconstruction = rows.back(decoded)
            loss, error = NormalizedMSE.apply(reconstruction, target)  # type: ignore[misc]
        else:
            more = None
            if multi_topk_alpha:  # one product for both: the k largest are among the 4 k largest
                more = self._chosen(rows, k=min(4 * (k or self.config.k), self.config.num_latents))
            code = self._code(rows, k, more, shared)
            reconstruction, loss, error = self._nested(rows, code, target)
            if more is not None:
                loss = loss + multi_topk_alpha * normalized_mse(rows.back(self._decoded(more, rows.bias)), target)
        aux = target.new_zeros(())
        if auxk and dead_latents is not None and bool(dead_latents.any()):
            dead = torch.nonzero(dead_latents).flatten()
            estimate = self._decoded(self._chosen(rows, k=min(auxk, len(dead)), subset=dead))
            aux = auxk_loss(rows.scaled(estimate), target - reconstruction, shared)
        fvu = shared.mean(error) / total_variance(target, shared)  # of halves these are sums in fp32
        return KSparseAutoencoderOutput(
            loss=(loss + auxk_alpha * aux + sparsity_coefficient * sparsity).to(target.dtype),
            reconstruction=reconstruction,
            top_acts=code.top_acts,
            top_indices=code.top_indices,
            fvu=fvu.to(target.dtype),
            auxk_loss=aux.detach().to(target.dtype),
            sparsity_loss=sparsity.detach().to(target.dtype),
        )

    def _code(self, rows: Rows, k: int | None, more: SparseCode | None, shared: WholeBatch) -> SparseCode:
        if self.config.activation in TOP_K and more is not None:
            best = more.top_acts.detach().topk(k or self.config.k, dim=1, sorted=False).indices
            return SparseCode(more.top_acts.gather(1, best), more.top_indices.gather(1, best))
        if self.config.activation in TOP_K:
            return self._chosen(rows, k=k)
        if not self.training:
            return self._above_threshold(rows)
        values, indices = self._encoded(rows, shared.choose or self.choice_of_batch(k, shared))
        return SparseCode(F.relu(values), indices)

    def choice_of_batch(self, k: int | None, shared: WholeBatch) -> Choose:
        """Of `batchtopk` in training."""
        return partial(batch_top_k, k=k or self.config.k, num_latents=self.config.num_latents, shared=shared)

    @property
    def held(self) -> slice:
        """The latents whose weights are in this process: all, but with latents that are shared out over processes."""
        return slice(None)

    def _nested_sizes(self) -> list[int]:
        return self.config.matryoshka_sizes or [self.config.num_latents]

    def _nested(self, rows: Rows, code: SparseCode, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction by all latents, the loss (with nested dictionaries the mean of theirs), and Σ‖x̂ − x‖²."""
        sizes = self._nested_sizes()
        decoded = reconstruction = error = target
        losses, low = [], 0
        for high in sizes:
            own = code
            if len(sizes) > 1:
                inside = (code.top_indices >= low) & (code.top_indices < high)
                own = SparseCode(code.top_acts * inside, code.top_indices)
            part = self._decoded(own, None if losses else rows.bias)
            decoded = decoded + part if losses else part
            reconstruction = rows.back(decoded)
            loss, error = NormalizedMSE.apply(reconstruction, target)  # type: ignore[misc]
            losses.append(loss)
            low = high
        return reconstruction, torch.stack(losses).mean(), error

    @torch.no_grad()
    def update_threshold_(self, top_acts: Tensor, rate: float = 0.01) -> None:
        """Move the threshold of `batchtopk` towards the smallest latent of a training batch that was kept."""
        active = top_acts[top_acts > 0]
        if len(active):
            smallest = active.min().to(self.threshold.dtype)
            self.threshold.copy_(torch.where(self.threshold > 0, self.threshold.lerp(smallest, rate), smallest))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale the rows of W_dec to unit norm, in place."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).eps)

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of W_dec's gradient what would only change row lengths, which the normalisation undoes anyway.

        (Bricken et al. 2023, "Towards Monosemanticity", training details.) It would otherwise leak into Adam's moments.
        """
        if self.W_dec.grad is not None:
            parallel = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= parallel * self.W_dec

    def require_features(self, features: FeatureSet, *, allow_mismatch: bool = False) -> None:
        """Refuse features of another extraction or width."""
        require_same_provenance(self.provenance, features.provenance, "This SAE", allow_mismatch=allow_mismatch)
        if features.d_in != self.config.d_in or len(features.row_shape) != 1:
            raise ValueError(
                f"The SAE takes features of width d_in = {self.config.d_in}, got rows of shape "
                f"{tuple(features.row_shape)}. Extract with pooling 'mean', 'max' or 'tokens' from the layer it was "
                "made for."
            )

    def card_text(self, repo_id: str, subfolder: str = "") -> dict[str, Any]:
        """What the model card says of this SAE."""
        return card_text(self, repo_id, subfolder)
