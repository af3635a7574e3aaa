"""What a trainer takes: batches of rows by step, wherever they come from."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from ..provenance import Provenance
from .feature_set import FeatureSet
from .moments import Moments


@runtime_checkable
class FeatureSource(Protocol):
    """Shuffled batches whose content depends on the step's number alone, so that a resumed run needs no state of it.

    `ShuffledBatches` reads them from a FeatureSet; `DiffusionFeatureExtractor.stream` makes them of images on the way.
    """

    @property
    def batch_size(self) -> int:
        """Rows a batch, of all processes together."""
        ...

    @property
    def d_in(self) -> int: ...

    @property
    def provenance(self) -> Provenance | None:
        """The extraction that makes the rows."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    def __len__(self) -> int:
        """Rows an epoch goes through, those included that are left over because they fill no batch."""
        ...

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Float[Tensor, "b d_in"]:
        """Rows of a step in fp32 on the CPU; of several processes, the contiguous share of process `rank` of `world`.

        Consecutive steps are fast; any step may be asked for.
        """
        ...

    def timesteps_of(self, step: int, rank: int = 0, world: int = 1) -> Int[Tensor, " b"] | None:
        """Timestep of each row of that batch; None if it is not known."""
        ...

    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean of the rows, or of so many of them as the source can give at once; the same at every call."""
        ...

    def moments(self) -> Moments:
        """Mean and spread of the rows that `mean` is of, of each timestep its own."""
        ...

    def held_out(self) -> FeatureSet | None:
        """All rows of the images that no batch has a row of, to evaluate on; None if there are none."""
        ...

    def fingerprint(self) -> str:
        """Hash that tells one source from another: the rows, their order, and how they make batches."""
        ...

    def close(self) -> None:
        """Give up buffers and threads; the next `batch` makes them anew."""
        ...
