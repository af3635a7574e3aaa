"""Revelio's `.pt`, whose `state_dict` has W_enc, b_enc, W_dec and b_dec: signed TopK, no ReLU, no normalisation.

The files that its training writes hold a pickled dataclass beside the weights, and are refused; the weights alone,
saved again, can be read. k is not among them.
"""

from .checkpoint import Checkpoint
from .options import ForeignOptions
from .weights import NAMES, ForeignSAE, take


def recognise(checkpoint: Checkpoint) -> bool:
    name = checkpoint.sole_weights()
    return name is not None and set(checkpoint.tensors(name)) == set(NAMES)


def read(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    name = checkpoint.sole_weights()
    if name is None:
        raise ValueError("Revelio gives its files a name each: give filename.")
    weights = take(checkpoint.tensors(name), {key: key for key in NAMES}, name)
    if options.k is None:
        raise ValueError("Revelio's weights do not say k: give it. The paper's is 32.")
    return ForeignSAE({"activation": "signed_topk", "k": options.k}, weights)
