"""DiffusionProbe: a frozen diffusion model's features and a small head, as one transformers model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..features import AlignedFeatures, FeatureSet
from ..features.labels import numbers_in
from ..hub.artifact import ArtifactModel
from ..provenance import require_same_provenance
from ..zoo import embedded_path
from .configuration import SAE_KEYS, DiffusionProbeConfig
from .examples import Examples, Features, by_name, split, to_device
from .heads import HEADS, SAEHead, build_head
from .tasks import TASKS, SingleLabel, Task

if TYPE_CHECKING:
    from ..extraction.extractor import DiffusionFeatureExtractor

Given = Tensor | Mapping[Any, Tensor]


@dataclass
class DiffusionProbeOutput(ImageClassifierOutput):
    """Result of a forward pass."""

    latent_acts: Float[Tensor, "N num_latents"] | None = None
    """Of an `sae` probe: the latents of each image, of which the logits are weighted sums."""
    heat_maps: Float[Tensor, "N num_labels h w"] | None = None
    """Of `explain`: what each position adds to each logit, on the grid of the head's last map or tokens; (N,
    num_labels, T) where T tokens form no square, None for pooled features."""
    rest: Float[Tensor, "N num_labels"] | None = None
    """Of `explain`: what no position adds. `heat_maps` summed over the positions and this are the logits."""


class DiffusionProbe(ArtifactModel):
    """A classifier on features of a frozen diffusion model; with problem_type="regression" it gives numbers.

    Called with `features` it is the head alone. Called with `pixel_values` it extracts the features first, with the
    very extraction it was trained on; the diffusion model is loaded when first needed and is no part of the artifact.
    """

    config_class = DiffusionProbeConfig
    config: Any
    base_model_prefix = "probe"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):  # torch's layers draw weights, which `initialise` replaces
            self.head: Any = build_head(config)
        if config.problem_type not in (None, *self.head.problem_types):
            raise ValueError(
                f"The head {config.head} is for {', '.join(self.head.problem_types)}, got {config.problem_type!r}."
            )
        # not a submodule: it is no part of the weights, and building it on the meta device would lose its buffers
        self.__dict__["_extractor"] = None
        self.post_init()
        self.head.initialise(torch.Generator().manual_seed(config.init_seed))

    @classmethod
    def from_sae(cls, sae: Any, *, timestep: int | None = None, **config: Any) -> Self:
        """A probe on the latents of an SAE, whose encoder it copies and whose features it takes.

        Args:
            sae: a KSparseAutoencoder.
            timestep: of an SAE over several, the one of the probe's features.
            **config: fields of DiffusionProbeConfig, such as id2label and latent_pooling; latent_names are those of the
                SAE's table of latents.
        """
        encoder = {name: getattr(sae.config, name) for name in SAE_KEYS}
        if sae.latents is not None:
            config = {"latent_names": sae.latents.names(), **config}
        probe = cls(DiffusionProbeConfig(d_in=sae.config.d_in, head="sae", sae=encoder, **config))
        probe.head.take_encoder(sae, timestep)
        recorded = sae.provenance
        if recorded is not None and timestep is not None:
            recorded = recorded.select(recorded.layers[0], timestep)
        probe.provenance = recorded
        return probe

    def _init_weights(self, module: nn.Module) -> None:
        """The constructors' values stay; the head draws them again from the config's seed."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; transformers' own looks at parameters alone, and a knn probe has none."""
        return next(tensor.dtype for tensor in self._tensors() if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    @property
    def task(self) -> Task:
        """What it predicts: labels, loss and metrics of its `problem_type`."""
        return TASKS[self.config.problem_type]

    @property
    def extractor(self) -> "DiffusionFeatureExtractor":
        """The extraction this probe was trained on, loaded on first use."""
        if self.__dict__["_extractor"] is None:
            from .pipeline import extractor_of

            self.__dict__["_extractor"] = extractor_of(self)
        return self.__dict__["_extractor"]

    def _checked(self, features: Given) -> Features:
        """The features in the head's shape and floating-point type, if they are of its width and finite."""
        given = self.head.arranged(features if isinstance(features, Tensor) else by_name(features))
        for value in (given,) if isinstance(given, Tensor) else given.values():
            if not torch.isfinite(value).all():
                raise ValueError("features hold NaN or infinite values; extract them again or remove these rows.")
        dtype = self.dtype
        return given.to(dtype) if isinstance(given, Tensor) else {name: v.to(dtype) for name, v in given.items()}

    def forward(
        self,
        pixel_values: Float[Tensor, "B 3 H W"] | None = None,
        labels: Tensor | None = None,
        features: Given | None = None,
        return_dict: bool | None = None,
    ) -> DiffusionProbeOutput | tuple[Tensor, ...]:
        """Logits, and the loss of the problem type where labels are given.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; features are extracted from them.
            labels: (B,) class numbers; (B, num_labels) of 0 and 1 for several labels; numbers for regression.
            features: instead of pixel_values, in the head's shape: (B, d_in) for linear, mlp, knn and prototype, or
                (B, T, d_in), whose logits are the mean over the T positions; (B, C, h, w) or (B, T, C) for diff-c and
                attention, all of these for sae; for fusion a mapping of them by `layer@timestep` or (layer, timestep).
            return_dict: a tuple instead, if False.
        """
        if (pixel_values is None) == (features is None):
            raise ValueError("Give either pixel_values or features, one of the two.")
        if features is None:
            features = self.features_of(pixel_values)
        positions = None
        if isinstance(features, Tensor) and features.ndim == 3 and not self.head.whole_images:
            positions, features = features.shape[1], features.flatten(0, 1)
        given, latent_acts = self._checked(features), None
        if isinstance(self.head, SAEHead):
            latent_acts = self.head.design(given)  # type: ignore[arg-type]
            logits = self.head.classifier(latent_acts)
        else:
            logits = self.head(given)
        if positions is not None:
            logits = logits.unflatten(0, (-1, positions)).mean(1)
        loss = None if labels is None else self.task.loss(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return DiffusionProbeOutput(loss=loss, logits=logits, latent_acts=latent_acts)  # type: ignore[arg-type]

    def features_of(self, pixel_values: Any, extractor: "DiffusionFeatureExtractor | None" = None) -> Given:
        """Features of images as `forward` takes them, by the probe's own extraction if no other is given."""
        got = (extractor or self.extractor)(pixel_values)
        if self.config.head == "fusion":
            return to_device(by_name(got), self.device)
        return next(iter(got.values())).to(self.device)

    @torch.no_grad()
    def explain(self, features: Given) -> DiffusionProbeOutput:
        """Logits, and where in the images they come from: `heat_maps` and `rest`. Of the heads attention, diff-c, sae.

        Args:
            features: as `forward` takes them.

        Raises:
            ValueError: for another head.
        """
        if not self.head.explains:
            able = ", ".join(name for name, head in HEADS.items() if head.explains)
            raise ValueError(f"explain is for the heads {able}; this probe's is {self.head.name}.")
        training = self.training
        self.eval()
        try:
            output = self(features=features)
            maps, output.rest = self.head.evidence(self._checked(features))
        finally:
            self.train(training)
        pooled = maps.ndim == 3 and maps.shape[2] == 1
        output.heat_maps = None if pooled else _on_a_grid(maps)
        return output

    def contributions(self, features: Given) -> Float[Tensor, "N num_labels num_latents"]:
        """Of an `sae` probe: what each latent adds to each class. Their sum is the logits without the bias.

        Raises:
            ValueError: for another head.
        """
        name = self.config.head
        if name != SAEHead.name:
            raise ValueError(f"Contributions of latents are those of an sae probe; this one's head is {name}.")
        return self.head.contributions(self.head.design(self._checked(features)))  # type: ignore[arg-type]

    def examples(self, features: FeatureSet | AlignedFeatures) -> Examples:
        """The features example by example, as this head takes them."""
        return Examples(features, whole_images=self.head.whole_images)

    def labels_of(self, features: FeatureSet | AlignedFeatures, what: str = "The features") -> Tensor:
        """Of each example, as the task takes them; classes are those of the same names, however they are numbered.

        Raises:
            ValueError: for features without labels, or with labels that the probe does not have.
        """
        labels, names = self.examples(features).labels, features.class_names
        own = list(self.config.id2label.values())
        named = own != [f"LABEL_{number}" for number in range(len(own))]
        if named and names is not None and isinstance(self.task, SingleLabel):
            present = labels.unique().tolist()
            if all(label in range(len(names)) for label in present):  # others are refused below
                labels = torch.tensor(numbers_in(own, names, present, what, "the probe's"))[labels]
        return self.task.checked(labels, self.config.num_labels, what)

    def require_features(self, features: FeatureSet | AlignedFeatures, *, allow_mismatch: bool = False) -> None:
        """Refuse features of another extraction or shape."""
        require_same_provenance(self.provenance, features.provenance, "This probe", allow_mismatch=allow_mismatch)
        self.require_shape(self.examples(features))

    def require_shape(self, examples: Examples) -> None:
        """Refuse what the head does not take, by the first example."""
        self._checked(examples.batch(torch.tensor([0])))

    @torch.no_grad()
    def predict(
        self, features: FeatureSet | AlignedFeatures | Given, batch_size: int = 256
    ) -> Float[Tensor, "N num_labels"]:
        """Logits of all examples, in batches, without dropout."""
        if isinstance(features, FeatureSet | AlignedFeatures):
            batches = self.examples(features).batches(size=batch_size)
        else:
            batches = split(features if isinstance(features, Tensor) else by_name(features), batch_size)
        training = self.training
        self.eval()
        try:
            return torch.cat([self(features=to_device(batch, self.device)).logits.cpu() for batch in batches])
        finally:
            self.train(training)

    def _write_artifact(self, folder: Any, repo_id: str, subfolder: str = "", **kwargs: Any) -> None:
        from .image_processing import DiffusionImageProcessor

        super()._write_artifact(folder, repo_id, subfolder, **kwargs)
        made_for = self.provenance
        # without an extraction too: else the pipeline misses this file and says so, instead of what is really missing
        processor = (
            DiffusionImageProcessor()
            if made_for is None or made_for.image_size is None
            else DiffusionImageProcessor(made_for.image_size, made_for.crop, made_for.resample)
        )
        processor.save_pretrained(folder)

    def card_text(self, repo_id: str, subfolder: str = "") -> dict[str, Any]:
        """What the model card says of this probe."""
        config = self.config
        usage = (
            "import diffusion_sae  # registers the pipeline\nfrom transformers import pipeline\n\n"
            f'pipeline("diffusion-probe", model="{repo_id}")("image.png")'
        )
        if embedded_path(repo_id) is not None:  # which transformers would look for on the Hub
            usage = (
                "from diffusion_sae.zoo import embedded_path\nfrom transformers import pipeline\n\n"
                f'probe = str(embedded_path("{repo_id}"))\npipeline("diffusion-probe", model=probe)("image.png")'
            )
        if subfolder:
            address = f'"{repo_id}", subfolder="{subfolder}"'
            usage = (
                "from diffusion_sae import DiffusionProbe\nfrom transformers import AutoImageProcessor, pipeline\n\n"
                f"probe = DiffusionProbe.from_pretrained({address})\n"
                f"processor = AutoImageProcessor.from_pretrained({address})\n"
                'pipeline("diffusion-probe", model=probe, image_processor=processor)("image.png")'
            )
        kinds = {"multi_label_classification": "labels", "regression": "outputs"}.get(config.problem_type, "classes")
        return {
            "summary": f"A {config.head} probe on the activations{self.origin()}: {config.num_labels} {kinds} "
            f"({', '.join(list(config.id2label.values())[:10])}{', …' if config.num_labels > 10 else ''}).",
            "usage": usage,
            "pipeline_tag": "image-classification",
            "tags": ["diffusion-probe"],
            "configuration": [(name, getattr(config, name)) for name in ("d_in", "head", *self.head.options)],
        }


def _on_a_grid(maps: Float[Tensor, "N K *positions"]) -> Tensor:
    """(N, K, T) of a square grid, row-major, as (N, K, √T, √T)."""
    side = round(maps.shape[2] ** 0.5)
    return maps.unflatten(2, (side, side)) if maps.ndim == 3 and side * side == maps.shape[2] else maps
