"""What all heads share."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..examples import Features
from ..tasks import TASKS


class Head(nn.Module):
    """From features to logits. What a head takes and how it is trained are class attributes."""

    name: ClassVar[str]
    optimizers: ClassVar[tuple[str, ...]] = ("adamw",)
    """Its own one first; none for heads that only remember."""
    problem_types: ClassVar[tuple[str, ...]] = tuple(name for name in TASKS if name)
    whole_images: ClassVar[bool] = False
    """Whether an example is an image with all its positions; else it is a row."""
    shape: ClassVar[str] = "(N, {d_in})"
    pooling: ClassVar[str] = "mean"
    """With which an extraction gives features of this shape."""
    options: ClassVar[tuple[str, ...]] = ()
    """The fields of the config that it reads, for the card."""
    drawn: ClassVar[tuple[str, ...]] = ()
    """Parameters that belong to no layer and are drawn from N(0, 0.02²)."""
    explains: ClassVar[bool] = False
    """Whether its logits are sums over the positions of an image: `evidence`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def arranged(self, features: Features) -> Features:
        """The features in the head's shape.

        Raises:
            ValueError: for another shape.
        """
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.config.d_in:
            raise self.refusal(features)
        return features

    def refusal(self, features: Features) -> ValueError:
        got = tuple(features.shape) if isinstance(features, Tensor) else f"several inputs, {', '.join(features)}"
        article = "An" if self.name[0] in "aeiou" else "A"
        return ValueError(
            f"{article} {self.name} probe takes features of the shape {self.shape.format(d_in=self.config.d_in)}, got "
            f"{got}. Extract with pooling={self.pooling!r}."
        )

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """He-uniform weights and zero biases; nothing on the meta device, where loading fills them."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
                bound = (6 / module.weight[0].numel()) ** 0.5
                module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound)
                if module.bias is not None:
                    module.bias.zero_()
        for name in self.drawn:
            parameter = self.get_parameter(name)
            if not parameter.is_meta:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    def evidence(self, features: Any) -> tuple[Float[Tensor, "B num_labels *positions"], Float[Tensor, "B num_labels"]]:
        """What each position of an image adds to each logit, and what no position adds, without dropout.

        The sum over the positions and the rest are the logits.
        """
        raise NotImplementedError

    def normalised_modules(self) -> dict[str, nn.Module]:
        """The modules that hold the moments of the training features, by the name of the input that they are of."""
        return {}

    def learn_moments(self, batches: "Batches | list[Features]") -> None:
        """Take μ and σ from the training features, where the head normalises by them."""
        modules = self.normalised_modules()
        kind = "standardize" if self.name == "linear" else self.config.feature_norm
        if not modules or kind == "none":
            return
        for name, (mean, std) in channel_moments(batches).items():
            modules[name].feature_mean.copy_(mean)  # type: ignore[operator]
            if kind == "standardize":
                modules[name].feature_std.copy_(std)  # type: ignore[operator]


class Batches:
    """Training features that can be read more than once."""

    def __init__(self, examples: Any, numbers: Tensor) -> None:
        self.examples, self.numbers = examples, numbers

    def __iter__(self) -> Iterator[Features]:
        return self.examples.batches(self.numbers)


def add_moments(module: nn.Module, d_in: int) -> None:
    """μ and σ of the training features, kept with the weights."""
    module.register_buffer("feature_mean", torch.zeros(d_in))
    module.register_buffer("feature_std", torch.ones(d_in))


def normalised(module: nn.Module, features: Float[Tensor, "*N d_in"]) -> Float[Tensor, "*N d_in"]:
    """x̂ = (x − μ) / σ."""
    return (features - module.feature_mean) / module.feature_std  # type: ignore[operator]


def channels_last(features: Tensor) -> Float[Tensor, "B T C"]:
    """(B, C), (B, T, C) or (B, C, h, w) as positions with channels."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, C, h·w) -> (B, T, C)
    return features if features.ndim == 3 else features[:, None]


def channel_moments(batches: Iterable[Features]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel over examples and positions, by input, in fp64 and two passes.

    Constant channels carry nothing: with σ = 1 they stay 0 instead of becoming NaN.
    """
    counts: dict[str, int] = {}
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for name, rows in _rows(batches):
        counts[name] = counts.get(name, 0) + len(rows)
        sums[name] = sums.get(name, 0) + rows.sum(0)
        largest[name] = torch.maximum(largest.get(name, rows.new_zeros(rows.shape[1])), rows.abs().amax(0))
    means = {name: total / counts[name] for name, total in sums.items()}
    for name, rows in _rows(batches):
        squares[name] = squares.get(name, 0) + (rows - means[name]).square().sum(0)
    found = {}
    for name, mean in means.items():
        std = (squares[name] / counts[name]).sqrt()
        found[name] = (mean, torch.where(std > 1e-6 * largest[name], std, 1.0))
    return found


def _rows(batches: Iterable[Features]) -> Iterable[tuple[str, Tensor]]:
    for batch in batches:
        for name, value in ({"": batch} if isinstance(batch, Tensor) else batch).items():
            yield name, channels_last(value).flatten(0, 1).double()
