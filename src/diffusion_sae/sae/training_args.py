"""SAETrainingArguments. No torch here: the command line builds its options from these fields."""

import math
from dataclasses import dataclass
from typing import Any, Self

from .._config import JsonConfig, check, check_choice, check_integer, check_number

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "radam": "RAdam", "nadam": "NAdam", "sgd": "SGD"}  # of torch.optim
SCHEDULES = (
    "warmup_stable_decay",
    "constant_with_warmup",
    "constant",
    "linear",
    "cosine",
    "inverse_sqrt",
    "polynomial",
)
PENALTY_WEIGHTS = {"relu": 0.2, "jumprelu": 1.0}
LEARNING_RATE_OF_WIDTH_1 = 0.024  # 3e-3 at d_in 64, 6.7e-4 at 1280


@dataclass(frozen=True, kw_only=True)
class SAETrainingArguments(JsonConfig):
    """How an SAE is trained.

    The learning rate, its fall at the end and the boost of dead latents were chosen on features with a known dictionary
    (`benchmarks/sae_recovery.py`, `docs/results/sae-recovery.json`). The other defaults are Revelio's where it states
    one; `revelio()` is the paper's training.
    """

    output_dir: str
    """Folder for the checkpoint and the finished SAE; several processes must all see it."""
    learning_rate: float | None = None
    """Peak learning rate of Adam; None: 0.024 / √d_in, with which the unit-norm decoder rows turn equally fast in every
    width."""
    optimizer: str = "adam"
    """adam (whose update is fused with the gradients' sums), or torch.optim's adamw, radam, nadam, sgd."""
    adam_beta1: float = 0.9
    """Decay of the mean of the gradients; sgd has none."""
    adam_beta2: float = 0.999
    """Decay of the mean of their squares; sgd has none."""
    adam_epsilon: float = 1e-8
    """Added to the root of the latter; sgd has none."""
    weight_decay: float = 0.0
    """Of the optimiser: with adamw apart from the gradient, with the others as a part of it. Decoder rows keep unit
    norm."""
    micro_batch_size: int | None = None
    """Rows of a step that are computed at a time, to the result of all at once but for rounding; None: all, or of relu
    and jumprelu, while their codes are dense, as many as take 256 MiB each time that rows × latents are held. In
    several parts jumprelu and AuxK take one more forward pass."""
    bf16: bool = False
    """Whether the encoder's product (of relu and jumprelu also the decoder's) is computed in bfloat16; weights and all
    else stay in fp32."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_scheduler_type: str = "warmup_stable_decay"
    """warmup_stable_decay, constant_with_warmup, constant, linear, cosine, inverse_sqrt or polynomial, from
    transformers."""
    decay_fraction: float = 0.5
    """Share of the steps over which warmup_stable_decay falls to 0 at the end, linearly; the others ignore it."""
    batch_size: int = 8192
    """Rows a step, of all processes together."""
    max_steps: int | None = None
    """Steps in all; None: num_train_epochs over the rows."""
    num_train_epochs: float = 10.0
    """Passes over the rows, where max_steps is not given."""
    normalize_input: str = "none"
    """none; scalar: rows are divided by their root mean square; per_feature: by each feature's deviation. Folded into
    the weights of the finished SAE, which takes features as they are."""
    b_dec_init: str = "mean"
    """mean or geometric_median of the features, or zero."""
    k_anneal_start: int | None = None
    """Active latents at the first step, from where k falls to its value; None: no annealing."""
    k_anneal_steps: int = 1000
    """Steps over which k falls."""
    ema_decay: float | None = None
    """The finished SAE is the moving average of the weights with this decay; None: their last values."""
    resample_steps: int | None = None
    """Steps between resamplings of dead latents, the alternative to AuxK; None: never."""
    dead_latent_boost: float = 1.0
    """A dead latent's b_enc rises by this times the learning rate in every step, until the latent is active again; 0:
    not at all. By the loss −Σ_dead b_enc Adam would take the same steps."""
    auxk: int = 0
    """Dead latents that learn each row's residual (Gao et al. 2024, §A.2, who take half of d_in); 0: no AuxK loss."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss."""
    multi_topk_alpha: float = 0.0
    """Weight of the loss with 4 k latents beside that with k (Multi-TopK); Gao et al. use 1/8."""
    sparsity_coefficient: float | None = None
    """Weight of the penalty of the activations relu (L1) and jumprelu (L0); None: 0.2 and 1. Of relu it alone says how
    many latents are active."""
    dead_after_rows: int | None = None
    """A latent that was not active for so many rows counts as dead; None: 100 num_latents / k, a hundred times the gap
    between the active rows of an average latent."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None: not at all."""
    eval_fraction: float = 0.05
    """Share of the images held out for evaluation, where no evaluation features are given."""
    eval_steps: int | None = None
    """Steps between evaluations on held-out rows; None: at the end alone."""
    early_stopping_patience: int | None = None
    """Evaluations without a better FVU after which the training ends; None: never. Needs eval_steps."""
    keep_best: bool = False
    """Whether the finished SAE is the one with the best FVU of all evaluations. Needs eval_steps."""
    max_dead_latents: float = 0.95
    """Share of dead latents above which the training stops with advice; 1: never."""
    shard_latents: bool = False
    """Whether each process holds a share of the latents and sees whole batches, for dictionaries larger than a device;
    False: each holds all latents and a share of the batch. It takes an SAE on the meta device, which was never made in
    full; activations topk, relu_topk, signed_topk and batchtopk."""
    seed: int = 0
    """Seed of the row order and the held-out images."""
    logging_steps: int = 50
    """Steps between log lines, beside the first and the last."""
    save_steps: int = 500
    """Steps between checkpoints."""
    report_to: str = "none"
    """none, trackio, tensorboard or wandb."""

    @classmethod
    def revelio(cls, output_dir: str, **changes: Any) -> Self:
        """The paper's training: learning rate 4e-4, 500 steps of warm-up, nothing against dead latents, no clipping.

        It goes with `KSparseAutoencoderConfig(encoder_init="kaiming", activation="signed_topk")`. The loss is the
        library's: the error of each row relative to its length, where the paper's code has that of the batch relative
        to its variance.
        """
        of_paper: dict[str, Any] = {"learning_rate": 4e-4, "warmup_steps": 500, "dead_latent_boost": 0.0}
        of_paper |= {"max_dead_latents": 1.0, "max_grad_norm": None}
        of_paper |= {"lr_scheduler_type": "constant_with_warmup"}
        return cls(output_dir=output_dir, **(of_paper | changes))

    def peak_learning_rate(self, d_in: int) -> float:
        """`learning_rate`, or for None that of the width: Adam moves each entry of a weight by about the learning rate,
        and so a row of unit norm and d_in entries by √d_in times that.
        """
        return LEARNING_RATE_OF_WIDTH_1 / math.sqrt(d_in) if self.learning_rate is None else self.learning_rate

    def penalty_weight(self, activation: str) -> float:
        """`sparsity_coefficient`, or for None that of the activation."""
        return PENALTY_WEIGHTS.get(activation, 0.0) if self.sparsity_coefficient is None else self.sparsity_coefficient

    def rows_until_dead(self, num_latents: int, k: int) -> int:
        """`dead_after_rows`, or for None that of the SAE's size."""
        return round(100 * num_latents / k) if self.dead_after_rows is None else self.dead_after_rows

    def __post_init__(self) -> None:
        check(bool(self.output_dir), "output_dir must name a folder, got an empty string.")
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 0, open_low=True)
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_number("adam_beta1", self.adam_beta1, 0, 0.999999)
        check_number("adam_beta2", self.adam_beta2, 0, 0.999999)
        check_number("adam_epsilon", self.adam_epsilon, 0, open_low=True)
        check_number("weight_decay", self.weight_decay, 0)
        if self.micro_batch_size is not None:
            check_integer("micro_batch_size", self.micro_batch_size, 1)
        check_number("multi_topk_alpha", self.multi_topk_alpha, 0)
        if self.sparsity_coefficient is not None:
            check_number("sparsity_coefficient", self.sparsity_coefficient, 0)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_integer("batch_size", self.batch_size, 1)
        if self.max_steps is not None:
            check_integer("max_steps", self.max_steps, 1)
        check_number("num_train_epochs", self.num_train_epochs, 0, open_low=True)
        check_number("decay_fraction", self.decay_fraction, 0, 1)
        check_number("dead_latent_boost", self.dead_latent_boost, 0)
        check_integer("auxk", self.auxk, 0)
        check_number("auxk_alpha", self.auxk_alpha, 0)
        if self.dead_after_rows is not None:
            check_integer("dead_after_rows", self.dead_after_rows, 1)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, 0, open_low=True)
        check_number("eval_fraction", self.eval_fraction, 0, 0.9)
        check_integer("seed", self.seed, 0)
        check_choice("normalize_input", self.normalize_input, ("none", "scalar", "per_feature"))
        check_choice("b_dec_init", self.b_dec_init, ("mean", "geometric_median", "zero"))
        for name in ("k_anneal_start", "resample_steps", "eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("k_anneal_steps", self.k_anneal_steps, 1)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, 0, 0.999999)
        check_number("max_dead_latents", self.max_dead_latents, 0, 1)
        needs = [name for name in ("early_stopping_patience", "keep_best") if getattr(self, name)]
        check(not needs or self.eval_steps is not None, f"{' and '.join(needs)} need eval_steps: give it as well.")
        check_integer("logging_steps", self.logging_steps, 1)
        check_integer("save_steps", self.save_steps, 1)
