"""What a reconstruction costs the model itself: its denoising loss with the SAE in the forward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..._config import check_integer
from ...extraction.denoising import Denoising, EncodedImages
from ...extraction.extractor import DiffusionFeatureExtractor
from ...extraction.sources import open_images
from ...provenance import require_same_provenance
from ...sae.modeling import KSparseAutoencoder

Replacement = Callable[[Float[Tensor, "P C"], int], Float[Tensor, "P C"]]
"""What stands for activations, one row a position, at a timestep."""


def loss_recovered(
    original: Float[Tensor, " images"], spliced: Float[Tensor, " images"], ablated: Float[Tensor, " images"]
) -> float:
    """(ablated − spliced) / (ablated − original) of the mean losses: 1 is as good as the activations themselves, 0 as
    good as the ablation, less than 0 worse than it. NaN where the ablation costs nothing.

    Source: the "loss recovered" of Bricken et al. 2023, of a denoising loss. Invariant under a scale of all losses.
    """
    whole, part, none = (loss.double().mean() for loss in (original, spliced, ablated))
    return ((none - part) / (none - whole)).item() if none != whole else float("nan")


@dataclass(frozen=True)
class SplicingLosses:
    """Denoising losses of each image at one timestep, by what stood for the activations of the SAE's layer."""

    original: Float[Tensor, " images"]
    """The activations themselves."""
    spliced: Float[Tensor, " images"]
    """Their reconstruction."""
    zero: Float[Tensor, " images"]
    mean: Float[Tensor, " images"]
    """Their mean over all images and positions at this timestep."""

    @property
    def increase(self) -> float:
        """spliced − original, of the mean losses; ≥ 0 for a model at its optimum."""
        return (self.spliced.double().mean() - self.original.double().mean()).item()

    @property
    def recovered_from_zero(self) -> float:
        return loss_recovered(self.original, self.spliced, self.zero)

    @property
    def recovered_from_mean(self) -> float:
        return loss_recovered(self.original, self.spliced, self.mean)

    def summary(self) -> dict[str, float]:
        """Mean losses and what follows from them, for JSON."""
        losses = {name: getattr(self, name).double().mean().item() for name in ("original", "spliced", "zero", "mean")}
        return losses | {
            "increase": self.increase,
            "recovered_from_zero": self.recovered_from_zero,
            "recovered_from_mean": self.recovered_from_mean,
        }


def by_position(replace: Callable[[Tensor], Tensor], activations: Tensor) -> Tensor:
    """Activations (B, C, h, w) or (B, T, C) with `replace` of their positions as rows (P, C)."""
    channels_last = activations.movedim(1, -1) if activations.ndim == 4 else activations
    new = replace(channels_last.flatten(0, -2)).reshape(channels_last.shape)
    # laid out in memory as what it stands for: else the layers behind might compute by another kernel
    return torch.empty_like(activations).copy_(new.movedim(-1, 1) if activations.ndim == 4 else new)


def _one_layer(extractor: DiffusionFeatureExtractor, layer: str | None) -> str:
    layers = extractor.config.layers
    if layer is None and len(layers) == 1:
        return layers[0]
    if layer not in layers:
        raise ValueError(f"layer must be one of the extractor's, {', '.join(layers)}; got {layer!r}.")
    return layer


class Splicing:
    """Images and the denoiser that they go through with other activations in one of its layers."""

    def __init__(
        self,
        extractor: DiffusionFeatureExtractor,
        images: Any,
        *,
        layer: str | None = None,
        timesteps: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> None:
        """
        Args:
            extractor: with the layer, the timesteps and the noise.
            images: what `open_images` takes, or a tensor (N, 3, H, W) in [-1, 1].
            layer: one of the extractor's; None where it has one only.
            timesteps: some of the extractor's; None: all.
            batch_size: images a forward pass.
            progress: show a bar.
        """
        check_integer("batch_size", batch_size, 1)
        self.denoising = Denoising(extractor)
        self.layer = _one_layer(extractor, layer)
        self.timesteps = tuple(extractor.config.timesteps if timesteps is None else timesteps)
        unknown = [t for t in self.timesteps if t not in extractor.config.timesteps]
        if unknown:
            raise ValueError(f"timesteps must be of the extractor's, {extractor.config.timesteps}; got {unknown}.")
        self.source = open_images(list(images) if isinstance(images, Tensor) else images)
        self.batch_size, self._progress = batch_size, progress

    def _batches(self, what: str) -> Any:
        count = -(-len(self.source) // self.batch_size)
        batches = self.denoising.batches(self.source, self.batch_size)
        return tqdm(batches, desc=what, total=count, disable=not self._progress)

    @torch.no_grad()
    def means(self) -> dict[int, Float[Tensor, " C"]]:
        """Mean activation of the layer over all images and positions, by timestep; summed in fp64."""
        totals: dict[int, Tensor] = {}
        counts = dict.fromkeys(self.timesteps, 0)
        for batch in self._batches("mean activations"):
            for t in self.timesteps:
                activations = self.denoising.activations(batch, self.layer, t)
                axes = (0, 2, 3) if activations.ndim == 4 else (0, 1)
                total = activations.double().sum(axes)
                totals[t] = totals[t] + total if t in totals else total
                counts[t] += activations.numel() // len(total)
        return {t: (totals[t] / counts[t]).float() for t in self.timesteps}

    @torch.no_grad()
    def losses(self, replacements: Mapping[str, Replacement]) -> dict[int, dict[str, Float[Tensor, " images"]]]:
        """{timestep: {name: loss of each image}} for each replacement, and under `original` for none."""
        names = ["original", *replacements]
        found: dict[int, dict[str, list[Tensor]]] = {t: {name: [] for name in names} for t in self.timesteps}
        for batch in self._batches("denoising losses"):
            for t in self.timesteps:
                found[t]["original"].append(self.denoising.losses(batch, t).cpu())
                for name, replacement in replacements.items():
                    found[t][name].append(self._replaced_losses(batch, t, replacement).cpu())
        return {t: {name: torch.cat(parts) for name, parts in by_name.items()} for t, by_name in found.items()}

    def _replaced_losses(self, batch: EncodedImages, timestep: int, replacement: Replacement) -> Tensor:
        def replace(activations: Tensor) -> Tensor:
            return by_position(lambda rows: replacement(rows, timestep), activations)

        with self.denoising.replaced(self.layer, replace):
            return self.denoising.losses(batch, timestep)


def splicing_losses(
    sae: KSparseAutoencoder,
    extractor: DiffusionFeatureExtractor,
    images: Any,
    *,
    allow_mismatch: bool = False,
    **options: Any,
) -> dict[int, SplicingLosses]:
    """The denoising loss with the reconstruction of an SAE in place of its layer's activations, by timestep, beside the
    loss of the model as it is, with zeros, and with the mean activation.

    Every position goes through the SAE by itself. One that was trained on pooled features has never seen positions:
    its loss says how far it carries over to them.

    Args:
        sae: of one of the extractor's layers.
        extractor: e.g. `DiffusionFeatureExtractor.from_pretrained` of the SAE's own name.
        images: what `open_images` takes, or a tensor (N, 3, H, W) in [-1, 1].
        allow_mismatch: also for an SAE of another extraction.
        **options: layer, timesteps, batch_size, progress: see `Splicing`.

    Raises:
        ValueError: for another extraction or width, or a vision encoder.
    """
    splicing = Splicing(extractor, images, **options)
    timesteps = splicing.timesteps
    given = extractor.provenance.select(splicing.layer, timesteps[0] if len(timesteps) == 1 else timesteps)
    require_same_provenance(sae.provenance, given, "This SAE", allow_mismatch=allow_mismatch)
    means = splicing.means()
    takes_timesteps = sae.config.timesteps is not None

    def reconstruct(rows: Tensor, timestep: int) -> Tensor:
        return sae(rows.to(sae.device), timesteps=timestep if takes_timesteps else None).reconstruction.to(rows.device)

    training = sae.training
    sae.eval()  # a position's latents must not depend on the others
    try:
        losses = splicing.losses(
            {
                "spliced": reconstruct,
                "zero": lambda rows, _: torch.zeros_like(rows),
                "mean": lambda rows, t: means[t].to(rows).expand_as(rows),
            }
        )
    finally:
        sae.train(training)
    return {t: SplicingLosses(**by_name) for t, by_name in losses.items()}
