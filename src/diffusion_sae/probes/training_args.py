"""ProbeTrainingArguments. No torch here: the command line builds its options from these fields."""

from dataclasses import dataclass

from .._config import JsonConfig, check, check_choice, check_integer, check_number

OPTIMIZERS = ("auto", "lbfgs", "adamw")


@dataclass(frozen=True, kw_only=True)
class ProbeTrainingArguments(JsonConfig):
    """How a probe is trained: fitted on training rows, chosen on validation rows; test rows are never seen."""

    output_dir: str
    """Folder for the checkpoint and the finished probe."""
    optimizer: str = "auto"
    """lbfgs (all rows at once, an L2 path chosen on validation), adamw, or auto: lbfgs for linear, else adamw."""
    l2_path: tuple[float | int, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """L2 strengths that lbfgs tries: loss = cross-entropy + l2 · ‖W‖² / 2, on standardised features."""
    learning_rate: float = 1e-4
    """AdamW's, Revelio's value."""
    batch_size: int = 16
    """Rows a step of adamw, Revelio's value."""
    num_train_epochs: int = 30
    """Epochs of adamw, Revelio's value."""
    cosine_epochs: int = 90
    """Epochs to the end of adamw's cosine schedule; Revelio's stops at a third of it."""
    weight_decay: float | int = 0.01
    """AdamW's."""
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
        check_number("learning_rate", self.learning_rate, 0, open_low=True)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("num_train_epochs", self.num_train_epochs, 1)
        check_integer("cosine_epochs", self.cosine_epochs, self.num_train_epochs)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("validation_fraction", self.validation_fraction, 0, 0.9, open_low=True)
        check_integer("seed", self.seed, 0)
