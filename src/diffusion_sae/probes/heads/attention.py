"""`attention`, attentive pooling over positions."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from ..examples import Features
from .base import Head, add_moments, channels_last, normalised


class AttentionHead(Head):
    """Attentive pooling: one learned query over all positions (CoCa, Yu et al. 2022, arXiv 2205.01917, §3.2; as a probe
    in V-JEPA, Bardes et al. 2024, arXiv 2404.08471, §4). With positions t of an image and H heads of width m = width/H:

        h_t = P x̂_t + c,   k_t = K h_t,   v_t = V h_t,   a_t = softmax_t(q·k_t / √m) in each head,
        y = O (Σ_t a_t v_t) + o,   logits = W LayerNorm(y) + b

    The order of the positions does not count.
    """

    name = "attention"
    whole_images = True
    shape = "(N, T, {d_in}) or (N, {d_in}, h, w)"
    pooling = "tokens"
    options = ("width", "num_attention_heads", "feature_norm")
    drawn = ("query",)
    explains = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.width
        add_moments(self, config.d_in)
        self.projection = nn.Linear(config.d_in, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_labels)

    def normalised_modules(self) -> dict[str, nn.Module]:
        return {"": self}

    def arranged(self, features: Features) -> Features:
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise self.refusal(features)
        tokens = channels_last(features)
        if tokens.shape[2] != self.config.d_in:
            raise self.refusal(features)
        return tokens

    def forward(self, features: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B num_labels"]:
        return self.classifier(self.norm(self.pooled(features)))

    def pooled(self, features: Float[Tensor, "B T d_in"]) -> Float[Tensor, "B width"]:
        heads = self.config.num_attention_heads
        tokens = self.projection(normalised(self, features))
        query = self.query.expand(len(tokens), 1, -1)
        return self.output(attended(query, self.key(tokens), self.value(tokens), heads)[:, 0])

    def evidence(
        self, features: Float[Tensor, "B T d_in"]
    ) -> tuple[Float[Tensor, "B num_labels T"], Float[Tensor, "B num_labels"]]:
        """y = Σ_t O a_t v_t + o, and LayerNorm with its measured deviation σ(y) held is linear (Elhage et al. 2021, A
        mathematical framework for transformer circuits): with u_t = O a_t v_t and ū its mean over the width, position t
        adds W_c·γ(u_t − ū_t) / σ(y) to logit c; no position adds W_c·(γ(o − ō) / σ(y) + β) + b_c.
        """
        heads, tokens = self.config.num_attention_heads, self.projection(normalised(self, features))
        keys, values = (part.unflatten(2, (heads, -1)) for part in (self.key(tokens), self.value(tokens)))
        query = self.query.unflatten(0, (heads, -1))
        weights = (torch.einsum("hm,bthm->bht", query, keys) / query.shape[1] ** 0.5).softmax(2)
        added = torch.einsum("bht,bthm->bthm", weights, values).flatten(2) @ self.output.weight.T  # u: (B, T, width)
        pooled = added.sum(1) + self.output.bias
        deviation = (pooled.var(1, correction=0) + self.norm.eps).sqrt()
        linear = self.classifier.weight * self.norm.weight
        linear = linear - linear.mean(1, keepdim=True)  # centring y is the same as centring what it is multiplied with
        maps = torch.einsum("btw,cw->bct", added, linear) / deviation[:, None, None]
        bias = self.classifier.weight @ self.norm.bias + self.classifier.bias
        return maps, (linear @ self.output.bias) / deviation[:, None] + bias


class Block(nn.Module):
    """A transformer block: x + A(LN(x)), then x + M(LN(x)); A is self-attention, M = linear, GELU, linear, 4 times as
    wide inside.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Float[Tensor, "B T width"]) -> Float[Tensor, "B T width"]:
        query, key, value = self.query_key_value(self.attention_norm(tokens)).chunk(3, dim=2)
        tokens = tokens + self.output(attended(query, key, value, self.heads))
        return tokens + self.mlp(self.mlp_norm(tokens))


def attended(
    query: Float[Tensor, "B Q width"], key: Float[Tensor, "B T width"], value: Float[Tensor, "B T width"], heads: int
) -> Float[Tensor, "B Q width"]:
    """softmax(q·k / √m) v in each of the heads, side by side."""
    split = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value)]  # (B, H, T, m)
    return F.scaled_dot_product_attention(split[0], split[1], split[2]).transpose(1, 2).flatten(2)
