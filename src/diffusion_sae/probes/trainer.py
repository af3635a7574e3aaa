"""ProbeTrainer: fits on training rows, chooses on validation rows, reports on test rows once, when asked to."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._files import fingerprint_of, require_writable_folder
from ..features import AlignedFeatures, FeatureSet
from ..features.aligned import same_images
from ..provenance import require_same_provenance
from .epochs import fit_adamw, require_trainable
from .examples import Examples, Features, Views
from .heads import HEADS
from .heads.base import Batches, Head
from .modeling import DiffusionProbe
from .paths import fit_fista, fit_lbfgs, fit_memory
from .processes import ProbeProcesses
from .results import ProbeMetrics, ProbeTrainingResult
from .run import Run, class_weights_of
from .training_args import ProbeTrainingArguments

logger = logging.getLogger(__name__)
FITS: dict[str, Callable[[Run], ProbeTrainingResult]] = {
    "lbfgs": fit_lbfgs,
    "fista": fit_fista,
    "adamw": fit_adamw,
    "none": fit_memory,
}
# numbers that one way of fitting alone reads
ONLY_OF = {
    "adamw": ("learning_rate", "batch_size", "num_train_epochs", "cosine_epochs", "weight_decay"),
    "lbfgs": ("l2_path",),
    "fista": ("l1_path",),
    "none": ("neighbors_path",),
}
# what the training itself sets
SET_BY_TRAINING = ("num_rows", "num_neighbors")


def optimizer_of(head: type[Head], wanted: str) -> str:
    """What a head is trained by, "none" if by no optimizer; raises ValueError for one that it does not have."""
    own, name = head.optimizers, head.name
    if wanted == "auto":
        return own[0] if own else "none"
    if wanted not in own:
        if wanted == "lbfgs" and own == ("adamw",):
            raise ValueError(
                f"lbfgs is for the linear head, whose problem is convex; use optimizer='adamw' for {name}."
            )
        trained = f"trained by {' or '.join(own)}" if own else "not trained by an optimizer"
        raise ValueError(f"The head {name} is {trained}, got optimizer={wanted!r}. Use optimizer='auto'.")
    return wanted


class ProbeTrainer:
    """Trains a DiffusionProbe on cached features.

    The protocol: parameters are fitted on training rows; the penalty of `lbfgs` and `fista`, the epoch of `adamw` or
    the number of neighbours of knn is chosen by validation accuracy (several labels: mean average precision;
    regression: R²; ties by loss); test rows are given to `evaluate` alone, after everything is chosen.

    Under `accelerate launch` or `torchrun` all processes call it together with the same arguments, each with the probe
    on its own device. Each computes a share of every batch of adamw, the batch statistics and the dropout being those
    of the whole batch: the result is that of one process, to rounding. The other ways of fitting take all rows at once
    and are done by each process alike. The main process writes.
    """

    def __init__(
        self,
        probe: DiffusionProbe,
        features: FeatureSet | AlignedFeatures,
        args: ProbeTrainingArguments,
        *,
        validation_features: FeatureSet | AlignedFeatures | None = None,
        views: Sequence[FeatureSet | AlignedFeatures] = (),
        allow_mismatch: bool = False,
    ) -> None:
        """
        Args:
            probe: with any head.
            features: rows, or for a fusion probe `FeatureStore.aligned(…)`; labels as the problem_type asks for.
            args: how to train.
            validation_features: what choices are made on; default a part of the training images.
            views: augmented views of `features`, as `store.select(…, view=1)` gives them: each epoch of adamw trains on
                one of them for each image, drawn by (seed, epoch). Choices are made on plain images, and of images that
                are held out no view is trained on. Means and deviations of the features are those of plain images.
            allow_mismatch: take features of another extraction than the probe's.

        Raises:
            ValueError: for features without labels, with labels that do not fit the probe, of another shape, with NaN
                or infinity, or of another extraction; for options that the head does not have.
        """
        self.probe, self.args = probe, args
        self.processes = ProbeProcesses(cpu=probe.device.type == "cpu")
        self.features = features
        self.examples, self.labels = self._required(features, "The training features", allow_mismatch)
        if validation_features is None:
            self.train_rows, rows = self.examples.hold_out(args.validation_fraction, args.seed)
            held_out, labels = self.examples, self.labels
        else:
            held_out, labels = self._required(validation_features, "The validation features", allow_mismatch)
            self._warn_of_training_images(validation_features, "validation")
            self.train_rows, rows = torch.arange(len(self.examples)), torch.arange(len(held_out))
        self.validation: tuple[Features, Tensor] = (held_out.batch(rows), labels[rows])
        self.views = self._required_views(views, allow_mismatch)
        self.optimizer_name = optimizer_of(type(self.probe.head), args.optimizer)
        self._refuse_unused_options()
        if self.optimizer_name == "adamw":
            require_trainable(probe, args)
        self.class_weights = class_weights_of(args, probe, self.labels[self.train_rows])

    def _refuse_unused_options(self) -> None:
        """What asks for something that this training does not do; numbers that it does not read are warned of."""
        args, name = self.args, self.optimizer_name
        if name != "adamw":
            given = {"bf16": args.bf16, "balanced_sampling": args.balanced_sampling}
            given["views"] = self.views is not None
            given["early_stopping_patience"] = args.early_stopping_patience is not None
            unused = [option for option, is_given in given.items() if is_given]
            if unused:
                raise ValueError(f"{', '.join(unused)} belongs to optimizer='adamw', but this training is by {name!r}.")
        head, config = self.probe.head, self.probe.config
        others = {option for kind, options in ONLY_OF.items() if kind != name for option in options}
        of_heads = {option for kind in HEADS.values() for option in kind.options} - {*head.options, "num_rows"}
        unread = [option for option in sorted(others) if getattr(args, option) != getattr(type(args), option)]
        unread += [option for option in sorted(of_heads) if getattr(config, option) != getattr(type(config), option)]
        if unread:
            logger.warning(
                "Given and not read: %s. This is the head %s, trained by %s.", ", ".join(unread), head.name, name
            )
        if name == "none" and args.class_weights != "none":
            raise ValueError(f"The head {self.probe.head.name} has no loss to weight: leave class_weights out.")
        if args.balanced_sampling and self.labels.ndim > 1:
            raise ValueError("balanced_sampling draws by class, of which an example must have one.")

    def _required(
        self, given: FeatureSet | AlignedFeatures, what: str, allow_mismatch: bool
    ) -> tuple[Examples, Tensor]:
        """Examples and labels; features of another shape or extraction than the training's, broken or badly labelled
        ones are refused.
        """
        if given.provenance is not None and given.provenance.views:
            raise ValueError(
                f"{what} are of an augmented view. Give plain ones, store.select(…), and the views of the training "
                "images as views=[…]."
            )
        given.require_finite(what)
        self.probe.require_features(given, allow_mismatch=allow_mismatch)
        require_same_provenance(
            self.features.provenance, given.provenance, "This training", allow_mismatch=allow_mismatch
        )
        return self.probe.examples(given), self.probe.labels_of(given, what)

    def _warn_of_training_images(self, given: FeatureSet | AlignedFeatures, what: str) -> None:
        """By the content of the features, and by the ids of the images where they are known."""
        if given is self.features or given.fingerprint() == self.features.fingerprint():
            logger.warning("The %s features are the training features: what is measured is memory.", what)
        elif given.image_ids is not None and self.features.image_ids is not None:
            known = set(self.features.image_ids)
            common = sum(image in known for image in given.image_ids)
            if common:
                logger.warning("%d of the %d %s images are among the training images.", common, given.num_images, what)

    def _required_views(self, views: Sequence[FeatureSet | AlignedFeatures], allow_mismatch: bool) -> Views | None:
        """Views of other images, another extraction or another shape are refused."""
        plain, found = self.features, []
        for number, view in enumerate(views, 1):
            what = f"View {number} of the training features"
            if view.num_images != plain.num_images or not same_images(view, plain):
                raise ValueError(
                    f"{what} is not of the same images in the same order ({view.num_images}, training features "
                    f"{plain.num_images}). Take both from one store: store.select(…, view={number})."
                )
            view.require_finite(what)
            recorded = None if view.provenance is None else view.provenance.plain()
            require_same_provenance(plain.provenance, recorded, "This training", allow_mismatch=allow_mismatch)
            found.append(self.probe.examples(view))
            self.probe.require_shape(found[-1])
        return Views(found) if found else None

    def _run(self, progress: bool) -> Run:
        return Run(
            probe=self.probe,
            args=self.args,
            examples=self.examples,
            rows=self.train_rows,
            labels=self.labels,
            validation=self.validation,
            class_weights=self.class_weights,
            output_dir=require_writable_folder(self.args.output_dir),
            progress=progress and self.processes.is_main,
            processes=self.processes,
            views=self.views,
            name=self._run_name(),
        )

    def train(self, *, progress: bool = True) -> ProbeTrainingResult:
        """Fit, choose on validation, save the chosen probe in `output_dir`."""
        result = self.fit(progress=progress)
        self.save()
        return result

    def fit(self, *, progress: bool = True) -> ProbeTrainingResult:
        """Fit and choose on validation, without saving the finished probe."""
        run = self._run(progress)
        self.probe.head.learn_moments(Batches(self.examples, self.train_rows))
        result = FITS[self.optimizer_name](run)
        self.probe.eval()
        self.probe.provenance = self.features.provenance
        self.probe.metrics = {
            "validation": result.validation.record(),
            "training": {"rows": len(self.train_rows), "optimizer": self.optimizer_name, **result.chosen}
            | ({} if self.views is None else {"views": len(self.views)}),
        }
        return result

    def save(self) -> None:
        """Write the probe with its metrics into `output_dir`; when it returns, they are there for all processes."""
        self.processes.from_main(lambda: self.probe.save_pretrained(self.args.output_dir))

    def evaluate(self, test_features: FeatureSet | AlignedFeatures, *, allow_mismatch: bool = False) -> ProbeMetrics:
        """Metrics on rows that no choice was made on; recorded in the probe's metrics as `test`."""
        _, labels = self._required(test_features, "The test features", allow_mismatch)
        self._warn_of_training_images(test_features, "test")
        metrics = self._run(progress=False).measure(self.probe.predict(test_features), labels)
        self.probe.metrics["test"] = metrics.record()
        return metrics

    def _run_name(self) -> str:
        config = self.probe.config
        fields = [name for name in type(config).__annotations__ if name not in SET_BY_TRAINING]
        content: dict[str, Any] = {name: getattr(config, name) for name in (*fields, "num_labels", "problem_type")}
        content |= {key: value for key, value in self.args.to_dict().items() if key not in ("output_dir", "report_to")}
        if self.views is not None:
            content["views"] = [view.features.fingerprint() for view in self.views.views]
        return fingerprint_of(content | {"features": self.features.fingerprint(), "validation": self._held_out()})

    def _held_out(self) -> str:
        features, labels = self.validation
        parts = {"": features} if isinstance(features, Tensor) else features
        return fingerprint_of(
            {name: FeatureSet.from_tensor(value, labels).fingerprint() for name, value in parts.items()}
        )
