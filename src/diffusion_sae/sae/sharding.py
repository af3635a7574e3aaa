"""An SAE whose latents are shared out over processes, for dictionaries larger than a device.

Each process holds the rows of W_enc, b_enc and W_dec, and Adam's moments, of its own latents; b_dec is everywhere, and
all see the whole batch. In a step a process

1. computes the pre-activations of its latents and offers its k largest of each row: the values of all are exchanged,
   O(batch · k · processes) numbers, and each keeps those of its own that are among the k largest of all;
2. decodes them; the sum over the processes is the reconstruction, O(batch · d_in) numbers each way;
3. computes the loss, which is the same everywhere, and the gradients of its own latents. That of b_dec through the
   encoder is summed over the processes.

Everything else is the SAE's and the step's own code, on fewer latents.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .code import KSparseAutoencoderOutput, SparseCode
from .configuration import PENALISED, TOP_K
from .encoder import encode_top_k
from .initialisation import initial_shard
from .modeling import KSparseAutoencoder
from .processes import PER_LATENT, SAEProcesses, ShardProcesses, WholeBatch
from .rows import Rows, Timesteps
from .selection import in_few_places
from .sparse import Choose
from .training_args import SAETrainingArguments


def placed(sae: KSparseAutoencoder, args: SAETrainingArguments) -> tuple[KSparseAutoencoder, SAEProcesses]:
    """What this process trains, and with whom: the SAE itself, or with `shard_latents` its share of the latents.

    Raises:
        ValueError: for an SAE that cannot be shared out.
    """
    if not args.shard_latents:
        return sae, SAEProcesses(cpu=sae.device.type == "cpu")
    _require_shardable(sae, args)
    processes = ShardProcesses()
    if sae.config.num_latents < processes.count:
        raise ValueError(
            f"{processes.count} processes cannot share out num_latents = {sae.config.num_latents}: each needs one at "
            "least. Start fewer processes."
        )
    shard = SAEShard(sae.config, processes)
    shard.provenance = sae.provenance
    return shard, processes


def gathered(sae: KSparseAutoencoder) -> KSparseAutoencoder | None:
    """The whole SAE: the given one, or of a shard what `SAEShard.whole` gives."""
    return sae.whole() if isinstance(sae, SAEShard) else sae


def _require_shardable(sae: KSparseAutoencoder, args: SAETrainingArguments) -> None:
    if not sae.W_dec.is_meta:
        raise ValueError(
            "shard_latents=True takes an SAE without weights, as no process is to hold them all, but this one's are on "
            f"{sae.device}. Make it by `with torch.device('meta'): sae = KSparseAutoencoder(config)`: each process "
            "draws its own share from config.init_seed. An SAE that is trained already cannot go on so."
        )
    if sae.config.activation in PENALISED:
        raise ValueError(
            f"shard_latents=True is for the activations {', '.join((*TOP_K, 'batchtopk'))}, this SAE's is "
            f"{sae.config.activation!r}. Choose one of them, or leave shard_latents out."
        )
    if args.resample_steps:
        raise ValueError("resample_steps does not work with shard_latents=True: use AuxK.")


class SAEShard(KSparseAutoencoder):
    """The latents low…high − 1 of an SAE. `config` is that of the whole; all that computes must be called by all
    processes together, and gives in each what the whole SAE gives.

    Within it an index counts from `low`; what it returns counts from 0 of the whole, with at most k active latents a
    row, but more places.
    """

    def __init__(self, config: Any, processes: ShardProcesses) -> None:
        with torch.device("meta"):  # the whole dictionary, of no memory
            super().__init__(config)
        self.processes = processes
        self.low, self.high = processes.bounds(config.num_latents)
        device = processes.device
        W_enc, W_dec = initial_shard(config, self.low, self.high)
        self.W_enc = nn.Parameter(W_enc.to(device).T)
        self.W_dec = nn.Parameter(W_dec.to(device))
        self.b_enc = nn.Parameter(torch.zeros(self.high - self.low, device=device))
        self.b_dec = nn.Parameter(torch.zeros(self.b_dec.shape, device=device))
        if config.activation == "batchtopk":
            self.threshold = torch.zeros((), device=device)
        if config.timesteps is not None:
            self.timestep_scale = torch.ones(len(config.timesteps), device=device)

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> KSparseAutoencoderOutput:
        output = super().forward(features, *args, **{"shared": self.processes, **kwargs})
        output.top_acts, output.top_indices = self._of_all(output.top_acts, output.top_indices)  # type: ignore[arg-type]
        return output

    def encode(self, features: Tensor, timesteps: Timesteps = None) -> SparseCode:
        acts, indices = self._of_all(*super().encode(features, timesteps))
        acts, order = acts.sort(dim=1, descending=True, stable=True)
        return SparseCode(acts, indices.gather(1, order))

    def decode(self, code: SparseCode, timesteps: Timesteps = None) -> Tensor:
        own = (code.top_indices >= self.low) & (code.top_indices < self.high)
        local = (code.top_indices - self.low).clamp(0, self.high - self.low - 1)
        return super().decode(SparseCode(code.top_acts * own, local), timesteps)

    def _of_all(self, acts: Tensor, indices: Tensor) -> SparseCode:
        """The active latents of all processes; without gradient."""
        acts, indices = self.processes.all_of(acts), self.processes.all_of(indices + self.low)
        return SparseCode(acts.transpose(0, 1).flatten(1), indices.transpose(0, 1).flatten(1))

    def _encoded(self, rows: Rows, choose: Choose, subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias: Tensor = _SumOfGradients.apply(rows.bias, self.processes)  # type: ignore[assignment]
        return super()._encoded(rows._replace(bias=bias), choose, subset)

    def _chosen(self, rows: Rows, *, k: int | None = None, subset: Tensor | None = None) -> SparseCode:
        offered = self.high - self.low
        if subset is not None:
            subset = subset[(subset >= self.low) & (subset < self.high)] - self.low
            offered = len(subset)
            if not offered:  # takes part in the exchange all the same, with a latent that it does not offer
                subset = subset.new_zeros(1)
        choose = partial(
            _top_k_of_all,
            k=self.config.k if k is None else k,
            offered=offered,
            num_latents=self.config.num_latents,
            processes=self.processes,
        )
        values, indices = self._encoded(rows, choose, subset)
        signed = self.config.activation == "signed_topk"
        return SparseCode(values.masked_fill(values == -torch.inf, 0) if signed else F.relu(values), indices)

    def _code(self, rows: Rows, k: int | None, more: SparseCode | None, shared: WholeBatch) -> SparseCode:  # noqa: ARG002
        # a share of the 4 k largest (`more`) does not tell which of them are among the k largest
        return super()._code(rows, k, None, shared)

    def _decoded(self, code: SparseCode, bias: Tensor | None = None) -> Tensor:
        total: Tensor = _Sum.apply(super()._decoded(code), self.processes)  # type: ignore[assignment]
        return total if bias is None else total + bias

    @property
    def held(self) -> slice:
        return slice(self.low, self.high)

    def _nested_sizes(self) -> list[int]:
        """How many of a nested dictionary's latents are here, which are the first ones."""
        return [min(max(size - self.low, 0), self.high - self.low) for size in super()._nested_sizes()]

    def _write_artifact(self, folder: Any, repo_id: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise ValueError(
            f"This process holds the latents {self.low}…{self.high - 1} of {self.config.num_latents}, which is no "
            "artifact: the training saves the whole one in output_dir. On the way, call `whole()` in all processes, "
            "and save what it gives in the main one."
        )

    @torch.no_grad()
    def whole(self) -> KSparseAutoencoder | None:
        """The whole SAE on the main process's CPU, where it takes memory for all of its weights; None in the others."""
        parts = {"W_enc": self.W_enc.T, "b_enc": self.b_enc, "W_dec": self.W_dec}
        collected = {name: self.processes.collect(parts[name], self.config.num_latents) for name in PER_LATENT}
        state = {name: value for name, value in collected.items() if value is not None}
        if not state:
            return None
        state["W_enc"] = state["W_enc"].T
        state |= {name: value.cpu() for name, value in self.state_dict().items() if name not in PER_LATENT}
        with torch.device("meta"):
            whole = KSparseAutoencoder(self.config)
        whole.load_state_dict(state, assign=True)
        whole.provenance, whole.metrics = self.provenance, self.metrics
        return whole.train(self.training)


def _top_k_of_all(
    centered: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int, offered: int, num_latents: int, processes: ShardProcesses
) -> tuple[Tensor, Tensor]:
    """A `Choose`: those of this process's latents that are among the k largest of all processes.

    Args:
        offered: how many of the given latents may be chosen.
        num_latents: of all processes.
    """
    values, indices = encode_top_k(centered, W_enc, b_enc, max(1, min(k, offered)))
    if not offered:
        values.fill_(-torch.inf)
    free = min(k, processes.largest(num_latents)) - values.shape[1]
    values, indices = F.pad(values, (0, free), value=-torch.inf), F.pad(indices, (0, free))
    every = processes.offers(values)
    best = every.flatten(1).topk(k, dim=1, sorted=False).indices
    chosen = torch.zeros_like(every.flatten(1), dtype=torch.bool).scatter_(1, best, True)
    return in_few_places(values, indices, processes.own(chosen.view_as(every)))


class _Sum(torch.autograd.Function):
    """The sum over the processes. What follows is the same in all of them, and so is its gradient: each part's own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, processes: ShardProcesses) -> Tensor:  # noqa: ARG004
        return processes.summed(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return gradients[0], None


class _SumOfGradients(torch.autograd.Function):
    """A tensor that all have, on its way to what each computes of its own latents: its gradient is their sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: ShardProcesses) -> Tensor:
        ctx.processes = processes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.processes.summed(gradients[0]), None
