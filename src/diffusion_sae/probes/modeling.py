"""DiffusionProbe: a frozen diffusion model's features and a small head, as one transformers model."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..features import FeatureSet
from ..hub.artifact import ArtifactModel
from ..provenance import require_same_provenance
from .configuration import DiffusionProbeConfig
from .heads import DiffCHead, LinearHead, as_feature_map

if TYPE_CHECKING:
    from ..extraction.extractor import DiffusionFeatureExtractor


class DiffusionProbe(ArtifactModel):
    """A classifier on features of a frozen diffusion model.

    Called with `features` it is the head alone. Called with `pixel_values` it extracts the features first, with the
    very extraction it was trained on; the diffusion model is loaded when first needed and is no part of the artifact.
    """

    config_class = DiffusionProbeConfig
    config: Any
    base_model_prefix = "probe"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):  # torch's layers draw weights, which `_init_head` replaces
            if config.head == "linear":
                self.head: Any = LinearHead(config.d_in, config.num_labels)
            else:
                self.head = DiffCHead(config.d_in, config.num_labels, config.width, config.dropout)
        # not a submodule: it is no part of the weights, and building it on the meta device would lose its buffers
        self.__dict__["_extractor"] = None
        self.post_init()
        self._init_head()

    def _init_weights(self, module: nn.Module) -> None:
        """The constructors' values stay; `_init_head` draws them again from the config's seed."""

    @torch.no_grad()
    def _init_head(self) -> None:
        """He-uniform weights and zero biases from `init_seed`; nothing on the meta device, where loading fills them."""
        generator = torch.Generator().manual_seed(self.config.init_seed)
        for module in self.head.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
                bound = (6 / module.weight[0].numel()) ** 0.5
                module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound)
                if module.bias is not None:
                    module.bias.zero_()
        if self.config.head == "linear" and not self.head.classifier.weight.is_meta:
            self.head.classifier.weight.zero_()  # convex: start at the uniform prediction

    @property
    def extractor(self) -> "DiffusionFeatureExtractor":
        """The extraction this probe was trained on, loaded on first use."""
        if self.__dict__["_extractor"] is None:
            from .pipeline import extractor_of

            self.__dict__["_extractor"] = extractor_of(self)
        return self.__dict__["_extractor"]

    def _checked(self, features: Tensor) -> Tensor:
        """The features in the head's shape and floating-point type, if they are of its width and finite."""
        config = self.config
        if config.head == "diff-c" and features.ndim in (3, 4):
            features = as_feature_map(features)
        if features.ndim != (2 if config.head == "linear" else 4) or features.shape[1] != config.d_in:
            expected = f"(N, {config.d_in})" if config.head == "linear" else f"(N, {config.d_in}, h, w)"
            raise ValueError(
                f"A {config.head} probe takes features of the shape {expected}, got {tuple(features.shape)}. "
                f"Extract with pooling={'mean' if config.head == 'linear' else 'none'!r}."
            )
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinite values; extract them again or remove these rows.")
        return features.to(self.dtype)

    def forward(
        self,
        pixel_values: Float[Tensor, "B 3 H W"] | None = None,
        labels: Int[Tensor, " B"] | None = None,
        features: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the cross-entropy where labels are given.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; features are extracted from them.
            labels: (B,) class numbers.
            features: (B, d_in) for `linear`, (B, C, h, w) or (B, T, C) for `diff-c`, instead of pixel_values.
            return_dict: a tuple instead, if False.
        """
        if (pixel_values is None) == (features is None):
            raise ValueError("Give either pixel_values or features, one of the two.")
        if features is None:
            features = next(iter(self.extractor(pixel_values).values())).to(self.device)
        logits = self.head(self._checked(features))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def require_features(self, features: FeatureSet, *, allow_mismatch: bool = False) -> None:
        """Refuse features of another extraction or shape."""
        require_same_provenance(self.provenance, features.provenance, "This probe", allow_mismatch=allow_mismatch)
        self._checked(features[:1])

    @torch.no_grad()
    def predict(self, features: FeatureSet | Tensor, batch_size: int = 256) -> Float[Tensor, "N num_labels"]:
        """Logits of all rows, in batches, without dropout."""
        batches = features.batches(batch_size) if isinstance(features, FeatureSet) else features.split(batch_size)
        training = self.training
        self.eval()
        try:
            return torch.cat([self(features=batch.to(self.device)).logits.cpu() for batch in batches])
        finally:
            self.train(training)

    def _write_artifact(self, folder: Any, repo_id: str, **kwargs: Any) -> None:
        from .image_processing import DiffusionImageProcessor

        super()._write_artifact(folder, repo_id, **kwargs)
        made_for = self.provenance
        # without an extraction too: else the pipeline misses this file and says so, instead of what is really missing
        processor = (
            DiffusionImageProcessor()
            if made_for is None or made_for.image_size is None
            else DiffusionImageProcessor(made_for.image_size, made_for.crop, made_for.resample)
        )
        processor.save_pretrained(folder)

    def card_text(self, repo_id: str) -> dict[str, Any]:
        """What the model card says of this probe."""
        config = self.config
        return {
            "summary": f"A {config.head} probe on the activations{self.origin()}: {config.num_labels} classes "
            f"({', '.join(list(config.id2label.values())[:10])}{', …' if config.num_labels > 10 else ''}).",
            "usage": "import diffusion_sae  # registers the pipeline\n"
            "from transformers import pipeline\n\n"
            f'pipeline("diffusion-probe", model="{repo_id}")("image.png")',
            "pipeline_tag": "image-classification",
            "tags": ["diffusion-probe"],
            "configuration": [
                (k, getattr(config, k))
                for k in ("d_in", "head", *(("width", "dropout") if config.head == "diff-c" else ()))
            ],
        }
