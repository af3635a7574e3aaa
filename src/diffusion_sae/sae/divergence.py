"""When a training has left its way for good, though its loss is still a number."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .._training import TrainingDivergedError, kept_checkpoint
from .training_args import SAETrainingArguments

PATIENCE = 3  # log lines
ADVICE = "Lower learning_rate, or check the features' scale."


def diverging_lines(history: Sequence[Mapping[str, float]], warmup_steps: int) -> int:
    """How many of the last log lines, one after the other, are worse than the mean row and than twice the best loss.

    After the warm-up alone. A bad start does not count, as long as the loss does not rise above it.
    """
    best, count = float("inf"), 0
    for line in history:
        if "loss" not in line:  # of an evaluation
            continue
        worse = line.get("fvu", 0.0) > 1 and line["loss"] > 2 * best and line["step"] > warmup_steps
        count = count + 1 if worse else 0
        best = min(best, line["loss"])
    return count


def require_convergence(history: Sequence[Mapping[str, float]], args: SAETrainingArguments, output_dir: Path) -> None:
    """Raise if by the last line of the log too many latents are dead, or the loss has risen for good."""
    last = history[-1]
    step, dead = int(last["step"]), last["dead_latents"]
    if dead > args.max_dead_latents:
        raise TrainingDivergedError(
            f"{dead:.0%} of the latents are dead at step {step}, more than max_dead_latents = "
            f"{args.max_dead_latents:.0%}. Use encoder_init='tied', dead_latent_boost, auxk, resample_steps or another "
            f"learning_rate. {kept_checkpoint(output_dir)}"
        )
    if diverging_lines(history, args.warmup_steps) >= PATIENCE:
        best = min(line["loss"] for line in history if "loss" in line)
        raise TrainingDivergedError(
            f"The loss was {best:.3g} at best and is {last['loss']:.3g} at step {step}, where the SAE explains less "
            f"than the mean row (FVU {last['fvu']:.3g}), for {PATIENCE} log lines by now. {ADVICE} "
            f"{kept_checkpoint(output_dir)}"
        )
