"""Features made while they are needed, of which none are kept on the disk."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._config import check, check_integer
from .._files import fingerprint_of
from ..features import FeatureSet, Shard
from ..features.beginning import DataRecord
from ..features.buffered import NUMBERS_BYTES, BufferedBatches
from ..features.moments import Moments, moments_of
from ..features.order import BlockOrder, Group, held_out_images
from ..features.shuffle import BUFFER_BYTES
from ..provenance import Provenance
from .reading import Reading, with_texts
from .sources import open_images

if TYPE_CHECKING:
    from .extractor import DiffusionFeatureExtractor

CHECKED_IMAGES = 8


class OnTheFlyFeatures(BufferedBatches):
    """Shuffled batches of the features of a data set's images, extracted when they are needed: a `FeatureSource`.

    The images are permuted by (seed, epoch) and dealt into groups; the rows of a group are extracted into a buffer,
    permuted, and served (see `BlockOrder`, whose blocks are images). Memory: one buffer. The images are decoded ahead
    of the model by threads; the model itself runs when a batch needs the next buffer, as it may share its device with
    the training. A resumed run extracts the buffer of its step again, and none before it. If all rows fit into one
    buffer, each image is extracted once, for all epochs; else once an epoch, so that over several epochs a store is
    faster where there is room for one.

    Of several processes each extracts the images that its shares have rows of: of pooled features its part, of tokens
    nearly all. Rows are the same to 1e-5 in fp32, as images may share a forward pass with others.
    """

    def __init__(
        self,
        extractor: "DiffusionFeatureExtractor",
        dataset: Any,
        layer: str,
        timestep: int | Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        split: str = "train",
        limit: int | None = None,
        prompts: Sequence[str] | None = None,
        hold_out: int = 0,
        images_per_forward: int = 32,
        buffer_bytes: int = BUFFER_BYTES,
        progress: bool = True,
    ) -> None:
        """
        Args:
            extractor: with pooling mean, max or tokens.
            dataset, split, limit, prompts: as in `DiffusionFeatureExtractor.extract`.
            layer: one that the extractor takes.
            timestep: one of the extractor's, or several.
            batch_size: rows a batch, of all processes together.
            seed: of the order, and of the choice of images that are held out; not that of the noise.
            hold_out: so many images are in no batch; their features are given by `held_out`. With the same seed they
                are those that `SAETrainer` holds out of a store of the same images.
            images_per_forward: images a forward pass.
            buffer_bytes: size of the buffer. The larger, the more images a batch has rows of.
            progress: show a bar while a buffer is filled.

        Raises:
            ValueError: for pooling none, a layer or timestep that the extractor does not take, too few images, or a
                buffer smaller than a batch or an image's rows.
            ImageError: for a broken image, naming it, here or when its turn comes: leave it out of the data set.
        """
        pooling = extractor.config.pooling
        check(pooling != "none", "Batches are of rows (d_in,): pooling must be mean, max or tokens, got 'none'.")
        check(
            not extractor.config.views, "Views are of stores: give an extractor without views, or extract into a store."
        )
        for name, value, low in (("limit", limit, 1), ("hold_out", hold_out, 0), ("buffer_bytes", buffer_bytes, 1)):
            if value is not None:
                check_integer(name, value, low)
        check_integer("images_per_forward", images_per_forward, 1)
        self.extractor = extractor.only(layer, timestep)
        source = with_texts(open_images(dataset, split), prompts, extractor.config.prompt_from).first(limit)
        self._reading = Reading(self.extractor, source, batch_size=images_per_forward)
        self._progress = progress
        held = held_out_images(len(source), hold_out, seed=seed)
        self._held = torch.nonzero(held).flatten()
        self.images = torch.nonzero(~held).flatten()
        """Which images of the data set the batches have rows of."""
        first = next(self._computed(self.images[:1]))  # finds out the shape, and before the training what fails
        _, self.rows_per_image, self._d_in = first.shape
        self._dtype = first.dtype
        order = BlockOrder(
            count=len(self.images) * self.rows_per_image,
            batch_size=batch_size,
            seed=seed,
            block_rows=self.rows_per_image,
            buffer_rows=max(1, buffer_bytes // (self._d_in * first.element_size() + NUMBERS_BYTES)),
        )
        super().__init__(order, ahead=False)

    @property
    def d_in(self) -> int:
        return self._d_in

    @property
    def provenance(self) -> Provenance:
        return self.extractor.provenance

    def __repr__(self) -> str:
        order = self.order
        return (
            f"OnTheFlyFeatures({order.count} rows of {self.d_in}, {len(self.images)} images, batches of "
            f"{order.batch_size}, {order.num_groups} buffers an epoch, seed {order.seed})"
        )

    def timesteps_of(self, step: int, rank: int = 0, world: int = 1) -> Int[Tensor, " b"]:
        """See `FeatureSource.timesteps_of`."""
        return self._timesteps(self.order.rows_of(step, rank, world))

    def _timesteps(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        timesteps = torch.tensor(self.provenance.timesteps)
        return timesteps[rows % self.rows_per_image // (self.rows_per_image // len(timesteps))]

    def images_of(self, step: int, rank: int = 0, world: int = 1) -> Int[Tensor, " b"]:
        """Which image of the data set each row of that batch is of."""
        return self.images[self.order.rows_of(step, rank, world) // self.rows_per_image]

    def mean(self) -> Float[Tensor, " d_in"]:
        """Of the first buffer, accumulated in fp64; of all rows, if they fit into one."""
        return self._buffer(Group(0, 0), 0, 1).content.double().mean(0).float()

    def moments(self) -> Moments:
        """Of the rows of `mean`."""
        buffer = self._buffer(Group(0, 0), 0, 1)
        parts = zip(buffer.content.split(8192), self._timesteps(buffer.rows).split(8192), strict=True)
        return moments_of(parts, self.provenance.timesteps, self.d_in)

    def held_out(self) -> FeatureSet | None:
        """Of the images that `hold_out` has chosen; extracted at the first call, and kept in memory."""
        return self._held_out

    @cached_property
    def _held_out(self) -> FeatureSet | None:
        if not len(self._held):
            return None
        reading, timesteps = self._reading, self.provenance.timesteps
        rows = torch.cat(list(self._computed(self._held))).float()  # (n, timesteps · T, C)
        by_timestep = rows.unflatten(1, (len(timesteps), -1)).transpose(0, 1)
        labels = [reading.source.labels[i] for i in self._held.tolist()]
        return FeatureSet(
            [by_timestep.flatten(0, 2)],
            rows_per_image=self.rows_per_image,
            labels=None if None in labels else torch.tensor(labels),
            image_ids=[reading.load(i).id for i in self._held.tolist()],
            class_names=reading.source.class_names,
            provenance=self.provenance,
            timesteps=timesteps,
        )

    def fingerprint(self) -> str:
        """See `FeatureSource.fingerprint`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Decodes a few images."""
        source, images = self._reading.source, self.images.tolist()
        data = DataRecord.of(source.names, source.labels, source.class_names, 1, self._reading.texts)
        checked = [self._reading.load(row).id for row in images[:: max(1, len(images) // CHECKED_IMAGES)]]
        content = {"extraction": self.provenance.fingerprint, "data": data.fingerprint, "images": checked}
        return fingerprint_of(content | {"held_out": self._held.tolist(), **self.order.record()})

    def _read(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        of = rows // self.rows_per_image
        images, content, done = of.unique(), torch.empty(len(rows), self.d_in, dtype=self._dtype), 0
        computed = self._computed(self.images[images])
        for some, features in zip(images.split(self._reading.batch_size), computed, strict=True):
            end = int(torch.searchsorted(of, some[-1], right=True))
            places = torch.searchsorted(some, of[done:end]), rows[done:end] % self.rows_per_image
            content[done:end] = features[places]
            done = end
        return content

    def _computed(self, images: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "b rows_per_image d_in"]]:
        """Features of images of the data set: timestep by timestep all positions."""
        reading, provenance = self._reading, self.provenance
        (layer,) = provenance.layers
        bar = tqdm(total=len(images), unit="img", desc="extract", leave=False, disable=not self._progress)
        with bar, closing(reading.ahead(images.tolist())) as ahead:
            while batch := list(islice(ahead, reading.batch_size)):
                shard = Shard()
                reading.add(batch, shard)
                tensors = [shard.features[layer, t][0] for t in provenance.timesteps]
                # (b, C) or (b, T, C) of each timestep -> (b, timesteps · T, C)
                yield torch.cat([x.reshape(len(batch), -1, x.shape[-1]) for x in tensors], 1)
                bar.update(len(batch))
