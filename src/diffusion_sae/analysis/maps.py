"""Maps: a whole set of images in the plane, and what a layer tells apart within an image, as colour."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._config import check, check_choice, check_integer
from .._optional import missing
from ..features import FeatureSet, FeatureStore, ImageSubset
from .pca import PrincipalComponents, Rows, principal_components
from .readout import mean_features

METHODS = ("pca", "umap", "tsne")
COMPONENTS = 50
"""That UMAP and t-SNE are given: their neighbours are found among these, in place of thousands of numbers a row."""


@dataclass(frozen=True)
class ImageMap:
    """One point an image."""

    points: Float[np.ndarray, "images 2"]
    settings: Mapping[str, Any]
    """Method, seed and what else the map depends on, as JSON takes it."""


def image_map(rows: Rows, method: str = "umap", *, neighbors: int = 15, seed: int = 0) -> ImageMap:
    """Images in the plane, those alike near each other.

    - `pca`: the two directions of largest variance; distances are those of the rows as far as these hold them.
    - `umap` (McInnes et al. 2018): of near neighbours; far distances and the sizes of groups mean little.
    - `tsne` (van der Maaten & Hinton 2008): as UMAP, slower.

    The last two are given the first 50 principal components and start at the first two. The same rows, seed and
    versions give the same map on one machine.

    Args:
        rows: one an image: features, or a (sparse) matrix of activations (images, num_latents). Of features with
            several rows an image, the mean.
        method: one of these.
        neighbors: of an image that UMAP keeps near; a third of t-SNE's perplexity. Fewer for fewer images.
        seed: of what is random.

    Raises:
        ValueError: for fewer than 4 images, or rows that are all equal.
        ImportError: for UMAP without umap-learn, and t-SNE without scikit-learn.
    """
    check_choice("method", method, METHODS)
    check_integer("neighbors", neighbors, 2)
    if isinstance(rows, FeatureSet):
        rows = mean_features(rows) if rows.rows_per_image > 1 else rows
    count = len(rows) if isinstance(rows, FeatureSet) else rows.shape[0]
    check(count >= 4, f"A map needs at least 4 images, got {count}.")
    settings: dict[str, Any] = {"method": method, "seed": seed, "images": count}
    width = rows.d_in if isinstance(rows, FeatureSet) else rows.shape[1]
    wanted = 2 if method == "pca" else COMPONENTS
    found = principal_components(rows, min(wanted, count, width), seed)
    low = found.project(rows).numpy()
    if low.shape[1] == 1:
        low = np.pad(low, ((0, 0), (0, 1)))
    settings |= {"explained": [round(share, 6) for share in found.explained[:2].tolist()]}
    if method == "pca":
        return ImageMap(low, settings)
    neighbors = min(neighbors, count - 1)
    start = low[:, :2] / max(float(low[:, 0].std()), 1e-12)
    points, more = (_umap if method == "umap" else _tsne)(low, start, neighbors, seed)
    return ImageMap(np.asarray(points, np.float32), settings | {"neighbors": neighbors, **more})


@contextmanager
def _threads_kept() -> Generator[None]:
    """Numba, which UMAP is made with, sets the number of threads that torch computes with as well."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_threads_kept()
def _umap(rows: np.ndarray, start: np.ndarray, neighbors: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import umap
    except ImportError as error:
        raise missing("umap-learn", "maps", "A UMAP") from error
    # one job: with several the order in which points move, and so the map, is not the same in two runs
    settings: Any = {"init": 10 * start, "random_state": seed, "n_jobs": 1}
    model = umap.UMAP(n_neighbors=neighbors, min_dist=0.1, **settings)
    return model.fit_transform(rows), {"min_dist": 0.1, "umap-learn": umap.__version__}


def _tsne(rows: np.ndarray, start: np.ndarray, neighbors: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import sklearn
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing("scikit-learn", "baselines", "A t-SNE") from error
    perplexity = max(1.0, neighbors / 3)
    settings: Any = {"init": 1e-4 * start, "random_state": seed, "n_jobs": 1}
    points = TSNE(perplexity=perplexity, **settings).fit_transform(rows)
    return points, {"perplexity": perplexity, "scikit-learn": sklearn.__version__}


@dataclass(frozen=True)
class PositionColours:
    """Three principal components of the positions of images as red, green and blue, as Revelio shows layers.

    Positions that a layer holds alike have the same colour, in all images. Each component goes from black to full
    between its 1st and 99th percentile.
    """

    pca: PrincipalComponents
    low: Float[Tensor, " 3"]
    high: Float[Tensor, " 3"]

    @classmethod
    def fit(cls, positions: Float[Tensor, "N d"], seed: int = 0) -> "PositionColours":
        """By the positions of a set of images.

        Raises:
            ValueError: for fewer than 3 positions or dimensions.
        """
        pca = principal_components(positions, 3, seed)
        quantiles = torch.quantile(pca.project(positions), torch.tensor([0.01, 0.99]), dim=0)
        return cls(pca, quantiles[0], quantiles[1])

    def __call__(self, positions: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 3"]:
        """Colours in 0…1."""
        projected = self.pca.project(positions.reshape(-1, positions.shape[-1]))
        share = (projected - self.low) / (self.high - self.low).clamp_min(1e-12)
        return share.clamp(0, 1).reshape(*positions.shape[:-1], 3)

    def flipped(self, signs: Float[Tensor, " 3"]) -> "PositionColours":
        """With components that point the other way where a sign is −1."""
        pca = PrincipalComponents(self.pca.mean, self.pca.components * signs[:, None], self.pca.explained)
        low, high = torch.where(signs < 0, -self.high, self.low), torch.where(signs < 0, -self.low, self.high)
        return PositionColours(pca, low, high)


@dataclass(frozen=True)
class ColourMaps:
    """Colours of the positions of some images at one layer and timestep."""

    rgb: Float[np.ndarray, "images h w 3"]
    """In 0…1."""
    colours: PositionColours
    """To colour further images alike."""

    @property
    def explained(self) -> list[float]:
        """Share of the positions' variance in each of the three."""
        return self.colours.pca.explained.tolist()


def colour_maps(
    features: FeatureStore | Mapping[tuple[str, int], FeatureSet],
    images: Sequence[int],
    *,
    fit_images: int = 200,
    seed: int = 0,
) -> dict[tuple[str, int], ColourMaps]:
    """The same images at each layer and timestep, in the colours of three principal components.

    Components are fitted over the positions of a random part of the images, at each layer and timestep by themselves,
    so that the same colour in two of them does not mean the same. Which way a component points is chosen to agree
    with the layer and timestep before, so that colours do not turn without need.

    Args:
        features: extracted with pooling="tokens" or "none": a store, or a set for each (layer, timestep). Of a store
            layers with one position an image are left out.
        images: which images to colour, by number.
        fit_images: images that the components are fitted over.
        seed: of which these are.

    Raises:
        ValueError: for features that are not of a square grid of positions, and images that are not there.
    """
    if isinstance(features, FeatureStore):
        every = {(layer, t): features.select(layer, t) for layer in features.layers for t in features.timesteps}
        features = {cell: own for cell, own in every.items() if own.positions_per_image > 1} or every
    maps: dict[tuple[str, int], ColourMaps] = {}
    before: Tensor | None = None
    for cell, own in features.items():
        check(
            all(0 <= image < own.num_images for image in images) and len(images) > 0,
            f"images must lie in 0…{own.num_images - 1}, got {list(images)}.",
        )
        order = torch.randperm(own.num_images, generator=torch.Generator().manual_seed(seed))[:fit_images]
        colours = PositionColours.fit(position_rows(own, order.sort().values).flatten(0, 2), seed)
        wanted = position_rows(own, torch.as_tensor(list(images)))
        if before is not None:
            colours = colours.flipped(_signs(colours(wanted), before))
        rgb = before = colours(wanted)
        maps[cell] = ColourMaps(rgb.numpy(), colours)
    return maps


def position_rows(features: FeatureSet, images: Int[Tensor, " n"]) -> Float[Tensor, "n h w d"]:
    """Activations of some images by position, of features of tokens or of whole activations.

    Raises:
        ValueError: for pooled features, several timesteps, and positions that are no square grid.
    """
    rows = ImageSubset(features, images)
    if len(features.row_shape) == 3:  # (n, C, h, w)
        return rows[:].permute(0, 2, 3, 1)
    positions = rows[:] if len(features.row_shape) == 2 else rows[:].unflatten(0, (len(images), -1))
    side = round(positions.shape[1] ** 0.5)
    if side < 2 or side * side != positions.shape[1] or features.num_timesteps > 1:
        raise ValueError(
            f"Colours need a square grid of positions at one timestep, got {positions.shape[1]} rows an image over "
            f"{features.num_timesteps}. Extract with pooling='tokens' and select one timestep."
        )
    return positions.unflatten(1, (side, side))


def _signs(now: Float[Tensor, "n h w 3"], before: Float[Tensor, "n h2 w2 3"]) -> Float[Tensor, " 3"]:
    """−1 where a component falls over the places where it rose before, on the coarser of the two grids."""
    side = min(now.shape[1], before.shape[1])
    pair = [torch.nn.functional.adaptive_avg_pool2d(x.permute(3, 0, 1, 2), side).flatten(1) for x in (now, before)]
    centred = [x - x.mean(1, keepdim=True) for x in pair]
    return torch.where((centred[0] * centred[1]).sum(1) < 0, -1.0, 1.0)
