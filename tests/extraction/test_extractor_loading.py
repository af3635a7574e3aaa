"""from_pretrained of pipelines and artifacts, dtypes, the random baseline, and refused settings."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.provenance import EXTRACTOR_CONFIG_NAME, ProvenanceMismatchError

load = DiffusionFeatureExtractor.from_pretrained


@pytest.fixture(scope="module")
def artifact(tiny_sd_folder, tmp_path_factory):
    """A saved extractor with settings that are not the defaults."""
    extractor = load(tiny_sd_folder, layers=["up_ft1"], timesteps=[100], pooling="max", prompt="a bag", seed=3)
    folder = tmp_path_factory.mktemp("artifact")
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture
def own_model(tiny_sd_folder, tmp_path):
    """A copy of the model whose weights a test may change."""
    return shutil.copytree(tiny_sd_folder, tmp_path / "own-model")


def perturb(folder, component):
    path = folder / component / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    state[name] = state[name] + 1e-3
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_a_loaded_pipeline_gives_the_features_of_the_one_in_memory(
    request, tiny_sd_folder, tiny_dit_folder, images, family
):
    folder, layer = (tiny_sd_folder, "up_ft1") if family == "unet" else (tiny_dit_folder, "block1")
    make = request.getfixturevalue("make_sd_extractor" if family == "unet" else "make_dit_extractor")
    before = torch.get_rng_state()
    loaded = load(folder, layers=[layer], timesteps=[25])
    assert torch.equal(torch.get_rng_state(), before)
    in_memory = make(layers=layer)
    torch.testing.assert_close(loaded(images[:3])[layer, 25], in_memory(images[:3])[layer, 25], atol=1e-6, rtol=0)
    assert loaded.provenance.fingerprint == in_memory.provenance.fingerprint
    assert loaded.config.model == str(folder)
    assert loaded.device == torch.device("cpu")


def test_settings_reach_the_config(tiny_sd_folder):
    extractor = load(str(tiny_sd_folder), layers="up_ft1", timesteps=100, pooling="tokens", prompt="x", seed=4)
    config = extractor.config
    assert (config.layers, config.timesteps) == (("up_ft1",), (100,))
    assert (config.pooling, config.prompt, config.seed, config.image_size) == ("tokens", "x", 4, 32)
    versions = extractor.provenance.versions
    assert versions["torch"] == torch.__version__
    assert set(versions) >= {"diffusers", "transformers", "diffusion-sae"}


def test_a_saved_extractor_is_the_very_same(artifact, tiny_sd_folder, images):
    assert [path.name for path in artifact.iterdir()] == [EXTRACTOR_CONFIG_NAME]
    first = load(tiny_sd_folder, layers=["up_ft1"], timesteps=[100], pooling="max", prompt="a bag", seed=3)
    again = load(artifact)
    assert again.config == first.config
    assert again.provenance == first.provenance
    assert torch.equal(again(images[:2])["up_ft1", 100], first(images[:2])["up_ft1", 100])


def test_an_artifact_in_a_subfolder(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "many" / "first")
    assert load(tmp_path / "many", subfolder="first").config == load(artifact).config


def test_settings_that_an_artifact_contradicts(artifact, tiny_sd_folder):
    with pytest.raises(ValueError, match=r"fixes its extraction; .* given layers=\('bottleneck',\), seed=9\."):
        load(artifact, layers=["bottleneck"], seed=9, prompt="a bag")
    with pytest.raises(ValueError, match=f"or load '{tiny_sd_folder}' itself"):
        load(artifact, pooling="tokens")
    assert load(artifact, layers=["up_ft1"], seed=3).config.seed == 3


def test_changed_weights_are_found_out(own_model, tmp_path, images):
    original = load(own_model, layers=["up_ft1"])
    original.save_pretrained(tmp_path / "artifact")
    assert load(tmp_path / "artifact").provenance == original.provenance
    perturb(own_model, "unet")
    changed = load(own_model, layers=["up_ft1"]).provenance.weights
    message = f"was made with weights {original.provenance.weights} of .* which now has {changed}"
    with pytest.raises(ProvenanceMismatchError, match=message):
        load(tmp_path / "artifact")
    allowed = load(tmp_path / "artifact", allow_mismatch=True)
    assert allowed.provenance.weights == changed
    assert not torch.equal(allowed(images[0])["up_ft1", 25], original(images[0])["up_ft1", 25])


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_the_hash_covers_every_network(own_model, tiny_sd_folder, component):
    original = load(tiny_sd_folder)
    assert load(own_model).provenance.weights == original.provenance.weights
    perturb(own_model, component)
    assert load(own_model).provenance.weights != original.provenance.weights


def test_the_hash_covers_the_text_encoder_and_the_schedule(tiny_sd_pipeline, make_sd_extractor):
    original = make_sd_extractor().provenance.weights
    text = copy.copy(tiny_sd_pipeline)
    text.text_encoder = copy.deepcopy(tiny_sd_pipeline.text_encoder)
    with torch.no_grad():
        next(text.text_encoder.parameters()).add_(1e-3)
    schedule = copy.copy(tiny_sd_pipeline)
    schedule.scheduler = type(tiny_sd_pipeline.scheduler).from_config(tiny_sd_pipeline.scheduler.config, beta_end=0.02)
    scale = copy.copy(tiny_sd_pipeline)
    scale.vae = copy.deepcopy(tiny_sd_pipeline.vae)
    scale.vae.register_to_config(scaling_factor=0.5)
    hashes = [make_sd_extractor(pipeline=changed).provenance.weights for changed in (text, schedule, scale)]
    assert len({original, *hashes}) == 4


def test_random_weights_are_a_reproducible_baseline(tiny_sd_folder, images):
    def features(**settings):
        return load(tiny_sd_folder, layers=["up_ft1"], **settings)(images[:2])["up_ft1", 25]

    before = torch.get_rng_state()
    trained, random = features(), features(random_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)  # the caller's state must not reach the weights
    assert torch.equal(features(random_weights=True), random)
    assert (random - trained).abs().max() > 1e-2
    assert (features(random_weights=True, seed=1) - random).abs().max() > 1e-2


def test_random_weights_replace_the_denoiser_alone(tiny_sd_folder):
    trained, random = load(tiny_sd_folder), load(tiny_sd_folder, random_weights=True)
    assert random.provenance.fingerprint != trained.provenance.fingerprint
    for name in ("vae", "text_encoder"):
        same = getattr(trained.backbone.pipeline, name).state_dict()
        for key, value in getattr(random.backbone.pipeline, name).state_dict().items():
            assert torch.equal(value, same[key]), key
    unet, fresh = trained.backbone.denoiser, random.backbone.denoiser
    assert not torch.equal(unet.conv_in.weight, fresh.conv_in.weight)
    assert not fresh.training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["unet", "dit"])
def test_half_precision_runs_and_differs_slightly(tiny_sd_folder, tiny_dit_folder, images, dtype, family):
    folder, layer = (tiny_sd_folder, "up_ft1") if family == "unet" else (tiny_dit_folder, "block1")
    full = load(folder, layers=[layer])
    half = load(folder, layers=[layer], dtype=dtype)
    features, expected = half(images[:4])[layer, 25], full(images[:4])[layer, 25]
    assert features.dtype == getattr(torch, dtype)
    difference = (features.float() - expected).norm() / expected.norm()
    assert 0 < difference < 0.03
    assert half.provenance.fingerprint != full.provenance.fingerprint
    assert [info.channels for info in half.available_layers()] == [info.channels for info in full.available_layers()]


def test_unknown_setting_names_the_nearest(tiny_sd_folder):
    with pytest.raises(ValueError, match=r"ExtractorConfig does not know 'layer' \(did you mean 'layers'\?\)\. Known"):
        load(tiny_sd_folder, layer="up_ft1")


@pytest.mark.parametrize("timestep", [-1, 1000, 25.0, True, "25"])
def test_timesteps_outside_the_schedule(tiny_sd_folder, timestep):
    with pytest.raises(ValueError, match=f"timestep must be an integer in 0…999, got {timestep!r}"):
        load(tiny_sd_folder, timesteps=[timestep])


def test_what_can_be_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'no-such-model' is no folder, no Hub id .* Embedded models: "):
        load("no-such-model")
    with pytest.raises(OSError, match=r"model_index\.json"):
        load(tmp_path)  # a folder, but of no pipeline


def test_an_edited_record_is_refused(artifact, tmp_path):
    edited = shutil.copytree(artifact, tmp_path / "edited")
    path = edited / EXTRACTOR_CONFIG_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"seed": 4}))
    with pytest.raises(ValueError, match=r"extractor_config.json was edited: it records the fingerprint \w+"):
        load(edited)
    path.write_text(json.dumps(content)[:-20])
    with pytest.raises(ValueError, match=r"extractor_config.json is not valid JSON"):
        load(edited)
    path.write_text(json.dumps(content | {"versions": {}}))  # recorded only: no part of the fingerprint
    assert load(edited).config == load(artifact).config


def test_moving_the_model_keeps_the_extraction(own_model, tiny_sd_folder):
    moved, original = load(own_model).provenance, load(tiny_sd_folder).provenance
    assert moved.model != original.model
    assert moved.fingerprint == original.fingerprint


def test_to_moves_the_conditioning_as_well(make_sd_extractor, images):
    extractor = make_sd_extractor(layers="up_ft1")
    expected = extractor(images[0])["up_ft1", 25]
    assert extractor.to("cpu") is extractor
    assert torch.equal(extractor(images[0])["up_ft1", 25], expected)
    moved = extractor.backbone.conditioning("").to(torch.device("meta")).arguments
    tensors = [value for value in moved.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(value.device.type == "meta" for value in tensors)


def test_config_is_frozen(make_sd_extractor):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_sd_extractor().config.seed = 1


def test_a_subfolder_without_an_artifact_is_refused(tiny_sd_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no artifact in 'up1'; a pipeline itself is loaded without subfolder"):
        DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, subfolder="up1")
