"""What every artifact keeps, whatever its class: one contract, strict loading, saving that is whole or not at all."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.hub.artifact import ArtifactModel
from diffusion_sae.provenance import Provenance

CONFIGS = {
    "sae": KSparseAutoencoderConfig(d_in=6, num_latents=40, k=3),
    "kaiming sae": KSparseAutoencoderConfig(d_in=6, num_latents=40, k=3, encoder_init="kaiming"),
    "linear probe": DiffusionProbeConfig(d_in=6, num_labels=3),
    "diff-c probe": DiffusionProbeConfig(d_in=6, head="diff-c", width=8, id2label={0: "bag", 1: "dress", 2: "shoe"}),
}
CLASSES: dict[str, type[ArtifactModel]] = {
    "k-sparse-autoencoder": KSparseAutoencoder,
    "diffusion-probe": DiffusionProbe,
}
PROVENANCE = Provenance(
    model="owner/model", layers=("up_ft1",), timesteps=(25,), image_size=32, weights="0123456789abcdef"
)


def make(name: str) -> ArtifactModel:
    """In evaluation mode, with no weight or statistic at a value that could be right by chance."""
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    model = CLASSES[config.model_type](config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += torch.rand(value.shape, generator=generator) * 0.1
    return model


def features_for(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (5, 6, 4, 4) if name == "diff-c probe" else (5, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def outputs(model: ArtifactModel, features: Tensor) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # of the dropout, in training mode
        return dict(model(features=features))


def assert_equal_outputs(one: ArtifactModel, other: ArtifactModel, features: Tensor) -> None:
    expected, got = outputs(one, features), outputs(other, features)
    assert set(expected) == set(got)
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


def assert_equal_state(one: ArtifactModel, other: ArtifactModel) -> None:
    assert set(one.state_dict()) == set(other.state_dict())
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sae_folder(tmp_path: Path) -> Path:
    make("sae").save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def test_every_artifact_class_is_under_contract() -> None:
    assert set(ArtifactModel.__subclasses__()) == set(CLASSES.values())
    assert {config.model_type for config in CONFIGS.values()} == set(CLASSES)


@pytest.mark.parametrize("name", CONFIGS)
class TestContract:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shapes_and_types(self, name: str, dtype: torch.dtype) -> None:
        model = make(name).to(dtype)
        output = model(features=features_for(name, dtype))
        shapes = {key: tuple(value.shape) for key, value in output.items()}
        if name.endswith("sae"):
            assert shapes == {
                "loss": (),
                "reconstruction": (5, 6),
                "top_acts": (5, 3),
                "top_indices": (5, 3),
                "fvu": (),
                "auxk_loss": (),
                "sparsity_loss": (),
            }
            assert output.top_indices.dtype == torch.long
        else:
            assert shapes == {"logits": (5, 3)}
        assert all(value.dtype == dtype for value in output.values() if value.is_floating_point())
        assert all(torch.isfinite(value).all() for value in output.values())

    def test_half_precision_is_near_full_precision(self, name: str) -> None:
        key = "reconstruction" if name.endswith("sae") else "logits"
        full = outputs(make(name), features_for(name))[key]
        half = outputs(make(name).to(torch.bfloat16), features_for(name, torch.bfloat16))[key].float()
        assert (full - half).norm() < 0.05 * full.norm() + 0.02

    @pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16])
    def test_features_of_another_precision_are_taken(self, name: str, given: torch.dtype) -> None:
        """A store hands out fp32, an extractor what it computes in."""
        for own in (torch.float32, torch.bfloat16):
            output = outputs(make(name).to(own), features_for(name, given))
            assert {value.dtype for value in output.values() if value.is_floating_point()} == {own}

    def test_on_the_meta_device(self, name: str) -> None:
        config = CONFIGS[name]
        with torch.device("meta"):
            model = CLASSES[config.model_type](config)
        assert {value.device.type for value in model.state_dict().values()} == {"meta"}
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert shapes == {key: value.shape for key, value in make(name).state_dict().items()}

    def test_deterministic(self, name: str) -> None:
        features = features_for(name)
        assert_equal_state(make(name), make(name))
        assert_equal_outputs(make(name), make(name), features)
        before = features.clone()
        make(name)(features=features)
        assert torch.equal(features, before), "the caller's features were changed"

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_save_and_load(self, name: str, training: bool, tmp_path: Path) -> None:
        model = make(name)
        model.provenance, model.metrics = PROVENANCE, {"held_out": {"fvu": 0.25, "rows": 9}, "note": "On nine rows."}
        model.save_pretrained(tmp_path / "artifact")
        loaded = type(model).from_pretrained(tmp_path / "artifact")
        assert not loaded.training
        assert_equal_state(model, loaded)
        assert loaded.provenance == PROVENANCE
        assert loaded.metrics == model.metrics
        assert loaded.config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {"dtype": None}
        assert_equal_outputs(model.train(training), loaded.train(training), features_for(name))
        assert_equal_state(model, loaded)  # batch statistics moved alike

    def test_what_an_artifact_consists_of(self, name: str, tmp_path: Path) -> None:
        model = make(name)
        own = set() if name.endswith("sae") else {"preprocessor_config.json"}
        model.save_pretrained(tmp_path / "bare")
        assert set(files_of(tmp_path / "bare")) == {"config.json", "model.safetensors", "README.md"} | own
        model.provenance, model.metrics = PROVENANCE, {"test": {"accuracy": 0.5}}
        model.save_pretrained(tmp_path / "full")
        assert set(files_of(tmp_path / "full")) == set(files_of(tmp_path / "bare")) | {
            "extractor_config.json",
            "metrics.json",
        }
        assert json.loads((tmp_path / "full/metrics.json").read_text()) == {"test": {"accuracy": 0.5}}
        assert Provenance.load(tmp_path / "full/extractor_config.json") == PROVENANCE
        assert "auto_map" not in json.loads((tmp_path / "full/config.json").read_text())

    def test_saving_twice_writes_the_same_bytes(self, name: str, tmp_path: Path) -> None:
        model = make(name)
        model.save_pretrained(tmp_path / "artifact")
        before = files_of(tmp_path / "artifact")
        type(model).from_pretrained(tmp_path / "artifact").save_pretrained(tmp_path / "artifact")
        assert files_of(tmp_path / "artifact") == before

    def test_in_shards(self, name: str, tmp_path: Path) -> None:
        model = make(name)
        model.save_pretrained(tmp_path / "artifact", max_shard_size=500)
        names = set(files_of(tmp_path / "artifact"))
        if name != "linear probe":  # which is smaller than a shard
            assert "model.safetensors.index.json" in names
            assert sum(file.startswith("model-0000") for file in names) > 1
        assert_equal_state(model, type(model).from_pretrained(tmp_path / "artifact"))

    def test_loading_in_another_precision(self, name: str, tmp_path: Path) -> None:
        model = make(name)
        model.save_pretrained(tmp_path / "artifact")
        for dtype in (torch.bfloat16, "bfloat16"):
            loaded = type(model).from_pretrained(tmp_path / "artifact", dtype=dtype)
            assert loaded.dtype == torch.bfloat16
            for key, value in model.state_dict().items():
                expected = value.to(torch.bfloat16) if value.is_floating_point() else value
                assert torch.equal(loaded.state_dict()[key], expected), key

    def test_loading_by_the_auto_classes(self, name: str, tmp_path: Path) -> None:
        model = make(name)
        model.provenance = PROVENANCE
        model.save_pretrained(tmp_path / "artifact")
        assert type(AutoConfig.from_pretrained(tmp_path / "artifact")) is type(model.config)
        auto_classes = [AutoModel] if name.endswith("sae") else [AutoModel, AutoModelForImageClassification]
        for auto in auto_classes:
            loaded = auto.from_pretrained(tmp_path / "artifact")
            assert type(loaded) is type(model)
            assert_equal_state(model, loaded)
            assert loaded.provenance == PROVENANCE

    def test_loading_from_a_subfolder_and_with_the_loading_report(self, name: str, tmp_path: Path) -> None:
        model = make(name)
        model.provenance, model.metrics = PROVENANCE, {"a": 1}
        model.save_pretrained(tmp_path / "repo" / "layer" / "t25")
        loaded, info = type(model).from_pretrained(tmp_path / "repo", subfolder="layer/t25", output_loading_info=True)
        assert_equal_state(model, loaded)
        assert (loaded.provenance, loaded.metrics) == (PROVENANCE, {"a": 1})
        assert not info["missing_keys"]


class TestStrictLoading:
    def change(self, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def test_a_missing_tensor_is_named(self, sae_folder: Path) -> None:
        self.change(sae_folder, lambda tensors: tensors.pop("b_dec"))
        with pytest.raises(ValueError, match=rf"weights file of '{sae_folder}' lacks b_dec\. It must hold exactly"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_an_unexpected_tensor_is_named(self, sae_folder: Path) -> None:
        self.change(sae_folder, lambda tensors: tensors.update(W_skip=torch.zeros(2)))
        with pytest.raises(ValueError, match="has the unexpected W_skip"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_a_misshapen_tensor_is_named(self, sae_folder: Path) -> None:
        self.change(sae_folder, lambda tensors: tensors.update(W_enc=tensors["W_enc"].T.contiguous()))
        with pytest.raises(ValueError, match=r"has W_enc of shape \(40, 6\) where the config asks for \(6, 40\)"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_all_problems_are_named_at_once(self, sae_folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors["extra"], tensors["b_dec"] = torch.zeros(1), torch.zeros(7)
            del tensors["b_enc"], tensors["W_dec"]

        self.change(sae_folder, change)
        with pytest.raises(ValueError, match="lacks W_dec, b_enc; has the unexpected extra; has b_dec of shape"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_buffers_count_as_well(self, tmp_path: Path) -> None:
        make("linear probe").save_pretrained(tmp_path / "probe")
        self.change(tmp_path / "probe", lambda tensors: tensors.pop("head.feature_std"))
        with pytest.raises(ValueError, match=r"lacks head\.feature_std"):
            DiffusionProbe.from_pretrained(tmp_path / "probe")

    def test_also_by_auto_model(self, sae_folder: Path) -> None:
        self.change(sae_folder, lambda tensors: tensors.pop("b_dec"))
        with pytest.raises(ValueError, match="lacks b_dec"):
            AutoModel.from_pretrained(sae_folder)

    @pytest.mark.parametrize("kept", [-20, 100, 4, 0])
    def test_a_truncated_weights_file(self, kept: int, sae_folder: Path) -> None:
        weights = sae_folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"weights of '{sae_folder}' are damaged .*Download or save them again"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_a_missing_weights_file(self, sae_folder: Path) -> None:
        (sae_folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=rf"no file named model\.safetensors.* in directory {sae_folder}"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        make("sae").save_pretrained(tmp_path / "sae", max_shard_size=500)
        shard = next((tmp_path / "sae").glob("model-00002-of-*.safetensors"))
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            KSparseAutoencoder.from_pretrained(tmp_path / "sae")

    def test_pickled_weights_are_not_read(self, sae_folder: Path) -> None:
        torch.save(load_file(sae_folder / "model.safetensors"), sae_folder / "pytorch_model.bin")
        (sae_folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"k": None}, ValueError, "KSparseAutoencoderConfig needs k, which the given config lacks"),
            ({"d_in": None}, ValueError, "KSparseAutoencoderConfig needs d_in, which the given config lacks"),
            ({"kk": 3}, ValueError, r"does not know 'kk' \(did you mean 'k'\?\)"),
            ({"k": 41}, ValueError, "k must be at most num_latents = 40, got k = 41"),
            ({"num_latents": 41}, ValueError, "num_latents 41 is not d_in 6 × expansion_factor"),
            ({"k": "3"}, StrictDataclassFieldValidationError, "'k' expected int, got str"),
            ({"model_type": None}, ValueError, "names no model_type"),
            ({"model_type": "sparse-autoencoder"}, ValueError, "of the kind 'sparse-autoencoder', not 'k-sparse"),
        ],
    )
    def test_a_wrong_config_file(
        self, change: dict[str, Any], error: type[Exception], message: str, sae_folder: Path
    ) -> None:
        content = json.loads((sae_folder / "config.json").read_text()) | change
        content = {key: value for key, value in content.items() if value is not None}
        (sae_folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(error, match=message):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_a_config_that_is_no_json(self, sae_folder: Path) -> None:
        (sae_folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            KSparseAutoencoder.from_pretrained(sae_folder)

    def test_an_artifact_of_another_kind(self, sae_folder: Path, tmp_path: Path) -> None:
        make("linear probe").save_pretrained(tmp_path / "probe")
        with pytest.raises(
            ValueError, match=r"'diffusion-probe', not 'k-sparse-autoencoder': .*Load it with the class"
        ):
            KSparseAutoencoder.from_pretrained(tmp_path / "probe")
        with pytest.raises(ValueError, match="'k-sparse-autoencoder', not 'diffusion-probe'"):
            DiffusionProbe.from_pretrained(sae_folder)

    def test_a_folder_without_an_artifact(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"There is no config\.json.* no artifact for KSparseAutoencoder"):
            KSparseAutoencoder.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["no-such-name", "a/b/c", "/no/such/folder"])
    def test_a_name_that_can_be_nothing(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match=rf"'{name}' is no folder, no Hub id \(owner/name\)"):
            KSparseAutoencoder.from_pretrained(name)

    def test_an_extraction_that_was_edited(self, tmp_path: Path) -> None:
        model = make("sae")
        model.provenance = PROVENANCE
        model.save_pretrained(tmp_path / "sae")
        path = tmp_path / "sae" / "extractor_config.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        with pytest.raises(ValueError, match=rf"{path} was edited.*{PROVENANCE.fingerprint}"):
            KSparseAutoencoder.from_pretrained(tmp_path / "sae")

    def test_metrics_that_are_no_json(self, sae_folder: Path) -> None:
        (sae_folder / "metrics.json").write_text("{,")
        with pytest.raises(ValueError, match=r"metrics\.json is not valid JSON"):
            KSparseAutoencoder.from_pretrained(sae_folder)


class TestSaving:
    @pytest.mark.parametrize("stopped_in", ["write_artifact_card", "write_json"])
    def test_an_interrupted_save_leaves_the_old_artifact(
        self, stopped_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = make("sae"), make("kaiming sae")
        old.metrics, new.metrics = {"version": 1}, {"version": 2}
        old.save_pretrained(tmp_path / "sae")
        before = files_of(tmp_path)

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(f"diffusion_sae.hub.artifact.{stopped_in}", stop)
        for folder in ("sae", "new"):
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(tmp_path / folder)
        assert files_of(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["sae"], "something half-written was left"
        assert_equal_state(old, KSparseAutoencoder.from_pretrained(tmp_path / "sae"))

    def test_where_nothing_can_be_written(self, sae_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        before = files_of(tmp_path)
        for folder in (tmp_path / "file" / "sae", tmp_path / "file"):
            with pytest.raises(PermissionError, match=rf"Cannot write to the output folder '{tmp_path / 'file'}"):
                make("sae").save_pretrained(folder)
        assert files_of(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"file", "sae"}

    @pytest.mark.parametrize("sizes", [(5000, 500), (500, 5000), (300, 500)])
    def test_over_an_artifact_in_other_shards(self, sizes: tuple[int, int], tmp_path: Path) -> None:
        """A left-over model.safetensors would be loaded in the place of the new shards."""
        for name, size in zip(("sae", "kaiming sae"), sizes, strict=True):
            make(name).save_pretrained(tmp_path / "sae", max_shard_size=size)
            make(name).save_pretrained(tmp_path / f"fresh {size}", max_shard_size=size)
        assert set(files_of(tmp_path / "sae")) == set(files_of(tmp_path / f"fresh {sizes[1]}"))
        assert_equal_state(make("kaiming sae"), KSparseAutoencoder.from_pretrained(tmp_path / "sae"))

    def test_over_an_artifact_with_records_the_new_one_lacks(self, tmp_path: Path) -> None:
        old = make("sae")
        old.provenance, old.metrics = PROVENANCE, {"held_out": {"fvu": 0.1}}
        old.save_pretrained(tmp_path / "sae")
        make("sae").save_pretrained(tmp_path / "sae")
        loaded = KSparseAutoencoder.from_pretrained(tmp_path / "sae")
        assert loaded.provenance is None
        assert loaded.metrics == {}

    def test_other_files_in_the_folder_stay(self, sae_folder: Path) -> None:
        (sae_folder / "notes.txt").write_text("mine")
        (sae_folder / "checkpoint.safetensors").write_bytes(b"of a training")
        make("kaiming sae").save_pretrained(sae_folder)
        assert (sae_folder / "notes.txt").read_text() == "mine"
        assert (sae_folder / "checkpoint.safetensors").read_bytes() == b"of a training"

    def test_a_variant_is_saved_beside_the_weights(self, sae_folder: Path) -> None:
        make("kaiming sae").to(torch.bfloat16).save_pretrained(sae_folder, variant="bf16")
        assert {"model.safetensors", "model.bf16.safetensors"} <= set(files_of(sae_folder))
        variant = KSparseAutoencoder.from_pretrained(sae_folder, variant="bf16")
        assert_equal_state(make("kaiming sae").to(torch.bfloat16), variant)


class TestCard:
    def save(self, tmp_path: Path, name: str = "sae", **changes: Any) -> ModelCard:
        model = make(name)
        model.provenance = dataclasses.replace(PROVENANCE, **changes.pop("provenance", {}))
        model.metrics = changes.pop(
            "metrics", {"held_out": {"fvu": 0.123456, "l0": 3.0, "rows": 1234}, "note": "Nine."}
        )
        model.save_pretrained(tmp_path / "sd15-up1-t25")
        return ModelCard.load(tmp_path / "sd15-up1-t25" / "README.md")

    def test_data(self, tmp_path: Path) -> None:
        data = self.save(tmp_path).data
        assert data.library_name == "diffusion_sae"
        assert data.license == "apache-2.0"
        assert data.base_model == "owner/model"
        assert data.pipeline_tag == "image-feature-extraction"
        assert data.tags == ["diffusion_sae", "sparse-autoencoder", "interpretability", "up_ft1", "timestep-25"]

    def test_data_of_a_probe(self, tmp_path: Path) -> None:
        data = self.save(tmp_path, "diff-c probe").data
        assert data.pipeline_tag == "image-classification"
        assert data.tags == ["diffusion_sae", "diffusion-probe", "up_ft1", "timestep-25"]

    @pytest.mark.parametrize("model", ["tiny-sd", "/a/folder/model"])
    def test_a_base_model_without_a_page_is_not_linked(self, model: str, tmp_path: Path) -> None:
        assert self.save(tmp_path, provenance={"model": model}).data.base_model is None

    def test_text(self, tmp_path: Path) -> None:
        text = self.save(tmp_path).text
        assert text.strip().startswith("# sd15-up1-t25\n")
        for row in (
            "| held_out.fvu | 0.1235 |",
            "| held_out.rows | 1234 |",
            "| num_latents | 40 |",
            "| layers | `up_ft1` |",
            f"| fingerprint | `{PROVENANCE.fingerprint}` |",
        ):
            assert row in text
        assert "Nine." in text
        assert "| note |" not in text
        assert 'KSparseAutoencoder.from_pretrained("sd15-up1-t25")' in text
        assert "Not yet trained" not in text

    def test_without_metrics_it_says_so(self, tmp_path: Path) -> None:
        text = self.save(tmp_path, metrics={}).text
        assert "Not yet trained" in text
        assert "## Measured" not in text

    def test_the_classes_of_a_probe_are_listed(self, tmp_path: Path) -> None:
        text = self.save(tmp_path, "diff-c probe").text
        assert "3 classes (bag, dress, shoe)" in text
        assert 'pipeline("diffusion-probe", model="sd15-up1-t25")("image.png")' in text
        assert "| width | 8 |" in text


def test_the_code_on_an_sae_card_runs(tmp_path: Path, tiny_sd_folder: Path, images: list[Any]) -> None:
    """As it stands there, from the folder that holds the artifact."""
    from diffusion_sae import DiffusionFeatureExtractor

    extractor = DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, layers=["bottleneck"], timesteps=[10])
    width = extractor(images[0])["bottleneck", 10].shape[1]
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=width, num_latents=50, k=4))
    sae.provenance = extractor.provenance
    sae.save_pretrained(tmp_path / "sae", repo_id=str(tmp_path / "sae"))
    code = ModelCard.load(tmp_path / "sae" / "README.md").text.split("```python\n")[1].split("```")[0]
    images[0].save(tmp_path / "image.png")
    code = code.replace("image.png", str(tmp_path / "image.png"))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    assert names["top_indices"].shape == (1, 4)
    assert (names["top_acts"] >= 0).all()


def test_modules_of_an_artifact_have_no_hidden_state() -> None:
    """Non-persistent buffers are lost on the meta device, where every model is built when it is loaded."""
    for name in CONFIGS:
        model: nn.Module = make(name)
        assert {key for key, _ in model.named_buffers()} <= set(model.state_dict()), name
