"""`fusion`, of several layers and timesteps at once."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from ..examples import Features
from .attention import Block
from .base import Head, add_moments, channels_last, normalised
from .diff_c import as_feature_map


class FusionHead(Head):
    """Inputs r_{l,t}, by layer l and timestep t, of any width and spatial size, each normalised to r̂ by the moments of
    the training features. A layer has one projection to `width`, whatever the timestep, as in both papers.
    """

    name = "fusion"
    whole_images = True
    pooling = "none"
    options = ("fusion", "inputs", "width", "feature_norm")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # config.json sorts its keys: this order is the same before and after saving
        self.names = sorted(config.inputs)
        places = [name.rsplit("@", 1) for name in self.names]
        layers = sorted({layer for layer, _ in places})
        self.layer_of = [layers.index(layer) for layer, _ in places]
        self.timesteps = sorted({int(timestep) for _, timestep in places})
        self.timestep_of = [self.timesteps.index(int(timestep)) for _, timestep in places]
        self.moments = nn.ModuleList()
        for name in self.names:
            self.moments.append(nn.Module())
            add_moments(self.moments[-1], config.inputs[name])
        widths = {layer: config.inputs[name] for layer, name in zip(self.layer_of, self.names, strict=True)}
        self.projections = nn.ModuleList(nn.Linear(widths[layer], config.width) for layer in range(len(layers)))

    def normalised_modules(self) -> dict[str, nn.Module]:
        return dict(zip(self.names, self.moments, strict=True))

    def refusal(self, features: Features) -> ValueError:
        shapes = (
            tuple(features.shape)
            if isinstance(features, Tensor)
            else {name: tuple(value.shape) for name, value in features.items()}
        )
        return ValueError(
            f"A fusion probe takes several inputs, (N, d), (N, T, d) or (N, d, h, w), by name with the width d: "
            f"{self.config.inputs}, got {shapes}. Give FeatureStore.aligned(…), or a mapping by layer and timestep."
        )

    def arranged(self, features: Features) -> Features:
        if isinstance(features, Tensor) or set(features) != set(self.names):
            raise self.refusal(features)
        examples = {len(value) for value in features.values()}
        for name, value in features.items():
            if value.ndim not in (2, 3, 4) or channels_last(value).shape[2] != self.config.inputs[name]:
                raise self.refusal(features)
        if len(examples) > 1:
            raise self.refusal(features)
        return {name: features[name] for name in self.names}


class MixingFusion(FusionHead):
    """Learned mixing weights (Diffusion Hyperfeatures, Luo et al. 2023, arXiv 2305.14334, §3.2), with m the weights:

        y = Σ_{l,t} softmax(m)_{l,t} · mean_positions ReLU(B_l r̂_{l,t} + c_l),   logits = W y + b

    The paper resizes the maps to one size and sums, since it needs a map; for a class their average is enough, and
    averages need no resizing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mixing_logits = nn.Parameter(torch.zeros(len(self.names)))
        self.classifier = nn.Linear(config.width, config.num_labels)

    @property
    def mixing_weights(self) -> dict[str, float]:
        """How much each input counts, by its name; they sum to 1."""
        return dict(zip(self.names, self.mixing_logits.detach().softmax(0).tolist(), strict=True))

    def forward(self, features: dict[str, Tensor]) -> Float[Tensor, "B num_labels"]:
        parts = []
        for name, moments, layer in zip(self.names, self.moments, self.layer_of, strict=True):
            tokens = normalised(moments, channels_last(features[name]))
            parts.append(F.relu(self.projections[layer](tokens)).mean(1))
        weights = self.mixing_logits.softmax(0)
        return self.classifier(torch.einsum("i,ibw->bw", weights, torch.stack(parts)))


class AttentionFusion(FusionHead):
    """DifFormer (Mukhopadhyay et al. 2024, Do text-free diffusion models learn discriminative visual representations?,
    arXiv 2311.17921): maps averaged to at most pool_size × pool_size; for each timestep the positions of all its layers
    as one sequence behind a learned token, through `depth` transformer blocks that all timesteps share; then

        logits = W [token of t_1; …; token of t_n] + b

    Here the training features' moments normalise the inputs, where the paper has a norm that is trained.
    """

    options = (*FusionHead.options, "depth", "num_attention_heads", "pool_size")
    drawn = ("token",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.token = nn.Parameter(torch.zeros(config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.num_attention_heads) for _ in range(config.depth))
        self.classifier = nn.Linear(config.width * len(self.timesteps), config.num_labels)

    def forward(self, features: dict[str, Tensor]) -> Float[Tensor, "B num_labels"]:
        first = features[self.names[0]]
        sequences = [[self.token.expand(len(first), 1, -1)] for _ in self.timesteps]
        places = zip(self.names, self.moments, self.layer_of, self.timestep_of, strict=True)
        for name, moments, layer, timestep in places:
            tokens = normalised(moments, channels_last(self._averaged(features[name])))
            sequences[timestep].append(self.projections[layer](tokens))
        pooled = []
        for sequence in sequences:
            tokens = torch.cat(sequence, 1)
            for block in self.blocks:
                tokens = block(tokens)
            pooled.append(tokens[:, 0])
        return self.classifier(torch.cat(pooled, 1))

    def _averaged(self, features: Tensor) -> Tensor:
        if features.ndim == 2:
            return features
        feature_map = as_feature_map(features)
        side = self.config.pool_size
        size = (min(feature_map.shape[2], side), min(feature_map.shape[3], side))
        return F.adaptive_avg_pool2d(feature_map, size)


FUSIONS: dict[str, type[FusionHead]] = {"mixing": MixingFusion, "attention": AttentionFusion}
