"""DiffusionFeatureExtractor: from images to the features of any layer at any timestep."""

import copy
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .._config import refuse_unknown
from .._files import require_writable_folder
from ..features import FeatureStore
from ..hub.push import push_folder
from ..provenance import ExtractorConfig, Provenance, ProvenanceMismatchError
from .backbone import DiffusionBackbone
from .encoders import EncoderBackbone
from .images import image_id, to_pixel_values
from .layers import LayerInfo
from .loading import Placement, find_artifact, load_model
from .pooling import ExtractedFeatures, pool
from .prompts import PromptSource
from .run import RunOptions, extract_into_store
from .stream import OnTheFlyFeatures

VERSIONED = ("diffusion-sae", "torch", "diffusers", "transformers", "pillow")


class DiffusionFeatureExtractor:
    """Activations of a diffusion model on real images.

    An image is encoded to latents z (mode of the VAE's posterior), noised to the level that the model was trained with
    at t (`NoiseSchedule`; for Stable Diffusion z_t = √ᾱ_t z + √(1−ᾱ_t) ε) with an ε that depends on (seed, image id, t)
    alone, and given to the denoiser, whose forward stops after the last wanted layer (Revelio, §3.1). The same image
    gives the same features in any batch, order and process, to 1e-5 in fp32.
    """

    def __init__(self, pipeline: Any, config: ExtractorConfig) -> None:
        """Wrap a diffusers pipeline (or an EncoderBackbone) that is loaded already; `from_pretrained` loads one.

        Raises:
            ValueError: if the pipeline is of a family that is not supported, or has no such layer.
        """
        self.backbone = (
            pipeline
            if isinstance(pipeline, EncoderBackbone)
            else DiffusionBackbone(pipeline, image_size=config.image_size, guidance=config.guidance)
        )
        self._module_paths = self.backbone.resolve(config.layers)
        self.config = dataclasses.replace(config, image_size=self.backbone.image_size)
        self.prompts = PromptSource(self.config, self.backbone.device)
        if config.prompt_from == "config":
            self.backbone.conditioning(config.prompt)  # finds out before the first image what the model refuses

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny-sd",
        *,
        device: str | torch.device | None = None,
        device_map: str | None = None,
        offload: str | None = None,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        attention_backend: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        revision: str | None = None,
        allow_mismatch: bool = False,
        **settings: Any,
    ) -> Self:
        """Load a diffusers pipeline, or the very extractor that an SAE or probe was trained on.

        Args:
            model: Hub id or folder of a diffusers pipeline, an embedded name (`tiny-sd`), or an artifact: an SAE, probe
                or saved extractor, whose recorded settings are then used. Also a transformers vision model (DINOv2,
                CLIP, ViT, …), as a baseline, with timesteps=(0,).
            device: where to run; default CUDA, else MPS, else CPU.
            device_map, offload, vae_tiling, vae_slicing, attention_backend: diffusers' own means for models that are
                large or slow; see `Placement`.
            token, cache_dir, local_files_only, subfolder, revision: as in transformers.
            allow_mismatch: load an artifact's extractor even if its base model's weights have changed since.
            **settings: fields of ExtractorConfig (layers, timesteps, pooling, prompt, seed, image_size, dtype, …).

        Raises:
            ValueError: for unknown or invalid settings, and for settings that contradict an artifact's.
            ProvenanceMismatchError: if an artifact's base model now has other weights.
        """
        model = str(model)
        refuse_unknown(settings, [f.name for f in dataclasses.fields(ExtractorConfig)], "ExtractorConfig")
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        recorded = find_artifact(model, subfolder=subfolder, revision=revision, **hub)
        if recorded is None and subfolder:
            raise ValueError(
                f"{model!r} has no artifact in {subfolder!r}; a pipeline itself is loaded without subfolder."
            )
        if recorded is None:
            source = str(Path(model).resolve()) if Path(model).is_dir() else model
            config = ExtractorConfig.from_dict(settings | {"model": source, "revision": revision})
        else:
            config = recorded.settings
            given = ExtractorConfig.from_dict(config.to_dict() | settings)
            differing = [key for key in settings if getattr(given, key) != getattr(config, key)]
            if differing:
                raise ValueError(
                    f"{model!r} is an artifact and fixes its extraction; it contradicts the given "
                    f"{', '.join(f'{key}={getattr(given, key)!r}' for key in differing)}. Leave these out, or load "
                    f"{config.model!r} itself with them."
                )
        placement = Placement(
            device=device,
            device_map=device_map,
            offload=offload,
            vae_tiling=vae_tiling,
            vae_slicing=vae_slicing,
            attention_backend=attention_backend,
        )
        extractor = cls(load_model(config, placement, **hub), config)
        if recorded is not None and extractor.provenance.weights != recorded.weights and not allow_mismatch:
            raise ProvenanceMismatchError(
                f"{model!r} was made with weights {recorded.weights} of {config.model!r}, which now has "
                f"{extractor.provenance.weights}. Load the revision it was made with, or pass allow_mismatch=True."
            )
        return extractor

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def to(self, device: str | torch.device) -> Self:
        self.backbone.to(device)
        self.prompts = PromptSource(self.config, self.backbone.device)
        return self

    def available_layers(self) -> list[LayerInfo]:
        """Canonical layers in forward order, with width and stride at this image size."""
        return self.backbone.available_layers()

    def layer_infos(self) -> list[LayerInfo]:
        """The layers that this extractor takes, with width and stride."""
        return self.backbone.describe_layers(self._module_paths)

    @cached_property
    def provenance(self) -> Provenance:
        """Record of this extraction; hashes the model's weights on first use."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONED}
        return Provenance(**self.config.to_dict(), weights=self.backbone.weights_hash(), versions=versions)

    def preprocess(self, images: Any) -> Tensor:
        """Images to pixel_values (B, 3, H, W) in [-1, 1]: cropped and resized as the config says."""
        return to_pixel_values(images, self.backbone.image_size, **self.preprocessing)

    @property
    def preprocessing(self) -> dict[str, str]:
        """How images are made square."""
        return {"crop": self.config.crop, "resample": self.config.resample}

    def __call__(
        self, images: Any, image_ids: Sequence[str] | None = None, prompts: Sequence[str] | None = None
    ) -> ExtractedFeatures:
        """Features of one image or a batch.

        Args:
            images: a PIL image, path, array, tensor (B, 3, H, W) in [-1, 1], a `datasets` image column, or a list.
            image_ids: what the noise is drawn by; default the content of the preprocessed image.
            prompts: a text an image, for prompt_from="image", or a class name an image, for prompt_from="class".
        """
        pixel_values = self.preprocess(images)
        if image_ids is None:
            image_ids = [image_id(image) for image in pixel_values]
        if len(image_ids) != len(pixel_values):
            raise ValueError(f"Got {len(pixel_values)} images and {len(image_ids)} image_ids; give one an image.")
        return self.features_of(pixel_values, list(image_ids), prompts)

    def features_of(
        self, pixel_values: Tensor, image_ids: list[str], prompts: Sequence[str] | None = None
    ) -> ExtractedFeatures:
        """Features of images that are preprocessed already: (B, 3, image_size, image_size) in [-1, 1]."""
        chosen = self.prompts(pixel_values, prompts)
        latents = self.backbone.encode(pixel_values)
        features: dict[tuple[str, int], Tensor] = {}
        for t in self.config.timesteps:
            activations = self._mean_activations(latents, image_ids, t, chosen)
            for layer in self.config.layers:
                # popped, so that an activation is freed as soon as it is pooled
                features[layer, t] = pool(activations.pop(layer), self.config.pooling)
        in_order = {(layer, t): features[layer, t] for layer in self.config.layers for t in self.config.timesteps}
        return ExtractedFeatures(in_order, image_ids)

    def _mean_activations(
        self, latents: Tensor, image_ids: list[str], timestep: int, prompts: str | list[str]
    ) -> dict[str, Tensor]:
        """Activations of one timestep, averaged over the draws of the noise."""
        config = self.config
        total: dict[str, Tensor] = {}
        for member in range(config.ensemble):
            noisy = latents
            if config.noise == "seeded":
                noisy = self.backbone.add_noise(latents, image_ids, seed=config.seed, timestep=timestep, member=member)
            drawn = self._activations(noisy, timestep, prompts)
            total = drawn if not total else {layer: total[layer] + drawn[layer] for layer in drawn}
        return total if config.ensemble == 1 else {layer: value / config.ensemble for layer, value in total.items()}

    def _activations(self, noisy: Tensor, timestep: int, prompts: str | list[str]) -> dict[str, Tensor]:
        conditional = self.backbone.activations(noisy, timestep, self._module_paths, prompts)
        if not self.config.classifier_free_pair:
            return conditional
        empty = self.backbone.activations(noisy, timestep, self._module_paths, "")
        # along the channels: (B, C, h, w) or (B, T, C)
        return {k: torch.cat([empty[k], v], dim=1 if v.ndim == 4 else 2) for k, v in conditional.items()}

    def extract(
        self,
        dataset: Any,
        output_dir: str | Path,
        *,
        split: str = "train",
        batch_size: int = 32,
        shard_size: int = 1024,
        limit: int | None = None,
        skip_broken: bool = False,
        append: bool = False,
        store_dtype: str | None = None,
        prompts: Sequence[str] | None = None,
        progress: bool = True,
    ) -> FeatureStore:
        """Features of a whole data set, on disk; a run that was killed goes on where it stopped.

        Under `accelerate launch` or `torchrun` all processes call it together: each makes a share of the shards, and
        all return when the store is complete. The files are those of one process.

        Args:
            dataset: what `open_images` takes: a folder, Parquet, a `datasets` name or Dataset, a list of images.
            output_dir: folder of the store.
            split: split of a named data set.
            batch_size: images a forward pass.
            shard_size: images a shard, the unit of resuming.
            limit: only the first so many images.
            skip_broken: leave out images that cannot be read and list them in the store, instead of stopping.
            append: put the images behind those of other data sets in a complete store of the same extraction; the
                same call again goes on with them, or finds them done.
            store_dtype: float32, bfloat16 or float16 for the stored numbers; None: that of the computation.
            prompts: a text an image, for prompt_from="image"; default the data set's column prompt, text or caption.
            progress: show a bar with rate and time left.

        Raises:
            ImageError: for a broken image, naming it, unless `skip_broken`.
            ProvenanceMismatchError: if the folder holds a store of another extraction.
            ValueError: if it holds other data, another dtype or a damaged shard, or a value is too large for
                `store_dtype`.
            FileNotFoundError: if there is no store to append to.
        """
        options = RunOptions(
            split=split,
            batch_size=batch_size,
            shard_size=shard_size,
            limit=limit,
            skip_broken=skip_broken,
            append=append,
            store_dtype=store_dtype,
            prompts=prompts,
            progress=progress,
        )
        return extract_into_store(self, dataset, output_dir, options)

    def only(self, layer: str, timestep: int | Sequence[int]) -> Self:
        """The same model for one of the layers and one or some of the timesteps; the rest is not computed.

        Raises:
            ValueError: for a layer or timestep that this extractor does not take.
        """
        narrowed = self.changed(self.provenance.select(layer, timestep))
        narrowed._module_paths = {layer: self._module_paths[layer]}
        return narrowed

    def with_views(self, views: int, **settings: Any) -> Self:
        """The same model and extraction, with so many augmented views of each image beside the plain one.

        Args:
            views: of a store's images; 0: none.
            settings: `view_area` and `view_flip`, as in ExtractorConfig.
        """
        return self.changed(dataclasses.replace(self.provenance.plain(), views=views, **settings))

    def changed(self, provenance: Provenance) -> Self:
        """The same loaded model for the extraction of another record, which must be of its model and weights."""
        changed = copy.copy(self)
        changed.provenance = provenance
        changed.config = provenance.settings
        return changed

    def stream(
        self, dataset: Any, layer: str, timestep: int | Sequence[int], *, batch_size: int, **options: Any
    ) -> OnTheFlyFeatures:
        """Shuffled batches of features to train on, extracted when they are needed and kept nowhere.

        Args:
            dataset, layer, timestep, batch_size, options: see `OnTheFlyFeatures`.
        """
        return OnTheFlyFeatures(self, dataset, layer, timestep, batch_size, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `extractor_config.json`: the settings and what identifies the weights, not the weights themselves."""
        self.provenance.save(require_writable_folder(folder))

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Save to the Hub in one commit; `private`, `token`, `revision`, `commit_message` as in transformers."""
        return push_folder(repo_id, self._write_artifact, **hub)

    def _write_artifact(self, folder: Path, repo_id: str) -> None:
        from ..hub.card import write_extractor_card

        self.save_pretrained(folder)
        write_extractor_card(folder, self.provenance, self.layer_infos(), repo_id)
