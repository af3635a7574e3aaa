"""Recipes: what they refuse, their stages, that a killed run goes on, and that a dry run is one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusion_sae import DiffusionFeatureExtractor, DiffusionProbe, KSparseAutoencoder
from diffusion_sae.analysis.recipe import Recipe, RecipeRun
from diffusion_sae.analysis.recipe import run as recipe_run
from diffusion_sae.cli.main import main

ROOT = Path(__file__).parents[2]
SAE: dict[str, Any] = {
    "extraction": {"model": "tiny-sd", "layers": ["up_ft1"], "timesteps": [50], "pooling": "tokens"},
    "data": {"dataset": "fashion-mnist-mini", "test": "test", "limit": 24, "batch_size": 8},
    "sae": {"expansion_factor": 2, "k": 4},
    "training": {"max_steps": 4, "batch_size": 64},
    "latents": {"images_per_latent": 3},
}
PROBE: dict[str, Any] = {
    "extraction": {"model": "tiny-sd", "layers": ["up_ft1"], "timesteps": [50]},
    "data": {"dataset": "fashion-mnist-mini", "validation": "validation", "test": "test", "limit": 60},
    "probe": {"head": "linear"},
}


class TestReading:
    def test_all_committed_recipes_are_valid(self) -> None:
        recipes = [Recipe.read(path) for path in sorted((ROOT / "hub_cards").glob("*.yaml"))]
        assert len(recipes) == 56
        assert {recipe.kind for recipe in recipes} == {"sae", "probe"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"datas": {}}, r"The recipe tiny-up1-t50 does not know 'datas' \(did you mean 'data'\?\)"),
            ({"probe": {}}, r"must have one section of sae and probe, got \['sae', 'probe'\]"),
            ({"data": None}, "'NoneType'"),
            ({"data": {"dataset": ""}}, "data.dataset must name the images"),
            ({"data": {"dataset": "x", "limit": 0}}, r"data.limit must be an integer ≥ 1, got 0"),
            ({"training": {"max_stepss": 1}}, "SAETrainingArguments does not know 'max_stepss'"),
            ({"training": {"output_dir": "x"}}, "training must not name output_dir"),
            ({"latents": {"images_per_latent": 0}}, r"latents.images_per_latent must be an integer in 1…1024"),
            ({"extraction": {"layers": ["up_ft1", "up_ft2"], "timesteps": [50]}}, "A recipe is of one layer and one"),
            ({"extraction": {"layers": ["up_ft2"], "timesteps": [50]}}, "is of up_ft1 at timestep 50, the extraction"),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            Recipe.from_dict(SAE | changes, "tiny-up1-t50")

    def test_what_is_no_recipe(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="The recipe tiny-up1-t50 lacks the section 'data'"):
            Recipe.from_dict({k: v for k, v in SAE.items() if k != "data"}, "tiny-up1-t50")
        with pytest.raises(ValueError, match="A recipe must be a mapping of sections, got a list"):
            Recipe.from_dict([], "tiny-up1-t50")
        (tmp_path / "tiny-up1-t50.yaml").write_text("a: [", encoding="utf-8")
        with pytest.raises(ValueError, match="The recipe tiny-up1-t50 is no valid YAML"):
            Recipe.read(tmp_path / "tiny-up1-t50.yaml")

    def test_several_timesteps_of_one_sae(self) -> None:
        extraction = SAE["extraction"] | {"timesteps": [50, 500]}
        recipe = Recipe.from_dict(
            SAE | {"extraction": extraction, "sae": SAE["sae"] | {"timesteps": [50, 500]}}, "tiny-up1-t50"
        )
        assert recipe.extraction.timesteps == (50, 500)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    RecipeRun(Recipe.from_dict(SAE, "tiny-up1-t50"), folder, device="cpu").run()
    return folder


class TestRunning:
    def test_the_artifact(self, whole: Path) -> None:
        sae = KSparseAutoencoder.from_pretrained(whole / "artifact")
        assert set(sae.metrics) == {"held_out", "test", "latents", "training", "data", "note"}
        assert sae.metrics["data"] == {
            **{"dataset": "fashion-mnist-mini", "train": "train", "test": "test", "latents": "test"},
            **{"train_images": 24, "test_images": 24},
        }
        assert sae.metrics["test"]["rows"] == 24 * 16
        assert sae.metrics["note"].endswith("`test`: on 24 images of the split test.")
        assert sae.latents.source.images_per_latent == 3
        assert sae.latent_sheet.startswith(b"\x89PNG")
        card = (whole / "artifact/README.md").read_text(encoding="utf-8")
        assert "![Latents, each with the images that activate it most](latents.png)" in card
        assert f"| test.fvu | {sae.metrics['test']['fvu']:.4g} |" in card
        assert DiffusionFeatureExtractor.from_pretrained(whole / "artifact").provenance == sae.provenance

    @pytest.mark.parametrize("stage", ["extract", "train", "measure", "save"])
    def test_killed_in_a_stage_it_goes_on(
        self, stage: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rest is done, and what was done is not done again."""

        def kill(*args: Any, **kwargs: Any) -> Any:
            raise Killed

        recipe = Recipe.from_dict(SAE, "tiny-up1-t50")
        sae_model = recipe_run.MODELS["sae"]
        targets = {
            "extract": (DiffusionFeatureExtractor, "extract"),
            "train": (sae_model, "train"),
            "measure": (sae_model, "measure"),
            "save": (KSparseAutoencoder, "save_pretrained"),
        }
        if stage == "save":  # the training saves as well
            monkeypatch.setattr(sae_model, "finished", kill)
        else:
            monkeypatch.setattr(*targets[stage], kill)
        with pytest.raises(Killed):
            RecipeRun(recipe, tmp_path, device="cpu").run()
        monkeypatch.undo()
        done = list(targets)[: list(targets).index(stage)]
        for earlier in done:
            monkeypatch.setattr(*targets[earlier], kill)
        RecipeRun(recipe, tmp_path, device="cpu").run()
        assert contents(tmp_path / "artifact") == contents(whole / "artifact")

    def test_a_folder_of_another_recipe(self, whole: Path) -> None:
        other = SAE | {"training": SAE["training"] | {"max_steps": 5}}
        with pytest.raises(ValueError, match=r"holds the stages of a recipe with other settings: training.max_steps"):
            RecipeRun(Recipe.from_dict(other, "tiny-up1-t50"), whole, device="cpu").run()

    def test_a_probe(self, tmp_path: Path) -> None:
        result = RecipeRun(Recipe.from_dict(PROBE, "tiny-up1-t50-fashion"), tmp_path, device="cpu").run()
        probe = DiffusionProbe.from_pretrained(result.artifact)
        assert probe.metrics["test"]["rows"] == probe.metrics["validation"]["rows"] == 60
        assert probe.metrics["data"]["validation_images"] == 60
        assert probe.config.id2label[0] == "T-shirt"


class TestDryRun:
    def test_of_an_embedded_model(self, tmp_path: Path) -> None:
        recipe = Recipe.read(ROOT / "hub_cards/tiny-sd-up1-t50.yaml")
        result = RecipeRun(recipe, tmp_path, device="cpu", dry_run=True).run()
        assert result.metrics["note"].startswith("A dry run with random weights and a few images")
        assert result.metrics["training"]["steps"] == 2
        with pytest.raises(ValueError, match="A dry run is not pushed"):
            RecipeRun(recipe, tmp_path, device="cpu", dry_run=True).run(push="owner/name")
        with pytest.raises(ValueError, match=r"other settings: .*dry_run"):
            RecipeRun(recipe, tmp_path, device="cpu").run()

    @pytest.mark.slow
    def test_sd15_at_its_true_size(self, tmp_path: Path) -> None:
        """860 million parameters at 512 px, 81,920 latents; in a process of its own, which gives its memory back."""
        command = [sys.executable, "-m", "diffusion_sae", "train", "--dry-run", "--json", "--output-dir"]
        recipe = ROOT / "hub_cards/sd15-up1-t25.yaml"
        done = subprocess.run([*command, tmp_path, "--recipe", recipe], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = json.loads(done.stdout)["metrics"]
        assert metrics["test"]["rows"] == 4 * 32 * 32
        assert metrics["data"]["dataset"] == "fashion-mnist-mini"
        card = (tmp_path / "artifact/README.md").read_text(encoding="utf-8")
        assert "81,920 latents over 1280 dimensions" in card
        assert "base_model" not in card


class TestCommand:
    @pytest.mark.slow
    def test_with_processes_that_accelerate_launches(self, tmp_path: Path) -> None:
        """Two processes make the files of one, but for what they round otherwise."""
        recipe = tmp_path / "tiny-up1-t50.yaml"
        recipe.write_text(json.dumps(SAE | {"data": SAE["data"] | {"limit": 8}}), encoding="utf-8")  # JSON is YAML
        options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
        command = [*launch, "-m", "diffusion_sae", "train", "--recipe", str(recipe), "--device", "cpu"]
        done = subprocess.run(
            [*command, "--output-dir", str(tmp_path / "run")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        sae = KSparseAutoencoder.from_pretrained(tmp_path / "run/artifact")
        assert sae.metrics["test"]["rows"] == 8 * 16
        assert sae.latents is not None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--recipe x.yaml --k 4", "A recipe says how it is made; it cannot be given k as well"),
            ("some/store --recipe x.yaml", "it cannot be given store as well"),
            ("some/store --push owner/name --output-dir x", "--push belong to --recipe"),
            ("--output-dir x", "train needs a feature store, made by `diffusion-sae extract`, or --recipe"),
        ],
    )
    def test_what_it_refuses(self, options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", *options.split()]) == 1
        assert message in capsys.readouterr().err
