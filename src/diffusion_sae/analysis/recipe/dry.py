"""A recipe made small enough to be tried out: the true architecture with random weights, few images, few steps."""

import dataclasses
from typing import Any

from ...zoo import IMAGES
from .config import LatentSettings, Recipe

IMAGES_A_SPLIT, STEPS, ROWS_A_STEP = 4, 2, 512
NOTE = "A dry run with random weights and a few images: these numbers say nothing."


def dry(recipe: Recipe) -> Recipe:
    """The same recipe on a few embedded images, in fp32, with a training of two steps."""
    extraction = dataclasses.replace(recipe.extraction, dtype="float32", revision=None)
    data = dataclasses.replace(
        recipe.data,
        dataset=IMAGES,
        train="train",
        validation=None if recipe.data.validation is None else "validation",
        test=None if recipe.data.test is None else "test",
        labels=None,
        limit=IMAGES_A_SPLIT,
        batch_size=min(recipe.data.batch_size, IMAGES_A_SPLIT),
    )
    return dataclasses.replace(
        recipe,
        extraction=extraction,
        data=data,
        training={**recipe.training, **_training(recipe)},
        latents=LatentSettings(images_per_latent=2),
    )


def _training(recipe: Recipe) -> dict[str, Any]:
    if recipe.kind == "probe":
        return {"num_train_epochs": 1, "validation_fraction": 0.25}
    batch_size = recipe.training_arguments("runs").batch_size
    return {"max_steps": STEPS, "batch_size": min(batch_size, ROWS_A_STEP), "eval_fraction": 0.25}


def random_extractor(recipe: Recipe, device: str) -> Any:
    """The extractor of a dry run: of a published model the architecture with random weights, else the model itself."""
    from ...extraction.extractor import DiffusionFeatureExtractor
    from ...extraction.published import PUBLISHED, build_published

    config = recipe.extraction
    if config.model not in PUBLISHED:
        settings = {k: v for k, v in config.to_dict().items() if k not in ("model", "revision")}
        return DiffusionFeatureExtractor.from_pretrained(config.model, device=device, **settings)
    named = dataclasses.replace(config, model=f"{config.model} with random weights")  # no name that a card would link
    return DiffusionFeatureExtractor(build_published(config.model).to(device), named)
