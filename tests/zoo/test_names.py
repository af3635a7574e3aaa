"""Names of artifacts, and what is looked up in the package before the Hub."""

import re

import pytest

from diffusion_sae.zoo import IMAGES, embedded_images, embedded_path, resolve_source
from diffusion_sae.zoo.names import ArtifactName, long_layer, short_layer

LAYERS = {
    "bottleneck": "mid",
    "down_ft0": "down0",
    "down_ft3": "down3",
    "up_ft1": "up1",
    "up_ft12": "up12",
    "block0": "b0",
    "block14": "b14",
    "single_block3": "s3",
}
NAMES = {
    "sd15-up1-t25": ArtifactName("sd15", "up_ft1", 25),
    "sd15-mid-t0": ArtifactName("sd15", "bottleneck", 0),
    "sdxl-1.0-down2-t999-oxford-pets": ArtifactName("sdxl-1.0", "down_ft2", 999, "oxford-pets"),
    "tiny-sd-up1-t50-fashion-mnist": ArtifactName("tiny-sd", "up_ft1", 50, "fashion-mnist"),
    "dit-xl-2-256-b14-t100-imagenet-1k": ArtifactName("dit-xl-2-256", "block14", 100, "imagenet-1k"),
    "flux.1-dev-s3-t500": ArtifactName("flux.1-dev", "single_block3", 500),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_short_and_long_layers(layer):
    assert short_layer(layer) == LAYERS[layer]
    assert long_layer(LAYERS[layer]) == layer


@pytest.mark.parametrize("name", NAMES)
def test_names_are_parsed_and_built(name):
    assert ArtifactName.parse(name) == NAMES[name]
    assert str(NAMES[name]) == name
    assert ArtifactName.parse(f"someone/{name}") == NAMES[name]  # a Hub id


def test_every_layer_makes_a_name():
    for layer in LAYERS:
        for dataset in (None, "pets", "cub-200-2011"):
            for timestep in (0, 25, 999):
                name = ArtifactName("tiny-sd", layer, timestep, dataset)
                assert ArtifactName.parse(str(name)) == name


@pytest.mark.parametrize(
    "name",
    ["sd15", "sd15-up1", "sd15-t25", "sd15-up-t25", "sd15-up1-t1000", "up1-t25", "SD15-up1-t25", "a-up1-t25-", ""],
)
def test_what_is_no_artifact_name(name):
    with pytest.raises(ValueError, match=rf"'{name}' is no artifact name\. Names are <model>-<layer>-t<timestep>"):
        ArtifactName.parse(name)


@pytest.mark.parametrize(
    ("model", "timestep", "dataset"),
    [("SD15", 25, None), ("sd15", 1000, None), ("sd15", 25, "Pets"), ("sd15-up1-t25", 50, None), ("", 25, None)],
)
def test_a_name_that_would_not_be_read_back_is_refused(model, timestep, dataset):
    with pytest.raises(ValueError, match=r"is no artifact name: .* as in sd15-up1-t25"):
        ArtifactName(model, "up_ft1", timestep, dataset)


def test_pushing_to_an_owner_names_the_artifact_by_its_origin():
    from diffusion_sae import KSparseAutoencoder
    from diffusion_sae.cli.push import artifact_name

    assert artifact_name(KSparseAutoencoder.from_pretrained("tiny-sd-up1-t50")) == "tiny-sd-up1-t50"


@pytest.mark.parametrize("layer", ["up_blocks.1", "mid_block", "up1", "up_ft", "block", "my_block3"])
def test_layers_without_a_short_form(layer):
    with pytest.raises(ValueError, match=rf"'{layer}' has no short form .*up_ft1 → up1"):
        short_layer(layer)


@pytest.mark.parametrize("short", ["bottleneck", "up", "x1", "b", "up_ft1", "bb1"])
def test_what_is_no_short_layer(short):
    with pytest.raises(ValueError, match=rf"'{short}' is no short layer name; these are mid, down0"):
        long_layer(short)


@pytest.mark.parametrize("name", ["tiny-sb", "no such model", "a/b/c", "owner/", "../elsewhere/model"])
def test_unknown_names_list_the_embedded_ones(name):
    with pytest.raises(FileNotFoundError, match=rf"'{re.escape(name)}' is no folder, no Hub id .* Embedded models: "):
        resolve_source(name)


def test_folders_and_hub_ids_stay_what_they_are(tmp_path):
    assert resolve_source(str(tmp_path)) == str(tmp_path)
    assert resolve_source("someone/stable-diffusion_v1.5") == "someone/stable-diffusion_v1.5"


@pytest.mark.parametrize("name", ["nothing", "..", "", "../models/tiny-sd", "models\\tiny-sd"])
def test_what_is_not_embedded(name):
    assert embedded_path(name) is None


def test_unknown_split():
    with pytest.raises(ValueError, match=rf"{IMAGES} has no split 'dev'\. Splits: train, validation, test"):
        embedded_images("dev")
    with pytest.raises(ValueError, match=rf"'mnist' is no embedded data set\. Embedded data sets: {IMAGES}"):
        embedded_images("test", "mnist")
