"""Activations of a layer to features, and the features of one call."""

from collections.abc import Iterator, Mapping

from torch import Tensor


class ExtractedFeatures(Mapping[tuple[str, int], Tensor]):
    """Features by (layer, timestep).

    (B, C) for mean and max, (B, T, C) for tokens, (B, C, h, w) or (B, T, C) for none.
    """

    def __init__(self, features: dict[tuple[str, int], Tensor], image_ids: list[str]) -> None:
        self._features = features
        self.image_ids = image_ids
        """What the noise of each image was drawn by."""

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        if key not in self._features:
            raise KeyError(f"{key!r} was not extracted. Extracted: {', '.join(map(str, self._features))}.")
        return self._features[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)


def pool(activations: Tensor, pooling: str) -> Tensor:
    """Activations (B, C, h, w) or (B, T, C) to features."""
    if pooling == "none":
        return activations
    tokens = activations.flatten(2).transpose(1, 2) if activations.ndim == 4 else activations  # (B, T, C)
    if pooling == "tokens":
        return tokens
    return tokens.mean(1) if pooling == "mean" else tokens.amax(1)
