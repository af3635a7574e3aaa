"""The card of a recipe that nobody has run yet."""

import torch

from ...hub.card import artifact_card
from ...probes.configuration import DiffusionProbeConfig
from ...probes.modeling import DiffusionProbe
from ...provenance import Provenance
from ...sae.configuration import KSparseAutoencoderConfig
from ...sae.modeling import KSparseAutoencoder
from .config import Recipe


def untrained_card(recipe: Recipe, d_in: int) -> str:
    """Text of README.md: how the artifact is made, and that it is not trained yet.

    Args:
        recipe: of the artifact.
        d_in: width of the layer, which the recipe does not say.
    """
    with torch.device("meta"):  # no weights
        if recipe.kind == "sae":
            model = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=d_in, **recipe.model))
        else:
            model = DiffusionProbe(DiffusionProbeConfig(d_in=d_in, **recipe.model))
    model.provenance = Provenance(**recipe.extraction.to_dict(), weights="")
    model.metrics = {"training": dict(recipe.training), "data": {"dataset": recipe.data.dataset, **recipe.splits}}
    text = str(artifact_card(model, recipe.name, trained=False))
    command = f"diffusion-sae train --recipe hub_cards/{recipe.name}.yaml --push OWNER/{recipe.name}"
    head, use, rest = text.partition("## Use\n")
    return f"{head}It is made by `{command}`.\n\n{use}{rest}"
