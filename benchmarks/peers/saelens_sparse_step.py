"""SAELens with `use_sparse_activations`, its option for codes as a sparse tensor, which it has off by default.

`rescale_acts_by_decoder_norm`, on by default, is off with it: PyTorch on a CPU cannot differentiate the two together.
The decoder's norm is then free.
"""

from functools import partial

from saelens_step import DISTRIBUTION as DISTRIBUTION
from saelens_step import build as build_dense

COMPRISES = (
    "SAETrainer.step: codes as a COO tensor, decoder norms free, MSE, firing statistics, backward, gradients clipped "
    "to norm 1, torch Adam, scheduler; no latent counts as dead, so no AuxK"
)
build = partial(build_dense, sparse=True)
