"""Where extraction and head meet: `pipeline("diffusion-probe")`."""

import dataclasses
from base64 import b64decode
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.pipelines import ImageClassificationPipeline
from transformers.pipelines.image_classification import ClassificationFunction

from .._config import check_choice, check_integer
from ..extraction.extractor import DiffusionFeatureExtractor
from ..extraction.images import ImageError, load_image, to_pixel_values
from ..extraction.loading import default_device
from ..provenance import Provenance, ProvenanceMismatchError, require_same_provenance

if TYPE_CHECKING:
    from .modeling import DiffusionProbe

ONE_IMAGE = (str, Path, bytes, dict, np.ndarray, Image.Image, Tensor)
OVERRIDES = ("timestep", "seed", "allow_mismatch")
FUNCTION_OF_PROBLEM = {
    "regression": ClassificationFunction.NONE,
    "multi_label_classification": ClassificationFunction.SIGMOID,
}
ADVICE = "Leave the timestep and seed out, or pass allow_mismatch=True if you know that the features are comparable."


def extractor_of(probe: "DiffusionProbe") -> DiffusionFeatureExtractor:
    """The extractor that a probe's provenance describes, on the probe's device.

    Raises:
        ValueError: if the probe has no provenance.
        ProvenanceMismatchError: if the base model now has other weights.
    """
    recorded = probe.provenance
    if recorded is None:
        raise ValueError(
            "This probe does not say which extraction it was trained on (it has no extractor_config.json), so that it "
            "cannot take images. Call it with features=…, or train it on a FeatureStore."
        )
    settings = recorded.settings.to_dict()
    device = probe.device if probe.device.type != "meta" else default_device()
    extractor = DiffusionFeatureExtractor.from_pretrained(
        settings.pop("model"), revision=settings.pop("revision"), device=device, **probe.hub_arguments, **settings
    )
    if extractor.provenance.weights != recorded.weights:
        raise ProvenanceMismatchError(
            f"The probe was trained with weights {recorded.weights} of {recorded.model!r}, which now has "
            f"{extractor.provenance.weights}. Load the revision it was trained with."
        )
    return extractor


def preprocess_images(images: Any, size: int, **how: str) -> Tensor:
    """(B, 3, size, size) in [-1, 1]."""
    return to_pixel_values(images, size, **how)


def downloaded(address: str, timeout: float | None) -> bytes:
    """What a URL gives, within so many seconds. Raises ImageError, naming it, if that is nothing."""
    try:
        return httpx.get(address, timeout=timeout, follow_redirects=True).raise_for_status().content
    except httpx.HTTPError as error:
        raise ImageError(f"There is no image at {address!r}: {error}. Check the address and the connection.") from error


def _decoded(address: str) -> bytes:
    """The content of a data: URL. Raises ImageError for one that is not in base64."""
    head, _, content = address.partition(",")
    try:
        return b64decode(content, validate=True)
    except ValueError as error:
        raise ImageError(f"{head!r} is followed by no base64: {error}. Give data:image/png;base64,…") from error


def changed_extractor(probe: "DiffusionProbe", changed: Provenance) -> DiffusionFeatureExtractor:
    """The probe's extractor with another timestep or seed; the model is the same one, not loaded again."""
    if changed.random_weights and changed.seed != probe.extractor.config.seed:
        raise ValueError("The seed of this probe's extraction also draws the model's random weights: leave seed out.")
    return probe.extractor.changed(changed)


class DiffusionProbePipeline(ImageClassificationPipeline):
    """Image → labels with scores, like `image-classification`; broken images are named.

    For regression the scores are the numbers themselves. Arguments beside `top_k` and `function_to_apply`:

        explain: of the heads attention, diff-c and sae: each label also says where its score comes from. `logit`;
            `heat_map` (h, w), what each position of the image adds to it (not for pooled features), and `rest`, what
            none adds: heat_map.sum() + rest = logit. Of sae also `contributions`: the latents that add most to the
            logit or take most from it, the largest first; all of them and `rest` are the logit too.
        top_latents: how many `contributions`; default 5.
        timestep, seed: another extraction than the one that the probe was trained on: refused, naming both.
        allow_mismatch: take it nevertheless.
    """

    model: Any  # a DiffusionProbe

    def _sanitize_parameters(  # type: ignore[override]
        self, *, explain: bool | None = None, top_latents: int | None = None, **given: Any
    ) -> Any:
        overrides = {name: given.pop(name) for name in OVERRIDES if given.get(name) is not None}
        if given.get("top_k") is not None:
            check_integer("top_k", given["top_k"], 1)
        preprocessing, forward, postprocessing = super()._sanitize_parameters(**given)
        if explain is not None:
            check_choice("explain", explain, (True, False))
            forward["explain"] = explain
        if top_latents is not None:
            check_integer("top_latents", top_latents, 1)
            postprocessing["top_latents"] = top_latents
        return preprocessing, forward | overrides, postprocessing

    def __call__(self, inputs: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Answers of an image, a list of them for several.

        Args:
            inputs: a PIL image, path, URL (also data:), array, `datasets` entry ({"bytes", "path"}) or tensor
                (3, H, W) of the extraction's size in [-1, 1]; a list, tuple or `datasets` column of these, or a tensor
                (B, 3, H, W); a generator, another iterable such as a streamed column, or a torch `Dataset`, of which
                the answers are an iterator.
            options: the arguments of the class; batch_size, num_workers, top_k, function_to_apply, timeout.
        """
        answer: Any = super().__call__
        if isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = list(inputs)
        if isinstance(inputs, ONE_IMAGE) or not isinstance(inputs, Iterable):
            return answer(inputs, **options)
        if isinstance(inputs, Sequence) and not len(inputs):
            return []
        if isinstance(inputs, Sequence) and not isinstance(inputs, list):
            return list(answer(_Items(inputs), **options))
        if isinstance(inputs, list | Dataset | GeneratorType):
            return answer(inputs, **options)
        return answer((one for one in inputs), **options)  # a streamed column, or any other iterable

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            # not super().preprocess: it names no broken image, and in a half-precision pipeline it would round the
            # pixels, by which the noise is drawn
            image = load_image(downloaded(image, timeout), image)
        elif isinstance(image, str) and image.startswith("data:image/"):
            image = load_image(_decoded(image), f"{image[:30]}…")
        elif not isinstance(image, ONE_IMAGE):
            load_image(image)  # raises, and says what is allowed
        return self.image_processor(image)  # type: ignore[misc]

    def _forward(self, model_inputs: Any, *, explain: bool = False, **overrides: Any) -> Any:  # type: ignore[override]
        extractor = self._extractor(**overrides)
        if extractor is None and not explain:
            return self.model(**model_inputs)
        features = self.model.features_of(model_inputs["pixel_values"], extractor)
        return self.model.explain(features) if explain else self.model(features=features)

    def _extractor(
        self, timestep: int | None = None, seed: int | None = None, allow_mismatch: bool = False
    ) -> DiffusionFeatureExtractor | None:
        """That of another timestep or seed; None: the probe's own."""
        recorded: Provenance | None = self.model.provenance
        if recorded is None or (timestep is None and seed is None):
            return None
        if timestep is not None and (len(recorded.timesteps) > 1 or self.model.config.head == "fusion"):
            raise ValueError(
                f"timestep={timestep} is not for this probe, whose inputs are named by their timesteps, "
                f"{list(recorded.timesteps)}: leave it out."
            )
        timesteps = recorded.timesteps if timestep is None else (timestep,)
        changed = dataclasses.replace(recorded, timesteps=timesteps, seed=recorded.seed if seed is None else seed)
        if changed.fingerprint == recorded.fingerprint:
            return None
        require_same_provenance(recorded, changed, "This probe", allow_mismatch=allow_mismatch, advice=ADVICE)
        return changed_extractor(self.model, changed)

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Any,
        *,
        function_to_apply: ClassificationFunction | None = None,
        top_k: int = 5,
        top_latents: int = 5,
    ) -> Any:
        answers = self._scored(model_outputs["logits"][0], function_to_apply)[:top_k]
        if model_outputs.get("rest") is None:
            return answers
        latent_acts, heat_maps = (model_outputs.get(name) for name in ("latent_acts", "heat_maps"))
        for answer in answers:
            number = self.model.config.label2id[answer["label"]]
            for name, values in (("logit", model_outputs["logits"]), ("rest", model_outputs["rest"])):
                answer[name] = values[0, number].item()
            if heat_maps is not None:
                answer["heat_map"] = heat_maps[0, number].float()
            if latent_acts is not None:
                answer["contributions"] = self._largest(latent_acts[0], number, top_latents)
        return answers

    def _scored(self, logits: Tensor, function: ClassificationFunction | None) -> list[dict[str, Any]]:
        """Labels and scores, the highest first, as super().postprocess gives them.

        That one asks the config anew for every label, which shows where the model is small
        (`benchmarks/probe_pipeline.py`).
        """
        config = self.model.config
        labels = config.id2label
        if function is None:
            function = FUNCTION_OF_PROBLEM.get(config.problem_type, ClassificationFunction.SOFTMAX)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        if function == ClassificationFunction.SOFTMAX:
            logits = logits.softmax(0)
        elif function == ClassificationFunction.SIGMOID:
            logits = logits.sigmoid()
        answers = [{"label": labels[number], "score": score} for number, score in enumerate(logits.tolist())]
        return sorted(answers, key=itemgetter("score"), reverse=True)

    def _largest(self, latent_acts: Tensor, number: int, count: int) -> list[dict[str, Any]]:
        """The latents that add something to the logit of a class, by the size of it."""
        names = self.model.config.latent_names or {}
        of_class = latent_acts * self.model.head.classifier.weight[number].detach().to(latent_acts)
        latents = of_class.abs().topk(min(count, len(of_class))).indices.tolist()
        return [
            {
                "latent": latent,
                "name": names.get(str(latent), f"latent {latent}"),
                "activation": latent_acts[latent].item(),
                "contribution": of_class[latent].item(),
            }
            for latent in latents
            if of_class[latent] != 0
        ]


class _Items(Dataset):
    """A sequence, read item by item: of a `datasets` column one image at a time is decoded."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]
