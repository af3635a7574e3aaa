"""One training step: forward, backward, update. For Adam the weights' gradients are never whole in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.adam import adam

from .losses import total_variance
from .micro_batches import micro_batches
from .modeling import KSparseAutoencoder, Timesteps
from .processes import SAEProcesses
from .rows import rows_of
from .scratch import distances, of_sums
from .screening import Screened, counted
from .sparse import ByLatent, SparseGradients
from .training_args import OPTIMIZERS, SAETrainingArguments

LATENT_BLOCK = 1024  # 5 MB of gradient at d_in 1280: stays in the cache between its sum and its use
KEPT_GRADIENT_BYTES = 2**28  # gradients up to this size are formed once where clipping needs them twice


@dataclass(frozen=True)
class StepReport:
    """What a step came to, before its update."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor
    """Active latents of a row, on average."""
    active: Bool[Tensor, " num_latents"]
    """Whether a latent is active in some row."""


class TrainingStep:
    """Steps of one SAE: `step(batch, learning_rate)` changes its weights in place and keeps them in order.

    With Adam (Kingma & Ba 2015) the update is fused: for a block of latents the gradient is summed from the active
    pairs, its part parallel to the decoder row is removed, the moments and weights are changed and the decoder rows
    scaled to unit norm, before the next block. The weights pass through memory once, and the gradients not at all; the
    result is that of `loss.backward()` and `torch.optim.Adam`. Other optimisers take that ordinary way.
    """

    def __init__(
        self, sae: KSparseAutoencoder, args: SAETrainingArguments, processes: SAEProcesses | None = None
    ) -> None:
        self.sae, self.args = sae, args
        self.processes = SAEProcesses(cpu=sae.device.type == "cpu") if processes is None else processes
        self.rows_until_dead = args.rows_until_dead(sae.config.num_latents, sae.config.k)
        trained = sae.W_enc.requires_grad and sae.W_dec.requires_grad  # frozen weights are left to the optimiser
        self.fused = args.optimizer == "adam" and trained
        make: Any = getattr(torch.optim, OPTIMIZERS[args.optimizer])
        self.learning_rate = args.peak_learning_rate(sae.config.d_in)
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": args.weight_decay}
        if args.optimizer != "sgd":
            options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        self.optimizer: torch.optim.Optimizer = make(sae.parameters(), **options)
        self.rows_since_active = torch.zeros(sae.config.num_latents, dtype=torch.long, device=sae.W_dec.device)
        self.steps_done = 0
        self.screened = Screened()

    @property
    def dead(self) -> Tensor:
        """(num_latents,) whether a latent has not been active for `dead_after_rows`."""
        return self.rows_since_active >= self.rows_until_dead

    def __call__(
        self, batch: Tensor, learning_rate: float, *, timesteps: Timesteps = None, k: int | None = None
    ) -> StepReport:
        """One update by a batch (N, d_in), taken in `micro_batch_size` rows at a time.

        Of several processes each gives its share of the batch (all of it where the latents are shared out instead), and
        gets the report of the whole batch.
        """
        processes = self.processes
        self.sae.train()
        if self.fused:
            with self.sae.sparse_gradients() as gradients:
                report = self._backward(batch, timesteps, k)
            self._average_gradients()
            self._update(processes.share(gradients), learning_rate)
        else:
            report = self._backward(batch, timesteps, k)
            self._average_gradients()
            self._update_by_optimizer(learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        report = StepReport(
            processes.mean(report.loss),
            report.fvu,
            processes.mean(report.l0),
            processes.mean(report.active.float()) > 0,
        )
        self.steps_done += 1
        self.rows_since_active += len(batch) * processes.batch_shares
        self.rows_since_active.masked_fill_(report.active, 0)
        if self.args.dead_latent_boost:
            with torch.no_grad():
                self.sae.b_enc.add_(self.dead[self.sae.held], alpha=self.args.dead_latent_boost * learning_rate)
        return report

    @torch.no_grad()
    def _learn_threshold(self, smallest: Tensor) -> None:
        """Of batchtopk, from the smallest active latent of the batch."""
        smallest = self.processes.gather(smallest[None, None]).amin()
        if bool(smallest.isfinite()):  # at first the mean of all steps: the first ones would weigh in for long
            self.sae.update_threshold_(smallest, rate=max(0.01, 1 / (self.steps_done + 1)))

    def _average_gradients(self) -> None:
        """Of the processes; those of the weights are not formed yet where the update is fused."""
        if self.processes.count > 1:
            for parameter in self.sae.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.processes.mean(parameter.grad)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        device = self.sae.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.args.bf16), counted(self.screened):
            yield

    def _backward(self, batch: Tensor, timesteps: Timesteps, k: int | None) -> StepReport:
        sae, args, dead = self.sae, self.args, self.dead
        size, auxk = args.micro_batch_size, args.auxk > 0 and bool(dead.any())
        with self._computing():
            parts = micro_batches(sae, self.processes, batch, timesteps, size=size, k=k, auxk=auxk)
        loss, error = batch.new_zeros(()), batch.new_zeros(())
        smallest, fvu = batch.new_full((), torch.inf), None
        times = torch.zeros_like(self.rows_since_active, dtype=torch.int32)
        for part in parts:
            rows = batch[part.rows]
            with self._computing():
                output = sae(
                    rows,
                    dead,
                    args.auxk,
                    args.auxk_alpha,
                    timesteps=rows_of(timesteps, part.rows),
                    k=k,
                    multi_topk_alpha=args.multi_topk_alpha,
                    sparsity_coefficient=args.penalty_weight(sae.config.activation),
                    shared=part,
                )
            share = output.loss * part.share
            share.backward()
            loss += share.detach()
            acts = output.top_acts.detach()
            times.index_add_(0, output.top_indices.flatten(), (acts != 0).to(torch.int32).flatten())
            smallest = torch.minimum(smallest, torch.where(acts > 0, acts, torch.inf).amin())
            fvu = output.fvu
            if len(parts) > 1:
                error += distances(rows, output.reconstruction).square().sum()
        if sae.config.activation == "batchtopk":
            self._learn_threshold(smallest)
        if fvu is None or len(parts) > 1:
            fvu = self.processes.mean(error) / total_variance(batch, self.processes)
        return StepReport(loss, fvu, times.sum() / len(batch), times > 0)

    @torch.no_grad()
    def _update(self, gradients: SparseGradients, learning_rate: float) -> None:
        """The fused update of the weights, and that of the small parameters."""
        sae = self.sae
        sums = _BlockSums(gradients, sae, keep=self._keeps_gradients())
        small = [p for p in sae.parameters() if p.grad is not None and p is not sae.W_enc and p is not sae.W_dec]
        scale = self._clip_factor(sums, small)
        W_enc, W_dec = (self._rows_and_state(p) for p in (sae.W_enc, sae.W_dec))
        for block in self._blocks():
            g_enc, g_dec = sums.block(block)
            if scale != 1.0:
                g_enc.mul_(scale)
                g_dec.mul_(scale)
            self._adam(W_enc, block, g_enc, learning_rate)
            self._adam(W_dec, block, g_dec, learning_rate)
            rows = sae.W_dec[block]
            rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).eps)
        for parameter in small:
            gradient = parameter.grad if scale == 1.0 else parameter.grad * scale  # type: ignore[operator]
            self._adam(self._rows_and_state(parameter), slice(None), gradient, learning_rate)  # type: ignore[arg-type]
        for parameter in (sae.W_enc, sae.W_dec, *small):
            self.optimizer.state[parameter]["step"] += 1

    def _rows_and_state(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A parameter and Adam's moments, latent-major, and the step count; kept as torch.optim.Adam keeps them."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)  # of the same strides as the parameter
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():  # loaded from a file
                state[name] = torch.empty_like(parameter).copy_(state[name])
        tensors = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
        if parameter is self.sae.W_enc:
            tensors = tuple(tensor.T for tensor in tensors)
        return (*tensors, state["step"])  # type: ignore[return-value]

    def _adam(
        self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], block: slice, gradient: Tensor, learning_rate: float
    ) -> None:
        parameter, mean, square, step = tensors
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        device = parameter.device
        adam(
            [parameter[block]],
            [gradient],
            [mean[block]],
            [square[block]],
            [],
            [step.to(device, copy=True)],  # counts up in every call
            fused=device.type in ("cpu", "cuda", "mps"),
            grad_scale=None,
            found_inf=None,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _keeps_gradients(self) -> bool:
        """Whether the gradients are kept whole between their norm and their use, rather than formed twice."""
        size = 2 * self.sae.W_dec.numel() * self.sae.W_dec.element_size()
        return self.args.max_grad_norm is not None and size <= KEPT_GRADIENT_BYTES

    def _clip_factor(self, sums: "_BlockSums", small: list[nn.Parameter]) -> float:
        """1, or what brings the norm of all gradients down to `max_grad_norm`."""
        if self.args.max_grad_norm is None:
            return 1.0
        W_dec = self.sae.W_dec
        # one tensor for all, from before the blocks: between these, each result would keep the next block from the
        # memory of the last
        lengths = W_dec.new_empty(2, len(W_dec), dtype=of_sums(W_dec))
        for block in self._blocks():
            for gradient, of_rows in zip(sums.block(block), lengths[:, block], strict=True):
                torch.linalg.vector_norm(gradient, dim=1, dtype=lengths.dtype, out=of_rows)
        norm = self._norm(small, [lengths.double().square().sum()]).item()  # one wait for the device
        return min(1.0, self.args.max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_

    def _norm(self, parameters: list[nn.Parameter], squares: Sequence[Tensor] = ()) -> Tensor:
        """Norm of the gradients of `parameters` and of those whose `squares` are given, in fp64."""
        of_latents, shared = list(squares), []
        for parameter in parameters:
            if parameter.grad is not None:
                (shared if parameter is self.sae.b_dec else of_latents).append(
                    torch.linalg.vector_norm(parameter.grad).square()
                )
        return self.processes.total(of_latents, shared).sqrt()

    def _blocks(self) -> list[slice]:
        latents = len(self.sae.W_dec)
        return [slice(low, min(low + LATENT_BLOCK, latents)) for low in range(0, latents, LATENT_BLOCK)]

    def _update_by_optimizer(self, learning_rate: float) -> None:
        sae = self.sae
        sae.remove_parallel_gradient_()
        if self.args.max_grad_norm is not None:
            norm = self._norm(list(sae.parameters())).float()
            torch.nn.utils.clip_grads_with_norm_(sae.parameters(), self.args.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        sae.normalize_decoder_()


class _BlockSums:
    """Gradient rows of W_enc and W_dec, a block of latents at a time; with `keep` each block is formed once.

    They are the sums that were noted, and what a dense pass has left in the parameters' `grad`.
    """

    def __init__(self, gradients: SparseGradients, sae: KSparseAutoencoder, *, keep: bool) -> None:
        self._W_dec = sae.W_dec.detach()
        self._dense = {
            "W_enc": None if sae.W_enc.grad is None else sae.W_enc.grad.T,
            "W_dec": sae.W_dec.grad,
        }
        self._kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self._sorted: dict[int, ByLatent] = {}  # encoder and decoder share the indices of a code
        self._entries = {
            name: [
                (self._by_latent(indices, gradients.latents), weights, dense)
                for indices, weights, dense in getattr(gradients, name)
            ]
            for name in ("W_enc", "W_dec")
        }

    def _by_latent(self, indices: Tensor, latents: int) -> ByLatent:
        key = indices.data_ptr()
        if key not in self._sorted:
            self._sorted[key] = ByLatent.of(indices, latents)
        return self._sorted[key]

    def _sum(self, name: str, block: slice) -> Tensor:
        parts = [by.sums(weights, dense, block.start, block.stop) for by, weights, dense in self._entries[name]]
        dense = self._dense[name]
        if dense is not None:
            parts.insert(0, dense[block].clone())
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def block(self, block: slice) -> tuple[Tensor, Tensor]:
        """(gradient of W_enc, of W_dec without its part parallel to the decoder rows)."""
        if self._kept is not None and block.start in self._kept:
            return self._kept[block.start]
        g_dec, rows = self._sum("W_dec", block), self._W_dec[block]
        g_dec.addcmul_(rows, (g_dec * rows).sum(1, keepdim=True), value=-1)
        formed = self._sum("W_enc", block), g_dec
        if self._kept is not None:
            self._kept[block.start] = formed
        return formed
