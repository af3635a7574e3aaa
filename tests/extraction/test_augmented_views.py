"""Augmented views: where they are cut, what they depend on, and how a store keeps them."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_sae import FeatureStore
from diffusion_sae.extraction.images import image_id, load_image
from diffusion_sae.extraction.views import cut_views, draw_view, view_id
from diffusion_sae.features.layout import read_header
from diffusion_sae.provenance import ExtractorConfig, ProvenanceMismatchError

LAYERS = ("bottleneck", "up_ft1")
Make = Callable[..., Any]


def config(**settings: Any) -> ExtractorConfig:
    return ExtractorConfig(**({"views": 3} | settings))


class TestGeometry:
    def test_the_distribution_is_that_of_random_resized_crops(self) -> None:
        """Area U(0.8, 1) and log-proportion U(log 3/4, log 4/3), given that the crop fits; half are mirrored."""
        size = (500, 400)
        drawn = [draw_view(size, config(), f"image {i}", 1) for i in range(4000)]
        boxes = np.array([view.box for view in drawn])
        widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        area, proportion = widths * heights / (size[0] * size[1]), widths / heights
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2] <= size[0]).all()
        assert (boxes[:, 3] <= size[1]).all()
        assert 0.8 <= area.min() < 0.81
        assert 0.98 < area.max() <= 1
        assert proportion.min() >= 0.75
        assert proportion.max() <= 4 / 3 + 1e-9
        rng = np.random.default_rng(0)  # the same by rejection
        areas, logs = rng.uniform(0.8, 1, 200_000), rng.uniform(math.log(0.75), math.log(4 / 3), 200_000)
        w, h = np.sqrt(areas * 200_000 * np.exp(logs)), np.sqrt(areas * 200_000 / np.exp(logs))
        fits = (w <= size[0]) & (h <= size[1])
        whole = (1 - fits.mean()) ** 10  # the middle that is taken after ten attempts is all of this image
        assert (area > 1 - 1e-9).mean() == pytest.approx(whole, abs=0.02)
        for ours, theirs, middle in ((area, areas, 1), (np.log(proportion), logs, math.log(1.25))):
            expected = (1 - whole) * theirs[fits].mean() + whole * middle
            assert ours.mean() == pytest.approx(expected, abs=4 * ours.std() / 4000**0.5)
        cut = area < 1 - 1e-9
        place = boxes[cut, 0] / (size[0] - widths[cut])
        assert place.mean() == pytest.approx(0.5, abs=4 * 0.29 / 4000**0.5)
        assert np.mean([view.flip for view in drawn]) == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)

    @pytest.mark.parametrize(
        ("size", "box"), [((300, 100), (250 / 3, 0, 650 / 3, 100)), ((60, 400), (0, 160, 60, 240))]
    )
    def test_of_a_strip_the_middle_is_taken(self, size: tuple[int, int], box: tuple[float, ...]) -> None:
        """No crop of 80 % of it has proportions between 3:4 and 4:3."""
        assert draw_view(size, config(), "strip", 1).box == pytest.approx(box)

    def test_a_view_depends_on_seed_image_and_number_alone(self) -> None:
        def drawn(image: str = "a", number: int = 1, **settings: Any) -> Any:
            return draw_view((64, 64), config(**settings), image, number)

        assert drawn() == drawn(views=9, pooling="none", timesteps=(100,))
        assert len({drawn(), drawn("b"), drawn(number=2), drawn(seed=1)}) == 4
        assert not any(drawn(f"{i}", view_flip=False).flip for i in range(50))
        assert drawn(view_flip=False).box == drawn().box

    def test_pixels_are_those_of_a_crop(self, images: list[Image.Image]) -> None:
        """A picture in which each pixel says where it is, so that the crop can be read off."""
        x, y = np.meshgrid(np.arange(256), np.arange(256))
        image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
        settings = config(views=8, resample="bilinear")
        for number, pixels in enumerate(cut_views(image, 64, "ramp", settings), 1):
            view = draw_view(image.size, settings, "ramp", number)
            left, top, right, bottom = view.box
            columns, rows = ((pixels[i] + 1) * 127.5 for i in (0, 1))
            across = torch.linspace(left, right, 129)[1::2] - 0.5  # centres of the 64 pixels
            expected = across.flip(0) if view.flip else across
            torch.testing.assert_close(columns[:, 2:-2], expected[2:-2].expand(64, -1), atol=1.1, rtol=0)
            down = torch.linspace(top, bottom, 129)[1::2] - 0.5
            torch.testing.assert_close(rows[2:-2], down[2:-2, None].expand(-1, 64), atol=1.1, rtol=0)


@pytest.fixture(scope="module")
def store(make_sd_extractor: Make, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    extractor = make_sd_extractor(layers=LAYERS, timesteps=(25, 100), seed=3, views=2)
    return extractor.extract(image_folder, tmp_path_factory.mktemp("views"), shard_size=5, progress=False)


class TestStores:
    def test_the_plain_images_are_as_without_views(
        self, store: FeatureStore, make_sd_extractor: Make, image_folder: Path, tmp_path: Path
    ) -> None:
        plain = make_sd_extractor(layers=LAYERS, timesteps=(25, 100), seed=3)
        without = plain.extract(image_folder, tmp_path, shard_size=5, progress=False)
        for layer in LAYERS:
            for t in (25, 100):
                mine, theirs = store.select(layer, t), without.select(layer, t)
                assert torch.equal(mine.to_tensor(), theirs.to_tensor())
                assert mine.provenance == theirs.provenance
                assert mine.fingerprint() == theirs.fingerprint()
        assert store.provenance.fingerprint != without.provenance.fingerprint

    def test_views_are_features_of_the_cut_images_with_noise_of_their_own(
        self, store: FeatureStore, make_sd_extractor: Make, image_folder: Path
    ) -> None:
        extractor = make_sd_extractor(layers=LAYERS, timesteps=(25, 100), seed=3)
        for row in (0, 7, 11):
            image = load_image(image_folder / store.sources[row])
            name = image_id(extractor.preprocess(image)[0])
            assert name == store.image_ids[row]
            for number, pixels in enumerate(cut_views(image, 32, name, store.provenance), 1):
                expected = extractor.features_of(pixels[None], [view_id(name, number)])
                for (layer, t), value in expected.items():
                    got = store.select(layer, t, view=number)[row : row + 1]
                    torch.testing.assert_close(got, value, atol=1e-5, rtol=1e-4)
                    assert not torch.allclose(got, store.select(layer, t)[row : row + 1], atol=1e-3)

    def test_batch_order_and_shards_do_not_count(
        self, store: FeatureStore, make_sd_extractor: Make, image_folder: Path, tmp_path: Path
    ) -> None:
        files = [image_folder / store.sources[row] for row in range(11, -1, -1)]
        extractor = make_sd_extractor(layers=LAYERS, timesteps=(25, 100), seed=3, views=3)
        again = extractor.extract(files, tmp_path, batch_size=4, progress=False)
        for number in (1, 2):
            mine, theirs = store.select("up_ft1", 25, view=number), again.select("up_ft1", 25, view=number)
            torch.testing.assert_close(theirs.to_tensor().flip(0), mine.to_tensor(), atol=1e-5, rtol=1e-4)

    def test_what_the_files_hold(self, store: FeatureStore) -> None:
        header, _ = read_header(store.path / "shard-00000.safetensors")
        names = {f"{layer}@{t}{view}" for layer in LAYERS for t in (25, 100) for view in ("", "|view 1", "|view 2")}
        assert set(header) - {"__metadata__"} == names
        store.verify()
        assert store.num_views == 2
        assert "2 views" in store.provenance.describe()
        columns = store.to_dataset("up_ft1", 25, cache_dir=store.path / "arrow").column_names
        assert [name for name in columns if "@" in name] == ["up_ft1@25"]

    def test_a_view_is_no_plain_image(self, store: FeatureStore) -> None:
        view, plain = store.select("up_ft1", 25, view=1), store.select("up_ft1", 25)
        assert view.provenance.plain() == plain.provenance
        assert view.provenance.fingerprint != plain.provenance.fingerprint
        assert torch.equal(view.image_labels, plain.image_labels)
        aligned = store.aligned(view=2)
        assert torch.equal(aligned["up_ft1", 100].to_tensor(), store.select("up_ft1", 100, view=2).to_tensor())
        assert aligned.provenance.views == 2
        with pytest.raises(ValueError, match="view must be an integer in 0…2, got 3"):
            store.select("up_ft1", 25, view=3)

    def test_a_run_that_stopped_goes_on(
        self, store: FeatureStore, make_sd_extractor: Make, image_folder: Path, tmp_path: Path
    ) -> None:
        extractor = make_sd_extractor(layers=LAYERS, timesteps=(25, 100), seed=3, views=2)
        extractor.extract(image_folder, tmp_path, shard_size=5, progress=False)
        for suffix in ("safetensors", "parquet", "json"):
            (tmp_path / f"shard-00001.{suffix}").unlink()
        extractor.extract(image_folder, tmp_path, shard_size=5, progress=False)
        for file in tmp_path.iterdir():
            assert file.read_bytes() == (store.path / file.name).read_bytes(), file.name

    def test_other_views_in_the_same_folder_are_refused(
        self, store: FeatureStore, make_sd_extractor: Make, image_folder: Path
    ) -> None:
        for changed, differ in (({"views": 3}, "views"), ({"views": 0}, "views"), ({"view_area": 0.5}, "view_area")):
            settings = {"layers": LAYERS, "timesteps": (25, 100), "seed": 3, "views": 2} | changed
            with pytest.raises(ProvenanceMismatchError, match=f"differ in {differ}"):
                make_sd_extractor(**settings).extract(image_folder, store.path, shard_size=5, progress=False)

    def test_a_broken_image_is_left_out_with_its_views(
        self, make_sd_extractor: Make, images: list[Image.Image], tmp_path: Path
    ) -> None:
        for i in range(3):
            images[i].save(tmp_path / f"{i}.png")
        (tmp_path / "1.png").write_bytes(b"no image")
        extractor = make_sd_extractor(layers=LAYERS, timesteps=(25,), views=1)
        store = extractor.extract(tmp_path, tmp_path / "store", skip_broken=True, progress=False)
        assert len(store) == len(store.select("up_ft1", 25, view=1)) == 2
        assert [entry["source"] for entry in store.skipped] == ["1.png"]


class TestRefused:
    def test_tensors_are_not_cut(self, make_sd_extractor: Make, tmp_path: Path) -> None:
        extractor = make_sd_extractor(layers=LAYERS, views=1)
        with pytest.raises(TypeError, match="Views are cut out of images, and these data are tensors"):
            extractor.extract([torch.zeros(3, 32, 32)], tmp_path, progress=False)

    def test_streams_have_none(self, make_sd_extractor: Make, image_folder: Path) -> None:
        with pytest.raises(ValueError, match="Views are of stores"):
            make_sd_extractor(layers=LAYERS, views=1).stream(image_folder, "up_ft1", 25, batch_size=4)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"views": -1}, "views must be an integer ≥ 0, got -1"),
            ({"views": 2, "view_area": 0}, "view_area must be a number > 0 and ≤ 1, got 0"),
            ({"views": 2, "view_flip": "no"}, "view_flip must be one of True, False, got 'no'"),
            ({"view_area": 0.5, "view_flip": False}, "view_area and view_flip are of views, of which there are none"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ExtractorConfig(**settings)


def test_one_call_gives_the_plain_image(make_sd_extractor: Make, images: list[Image.Image]) -> None:
    settings = {"layers": LAYERS, "timesteps": (25,)}
    with_views, without = make_sd_extractor(**settings, views=2), make_sd_extractor(**settings)
    assert torch.equal(with_views(images[:2])["up_ft1", 25], without(images[:2])["up_ft1", 25])
    assert dataclasses.replace(with_views.provenance, views=0) == without.provenance
