"""ProbeTrainingArguments. No torch here: the command line builds its options from these fields."""

from dataclasses import dataclass

from .._config import JsonConfig, check, check_choice, check_integer, check_number

OPTIMIZERS = ("auto", "lbfgs", "fista", "adamw")
CLASS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True, kw_only=True)
class ProbeTrainingArguments(JsonConfig):
    """How a probe is trained: fitted on training rows, chosen on validation rows; test rows are never seen."""

    output_dir: str
    """Folder for the checkpoint and the finished probe."""
    optimizer: str = "auto"
    """lbfgs or fista (all rows at once, an L2 or L1 path chosen on validation; heads linear and sae), adamw, or auto:
    lbfgs for linear, fista for sae, nothing for knn and prototype, else adamw."""
    l2_path: tuple[float | int, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """L2 strengths that lbfgs tries: loss = cross-entropy + l2 · ‖W‖² / 2, on standardised features."""
    l1_path: tuple[float | int, ...] = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    """L1 strengths that fista tries, as fractions of the smallest one at which every weight is 0."""
    neighbors_path: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that knn tries (DINO's), unless the config's num_neighbors fixes it."""
    learning_rate: float = 1e-4
    """AdamW's, Revelio's value."""
    batch_size: int = 16
    """Rows a step of adamw, Revelio's value."""
    num_train_epochs: int = 30
    """Epochs of adamw, Revelio's value."""
    cosine_epochs: int = 90
    """Epochs to the end of adamw's cosine schedule, at least num_train_epochs; Revelio's stops at a third of it."""
    weight_decay: float | int = 0.01
    """AdamW's."""
    early_stopping_patience: int | None = None
    """Epochs of adamw without a better validation score after which it stops; None: all epochs."""
    bf16: bool = False
    """Whether adamw computes in bfloat16 (autocast); weights stay as they are."""
    class_weights: str = "none"
    """balanced: each class counts alike in the loss, n / (C n_c) an example, for long tails; or none."""
    balanced_sampling: bool = False
    """Whether adamw draws each class with the same chance, with replacement, for long tails."""
    validation_fraction: float = 0.1
    """Share of the rows kept for validation, where no validation features are given."""
    seed: int = 0
    """Seed of the row order, the dropout and the validation rows."""
    report_to: str = "none"
    """none, trackio, tensorboard or wandb."""

    def __post_init__(self) -> None:
        check(bool(self.output_dir), "output_dir must name a folder, got an empty string.")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check(len(self.l2_path) > 0, "l2_path must hold at least one strength, got none.")
        for strength in self.l2_path:
            check_number("l2_path", strength, 0)
        check(len(self.l1_path) > 0, "l1_path must hold at least one fraction, got none.")
        for fraction in self.l1_path:
            check_number("l1_path", fraction, 0, 1, open_low=True)
        check(len(self.neighbors_path) > 0, "neighbors_path must hold at least one number, got none.")
        for neighbors in self.neighbors_path:
            check_integer("neighbors_path", neighbors, 1)
        check_number("learning_rate", self.learning_rate, 0, open_low=True)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("num_train_epochs", self.num_train_epochs, 1)
        check_integer("cosine_epochs", self.cosine_epochs, 1)
        check(
            self.cosine_epochs >= self.num_train_epochs,
            f"cosine_epochs must be an integer ≥ {self.num_train_epochs}, got {self.cosine_epochs}: after it the "
            f"learning rate would rise again, and num_train_epochs is {self.num_train_epochs}. Give both, e.g. "
            f"cosine_epochs={3 * self.num_train_epochs} for Revelio's third of a cosine.",
        )
        check_number("weight_decay", self.weight_decay, 0)
        check_number("validation_fraction", self.validation_fraction, 0, 0.9, open_low=True)
        check_integer("seed", self.seed, 0)
        if self.early_stopping_patience is not None:
            check_integer("early_stopping_patience", self.early_stopping_patience, 1)
        check_choice("class_weights", self.class_weights, CLASS_WEIGHTS)
        for name in ("bf16", "balanced_sampling"):
            check_choice(name, getattr(self, name), (True, False))
        both = self.class_weights == "balanced" and self.balanced_sampling
        check(not both, "class_weights='balanced' and balanced_sampling do the same twice: choose one.")
