"""Plans: nothing is done, published sizes are right, and what is not known is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from diffusion_sae import SweepConfig
from diffusion_sae.analysis.sweep.fit_cost import EFFICIENCY, STEP_SECONDS, fit_seconds
from diffusion_sae.analysis.sweep.plan import describe, plan
from diffusion_sae.analysis.sweep.published import BY_ID, published_model
from diffusion_sae.analysis.sweep.specs import HeadSpec
from diffusion_sae.cli.main import main
from diffusion_sae.extraction.hooks import ImageStream, run_until_captured
from diffusion_sae.extraction.published import DIT_XL_2, SD15_UNET

ROOT = Path(__file__).parents[2]
PAPER = sorted((ROOT / "examples" / "paper").glob("*.yaml"))


def config(tmp_path: Path, **changes: Any) -> SweepConfig:
    return SweepConfig(output_dir=str(tmp_path / "out"), **changes)


def test_a_plan_does_nothing_and_counts_what_a_sweep_does(tmp_path: Path) -> None:
    worn = ["T-shirt", "pullover", "dress", "coat", "shirt", "trouser", "sandal", "sneaker", "ankle boot"]
    labels = ("label", {"name": "two", "groups": {"worn": worn, "carried": ["bag"]}})
    planned = plan(config(tmp_path, limit=50, labels=labels, weights=("trained", "random"), seeds=(0, 1, 2)))
    assert not list(tmp_path.iterdir())
    assert planned["images"] == {"train": 50, "validation": 50, "test": 50}
    assert (planned["cells"], planned["fits"]) == (2 * 3 * 2, 36)
    assert planned["disk_bytes"] == 2 * 150 * 3 * 144 * 4  # weights × images × timesteps × channels × bytes
    assert 0 < planned["extraction_seconds"] < 600
    text = describe(planned)
    assert "12 cells, 36 probes" in text
    assert "measured on this machine" in text


def test_fits_are_estimated_by_the_classes_of_each_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """emoji-mini has 8 groups and 70 subgroups."""
    monkeypatch.setattr("diffusion_sae.analysis.sweep.plan._matmul_flops", lambda: 1e11)
    coarse, both = (
        plan(config(tmp_path, dataset="emoji-mini", labels=labels, seeds=(0,)))
        for labels in (("label",), ("label", "subgroup"))
    )
    assert both["fit_seconds"]["linear"] > 2 * coarse["fit_seconds"]["linear"]
    other = plan(config(tmp_path, limit=10, heads=("linear", "knn")))
    assert "probes: linear about 0 s, knn about 0 s" in describe(other)


class TestTimeOfAFit:
    RATE = 1e11

    def seconds(self, head: str, images: int = 160, **options: Any) -> float:
        """On features of 8 channels and 64 positions, of two classes."""
        return fit_seconds(HeadSpec.parse({"head": head, **options}), 8, 64, images, 2, self.RATE)

    def test_of_an_mlp_by_hand(self) -> None:
        """8 → 4 → 2, batches of 16: two operations a weight and image forward, and four backward but for the first
        layer, whose input has no gradient."""
        forward, backward = 2 * 16 * (8 * 4 + 4 * 2), 2 * 16 * (8 * 4 + 2 * 4 * 2)
        expected = 30 * 10 * ((forward + backward) / (EFFICIENCY * self.RATE) + STEP_SECONDS)
        assert self.seconds("mlp", width=4) == pytest.approx(expected, rel=1e-9)

    def test_grows_with_epochs_images_and_width(self) -> None:
        one = self.seconds("diff-c", width=16)
        assert self.seconds("diff-c", width=16, num_train_epochs=60, cosine_epochs=90) == pytest.approx(2 * one)
        assert self.seconds("diff-c", width=16, images=320) == pytest.approx(2 * one)
        assert self.seconds("diff-c", width=64) > one
        assert self.seconds("attention", width=16) > 0

    def test_whole_activations_are_tokens_for_attention(self) -> None:
        assert self.seconds("attention", width=16, pooling="none") == self.seconds("attention", width=16)

    def test_a_map_of_one_position_is_not_taken_for_a_larger_one(self) -> None:
        one, many = (
            fit_seconds(HeadSpec.parse({"head": "diff-c", "width": 16}), 8, positions, 160, 2, self.RATE)
            for positions in (1, 64)
        )
        assert one < many


def test_memory_is_that_of_the_largest_cell(tmp_path: Path) -> None:
    """up_ft1 of tiny-sd has 96 channels at 4 × 4 positions."""
    common = {"limit": 50, "layers": ("up_ft1",)}
    pooled, whole = (plan(config(tmp_path, heads=heads, **common)) for heads in (("linear",), ("linear", "diff-c")))
    assert pooled["memory_bytes"] == 150 * 96 * 4  # images × channels × bytes
    assert whole["memory_bytes"] == 16 * pooled["memory_bytes"]
    views = plan(config(tmp_path, heads=("diff-c",), views=3, **common))
    assert views["memory_bytes"] == 2 * whole["memory_bytes"]  # 150 images, and 3 views of 50 of them
    assert "memory: " in describe(pooled)


def test_features_that_are_not_kept_need_the_disk_of_one_timestep(tmp_path: Path) -> None:
    kept, dropped = (plan(config(tmp_path, limit=10, keep_features=keep)) for keep in (True, False))
    assert kept["disk_bytes"] == 3 * dropped["disk_bytes"]
    assert len(dropped["extractions"]) == 3
    assert kept["cells"] == dropped["cells"]


def test_views_are_counted_where_a_head_takes_them(tmp_path: Path) -> None:
    plain, unused, used = (
        plan(config(tmp_path, limit=50, heads=heads, **views))
        for heads, views in ((("mlp",), {}), (("linear",), {"views": 3}), (("linear", "mlp"), {"views": 3}))
    )
    assert unused["disk_bytes"] == plain["disk_bytes"]
    assert used["disk_bytes"] == 2 * plain["disk_bytes"]  # 150 images, and 3 views of 50 of them


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    planned = plan(config(tmp_path, models=("owner/unknown",), dataset="owner/images", heads=("diff-c",)))
    assert planned["images"] == {"train": None, "validation": None, "test": None}
    assert planned["extraction_seconds"] is planned["disk_bytes"] is planned["fit_seconds"] is None
    text = describe(planned)
    assert "its config is not on this machine; 1280 channels" in text
    assert "give num_images" in text
    with pytest.raises(ValueError, match=r"num_images must have an entry a split \(train, validation, test\)"):
        plan(config(tmp_path, dataset="owner/images", num_images=(5,)))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_grids_can_be_planned_offline(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {model["model"] for model in content["models"]} == set(BY_ID)
    assert main(["sweep", "--config", str(path), "--plan"]) == 0
    text = capsys.readouterr().out
    assert "not estimated" not in text.replace("probes: not estimated", "")
    assert text.count("its published config") == 4


def test_there_is_a_grid_for_each_of_the_papers_data_sets() -> None:
    assert {path.stem for path in PAPER} == {"oxford-iiit-pet", "fgvc-aircraft", "caltech-101", "dtd", "flowers-102"}


def counted(kind: Any, settings: dict[str, Any], path: str, image_size: int, **given: Any) -> float:
    side = image_size // 8
    with torch.device("meta"):
        denoiser = kind(**settings)
        sample = torch.empty(1, 4, side, side)
    denoiser.to("meta").eval()
    arguments = {name: torch.zeros(*shape, dtype=dtype, device="meta") for name, (shape, dtype) in given.items()}
    tokens = (side // 2) ** 2 if "class_labels" in given else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_until_captured(
            denoiser,
            {"layer": path},
            lambda: denoiser(sample, timestep=torch.zeros(1, device="meta"), **arguments),
            ImageStream(tokens),
        )
    return counter.get_total_flops() / 1e9


def test_published_sizes() -> None:
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    sd, dit = published_model("stable-diffusion-v1-5/stable-diffusion-v1-5"), published_model("facebook/DiT-XL-2-256")
    assert sd is not None
    assert dit is not None
    text = {"encoder_hidden_states": ((1, 77, 768), torch.float32)}
    up = counted(UNet2DConditionModel, SD15_UNET, "up_blocks.1", 512, **text)
    assert sd.layers["up_ft1"].gflops == pytest.approx(up, rel=0.01)
    label = {"class_labels": ((1,), torch.long)}
    block = counted(DiTTransformer2DModel, DIT_XL_2, "transformer_blocks.14", 256, **label)
    assert dit.layers["block14"].gflops == pytest.approx(block, rel=0.01)
