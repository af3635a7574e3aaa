"""Settings of an extraction and the record of one: JSON round trip, validation, what the fingerprint covers."""

import dataclasses
import json

import pytest

from diffusion_sae._config import check_choice, check_integer, check_number, refuse_unknown
from diffusion_sae._files import fingerprint_of
from diffusion_sae.provenance import (
    EXTRACTOR_CONFIG_NAME,
    ExtractorConfig,
    Provenance,
    ProvenanceMismatchError,
    require_same_provenance,
)

SETTINGS = {
    "model": "someone/model",
    "layers": ("bottleneck", "up_ft1"),
    "timesteps": (25, 100),
    "pooling": "tokens",
    "prompt": "a “quoted” naïve prompt",
    "prompt_from": "clip",
    "prompt_choices": ("a shoe", "a bag"),
    "clip_model": "someone/clip",
    "classifier_free_pair": True,
    "noise": "seeded",  # the default: ensemble needs it
    "ensemble": 8,
    "seed": 3,
    "image_size": 256,
    "crop": "none",
    "resample": "lanczos",
    "dtype": "bfloat16",
    "revision": "v1.0",
    "guidance": 3.5,
    "random_weights": True,
    "views": 4,
    "view_area": 0.5,
    "view_flip": False,
}


def record(**changes):
    versions = {"torch": "2.13.0", "diffusers": "0.42.1"}
    return Provenance(**{**SETTINGS, "weights": "0123456789abcdef", "versions": versions, **changes})


def test_every_setting_is_tested():
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(ExtractorConfig)}
    for field in dataclasses.fields(ExtractorConfig):
        assert SETTINGS[field.name] != field.default or field.name == "noise", field.name


def test_config_round_trips_through_json():
    config = ExtractorConfig(**SETTINGS)
    content = json.loads(json.dumps(config.to_dict()))
    assert content["layers"] == ["bottleneck", "up_ft1"]
    assert ExtractorConfig.from_dict(content) == config
    assert ExtractorConfig.from_dict(ExtractorConfig().to_dict()) == ExtractorConfig()


def test_one_layer_or_timestep_needs_no_list():
    config = ExtractorConfig(layers="up_ft1", timesteps=25)
    assert (config.layers, config.timesteps) == (("up_ft1",), (25,))
    assert ExtractorConfig(layers=["a", "b"], timesteps=[1, 2]) == ExtractorConfig(layers=("a", "b"), timesteps=(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, r"model must name a pipeline, got ''"),
        ({"model": 3}, r"model must name a pipeline, got 3"),
        ({"layers": ()}, r"layers must name at least one layer, got none"),
        ({"layers": ("up_ft1", 2)}, r"layer must be a name, got 2"),
        ({"layers": ("",)}, r"layer must be a name, got ''"),
        ({"layers": ("up_ft1", "up_ft1")}, r"layers must not repeat, got \['up_ft1', 'up_ft1'\]"),
        ({"timesteps": ()}, r"timesteps must hold at least one timestep, got none"),
        ({"timesteps": (25, 1000)}, r"timestep must be an integer in 0…999, got 1000"),
        ({"timesteps": -1}, r"timestep must be an integer in 0…999, got -1"),
        ({"timesteps": (2.5,)}, r"timestep must be an integer in 0…999, got 2.5"),
        ({"timesteps": (True,)}, r"timestep must be an integer in 0…999, got True"),
        ({"timesteps": (25, 25)}, r"timesteps must not repeat, got \[25, 25\]"),
        ({"pooling": "sum"}, r"pooling must be one of 'mean', 'max', 'tokens', 'none', got 'sum'"),
        ({"dtype": "float64"}, r"dtype must be one of 'float32', 'bfloat16', 'float16', got 'float64'"),
        ({"prompt": None}, r"prompt must be a string, got None"),
        ({"noise": "random"}, r"noise must be one of 'seeded', 'none', got 'random'"),
        ({"ensemble": 0}, r"ensemble must be an integer ≥ 1, got 0"),
        ({"ensemble": 2, "noise": "none"}, r"ensemble=2 averages over draws .* it needs noise='seeded', got 'none'"),
        ({"crop": "left"}, r"crop must be one of 'center', 'none', got 'left'"),
        ({"resample": "cubic"}, r"resample must be one of 'bicubic', 'bilinear', 'lanczos', 'nearest', got 'cubic'"),
        ({"classifier_free_pair": "yes"}, r"classifier_free_pair must be one of True, False, got 'yes'"),
        ({"prompt_from": "label"}, r"prompt_from must be one of 'config', 'class', 'image', 'clip', got 'label'"),
        ({"prompt_from": "class", "prompt": "a photo"}, r"prompt_from='class' needs a \{\} .* got 'a photo'"),
        ({"prompt_from": "clip", "clip_model": "x"}, r"prompt_from='clip' needs at least two prompt_choices"),
        ({"prompt_from": "clip", "prompt_choices": ("a", "b")}, r"prompt_from='clip' needs clip_model, such as"),
        ({"prompt_choices": ("a", "b")}, r"prompt_choices belong to prompt_from='clip', got 'config'"),
        ({"seed": -1}, r"seed must be an integer ≥ 0, got -1"),
        ({"seed": "1"}, r"seed must be an integer ≥ 0, got '1'"),
        ({"image_size": 0}, r"image_size must be an integer in 1…1000000, got 0"),
        ({"guidance": -0.5}, r"guidance must be a number ≥ 0 and ≤ 1000000, got -0.5"),
        ({"guidance": "high"}, r"guidance must be a number ≥ 0 and ≤ 1000000, got 'high'"),
        ({"random_weights": "no"}, r"random_weights must be one of True, False, got 'no'"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ExtractorConfig(**settings)


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"ExtractorConfig does not know 'layer' \(did you mean 'layers'\?\), 'zzz'"):
        ExtractorConfig.from_dict({"layer": "up_ft1", "zzz": 1})
    with pytest.raises(ValueError, match=r"Provenance needs weights, which the given config lacks"):
        Provenance.from_dict(SETTINGS)


def test_helpers():
    refuse_unknown(["a"], ["a", "b"], "X")
    with pytest.raises(ValueError, match=r"X does not know 'c'\. Known: a, b\."):
        refuse_unknown(["a", "c"], ["b", "a"], "X")
    check_choice("c", 1, [1, 2])
    check_integer("i", 5, 0, 5)
    check_number("n", 0, 0)
    with pytest.raises(ValueError, match=r"n must be a number > 0, got 0"):
        check_number("n", 0, 0, open_low=True)
    with pytest.raises(ValueError, match=r"n must be a number ≥ 0 and ≤ 1, got nan"):
        check_number("n", float("nan"), 0, 1)
    with pytest.raises(ValueError, match=r"i must be an integer in 0…5, got 6"):
        check_integer("i", 6, 0, 5)


def test_fingerprint_ignores_names_and_versions():
    fingerprint = record().fingerprint
    for same in ({"model": "moved/elsewhere"}, {"revision": "main"}, {"versions": {}}):
        assert record(**same).fingerprint == fingerprint
    assert record(layers=("up_ft1", "bottleneck"), timesteps=(100, 25)).fingerprint == fingerprint
    assert record(guidance=3).fingerprint == record(guidance=3.0).fingerprint


def test_fingerprint_covers_all_that_decides_the_numbers():
    changes = [
        {"weights": "fedcba9876543210"},
        {"layers": ("bottleneck",)},
        {"layers": ("bottleneck", "up_ft2")},
        {"timesteps": (25,)},
        {"timesteps": (25, 101)},
        {"pooling": "mean"},
        {"prompt": ""},
        {"prompt_from": "image", "prompt_choices": (), "clip_model": None},
        {"prompt_choices": ("a bag", "a shoe")},
        {"clip_model": "someone/other-clip"},
        {"classifier_free_pair": False},
        {"noise": "none", "ensemble": 1},
        {"ensemble": 1},
        {"seed": 4},
        {"image_size": 512},
        {"crop": "center"},
        {"resample": "nearest"},
        {"dtype": "float32"},
        {"guidance": 1.0},
        {"random_weights": False},
        {"views": 5},
        {"view_area": 0.9},
        {"view_flip": True},
    ]
    fingerprints = {record(**change).fingerprint for change in changes}
    assert len(fingerprints | {record().fingerprint}) == len(changes) + 1
    covered = {key for change in changes for key in change}
    assert covered | {"model", "revision", "versions"} == {field.name for field in dataclasses.fields(Provenance)}


def test_fingerprint_is_the_same_in_every_process():
    """A changed rule would make all published artifacts strangers to all stores: change it with the format alone."""
    assert fingerprint_of({"b": [1, 2.5], "a": "ü"}) == fingerprint_of({"a": "ü", "b": [1, 2.5]})
    assert fingerprint_of({"a": 1}) == "015abd7f5cc57a2d"
    assert record().plain().fingerprint == "020a0efb33457417"
    assert record().fingerprint == "31e1eabd6208f195"


def test_a_setting_at_its_default_leaves_the_fingerprint_as_it_is():
    """So that artifacts published before a setting existed still fit."""
    weights = {"weights": "0123456789abcdef"}
    content = Provenance(**weights).to_dict()
    for added_later in ("noise", "ensemble", "crop", "prompt_choices"):
        del content[added_later]
    assert Provenance.from_dict(content).fingerprint == Provenance(**weights).fingerprint


def test_select_narrows_to_what_was_extracted():
    one = record().select("up_ft1", 100)
    assert (one.layers, one.timesteps) == (("up_ft1",), (100,))
    assert one == record(layers=("up_ft1",), timesteps=(100,))
    with pytest.raises(ValueError, match=r"layer must be one of 'bottleneck', 'up_ft1', got 'up_ft2'"):
        record().select("up_ft2", 25)
    with pytest.raises(ValueError, match=r"timestep must be one of 25, 100, got 50"):
        record().select("up_ft1", 50)


def test_settings_are_those_of_the_extraction():
    assert record().settings == ExtractorConfig(**SETTINGS)
    assert type(record().settings) is ExtractorConfig


def test_record_on_disk(tmp_path):
    record().save(tmp_path)
    path = tmp_path / EXTRACTOR_CONFIG_NAME
    assert Provenance.load(path) == record()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["fingerprint"] == record().fingerprint
    assert content["prompt"] == SETTINGS["prompt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"was edited: it records the fingerprint \w{16}, its settings have \w{16}"),
        ({"weights": "x"}, r"was edited"),
        ({"fingerprint": "0" * 16}, r"was edited: it records the fingerprint 0{16}"),
        ({"fingerprint": None}, r"was edited: it records the fingerprint None"),
        ({"timesteps": [1000]}, r"timestep must be an integer in 0…999"),
        ({"surprise": 1}, r"Provenance does not know 'surprise'"),
    ],
)
def test_an_edited_record_is_refused(tmp_path, change, message):
    record().save(tmp_path)
    path = tmp_path / EXTRACTOR_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Provenance.load(path)


def test_mismatch_names_both_and_what_differs():
    mine, theirs = record(), record(seed=9, prompt="", versions={}, model="other/name")
    with pytest.raises(ProvenanceMismatchError) as caught:
        require_same_provenance(mine, theirs, "The SAE")
    message = str(caught.value)
    assert "The SAE was made for features of another extraction (they differ in prompt, seed)." in message
    assert mine.describe() in message
    assert theirs.describe() in message
    assert "allow_mismatch=True" in message


def test_what_is_no_mismatch():
    require_same_provenance(record(), record(model="moved/elsewhere", versions={}), "It")
    require_same_provenance(record(), record(seed=9), "It", allow_mismatch=True)
    require_same_provenance(None, record(), "It")
    require_same_provenance(record(), None, "It")


def test_description_holds_what_a_person_compares():
    text = record().describe()
    for part in ("someone/model", "random weights", "bottleneck, up_ft1", "t=25, 100", "seed 3", "256 px", "bfloat16"):
        assert part in text
    assert record().fingerprint in text
    assert "prompt" not in record(prompt="").describe()
