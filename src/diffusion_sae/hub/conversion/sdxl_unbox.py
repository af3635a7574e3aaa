"""sdxl-unbox (`state_dict.pth`, `config.json`): ReLU after TopK; encoder and decoder lie as in torch.nn.Linear.

Its SAEs are of what a block adds, output − input: `diffusion_sae` extracts that as a difference of blocks. `mean.pt`
and `std.pt` beside it are statistics of the latents for steering, no normalisation, and are not read.
"""

from .checkpoint import Checkpoint, whole_number
from .options import ForeignOptions
from .weights import ForeignSAE, require_size, take

CONFIG, WEIGHTS = "config.json", "state_dict.pth"
PLACES = {"W_enc": "encoder.weight.T", "b_enc": "latent_bias", "W_dec": "decoder.weight.T", "b_dec": "pre_bias"}


def recognise(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS) or checkpoint.chosen == WEIGHTS


def read(checkpoint: Checkpoint, options: ForeignOptions) -> ForeignSAE:
    config = checkpoint.json(CONFIG)
    weights = take(checkpoint.tensors(WEIGHTS), PLACES, WEIGHTS, ("stats_last_nonzero",))
    require_size(config, {"d_model": weights.d_in, "n_dirs_local": weights.num_latents}, CONFIG)
    return ForeignSAE({"activation": "topk", "k": options.k or whole_number(config, "k", CONFIG)}, weights)
