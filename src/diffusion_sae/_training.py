"""What both trainers need: row orders and splits that depend on a seed alone, one-file checkpoints, a log."""

import importlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._config import check_choice
from ._files import remove_leftovers, write_atomically
from .features import FeatureSet
from .features.order import held_out_images

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_INDEX = "checkpoint.index.json"  # of one in several files
REPORT_TO = ("none", "trackio", "tensorboard", "wandb")
logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The training has left its way; the last good checkpoint is kept."""


def hold_out_images(features: FeatureSet, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows). Whole images are held out: the positions of one are alike.

    Raises:
        ValueError: if no image would be left to train on.
    """
    held = held_out_images(features.num_images, count, seed=seed)
    of_row = held[features.image_index]
    return torch.nonzero(~of_row).flatten(), torch.nonzero(of_row).flatten()


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
    *,
    run: str,
    history: list[dict[str, float]],
    name: str = CHECKPOINT,
) -> None:
    """Weights, optimiser moments and what else the next step depends on, in one file that is replaced whole."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors |= {f"extra.{key}": value for key, value in extra.items()}
    metadata = {"run": run, "history": json.dumps(history)}
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(folder / name, lambda path: save_file(contiguous, path, metadata=metadata))


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: str,
    history: list[dict[str, float]],
    name: str = CHECKPOINT,
) -> dict[str, Tensor] | None:
    """Restore what `save_checkpoint` wrote, append to `history` and return the extras; None without a checkpoint.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings or other features.
    """
    remove_leftovers(folder, "*.safetensors", "*.json")
    path = folder / name
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if file.metadata().get("run") != run:
            raise ValueError(
                f"{path} is from a run with other settings or features. Choose another output_dir, or delete the "
                "checkpoint to train anew there."
            )
        history += json.loads(file.metadata()["history"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    model.load_state_dict({key[6:]: v for key, v in tensors.items() if key.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, moment = key.split(".", 2)
            moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return {key[6:]: value for key, value in tensors.items() if key.startswith("extra.")}


def require_finite_loss(loss: float, step: int, output_dir: Path, advice: str, model: nn.Module | None = None) -> None:
    """Raise if the loss is no number, or a weight of `model`: the loss of the step before does not show it yet."""
    weights_finite = model is None or all(bool(torch.isfinite(p).all()) for p in model.parameters())
    if math.isfinite(loss) and weights_finite:
        return
    became = f"The loss became {loss}" if weights_finite else "The weights became NaN or infinite"
    raise TrainingDivergedError(f"{became} at step {step}. {advice} {kept_checkpoint(output_dir)}")


def kept_checkpoint(output_dir: Path) -> str:
    """What a training that stops says of its checkpoint."""
    checkpoints = [output_dir / name for name in (CHECKPOINT, CHECKPOINT_INDEX) if (output_dir / name).exists()]
    if not checkpoints:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is kept: {checkpoints[0]}. With other settings, train in another output_dir."


class MetricsLogger:
    """The one adapter to experiment trackers; off by default, each imported when asked for."""

    def __init__(self, report_to: str, output_dir: Path, config: Mapping[str, Any]) -> None:
        check_choice("report_to", report_to, REPORT_TO)
        self.history: list[dict[str, float]] = []
        self._run: Any = None
        self._kind = report_to
        try:
            if report_to in ("trackio", "wandb"):
                tracker: Any = importlib.import_module(report_to)
                self._run = tracker.init(project="diffusion_sae", name=output_dir.name, config=dict(config))
            elif report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self._run = SummaryWriter(str(output_dir))
        except ModuleNotFoundError as error:
            raise ImportError(
                f"report_to={report_to!r} needs {report_to}, which is not installed ({error}): pip install {report_to}."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.history.append({"step": step, **values})
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if self._kind in ("trackio", "wandb"):
            self._run.log(dict(values), step=step)
        elif self._kind == "tensorboard":
            for name, value in values.items():
                self._run.add_scalar(name, value, step)

    def close(self) -> None:
        if self._kind in ("trackio", "wandb"):
            self._run.finish()
        elif self._kind == "tensorboard":
            self._run.close()
