"""Sheets of top images: what is on them, where the colour of an overlay lies, and that no text is cut off."""

import numpy as np
import pytest
import torch
from figure_checks import check_text, drawn_texts, texts
from PIL import Image

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.latents import latent_statistics
from diffusion_sae.extraction.sources import ImageSource, open_images
from diffusion_sae.features import FeatureSet
from diffusion_sae.report.figures.sheets import HEAT, LatentRow, firing_sheet, heat_overlay, top_image_sheet

IMAGES, NAMES = 12, ["left", "right"]


def test_an_overlay_is_coloured_where_the_latent_fires() -> None:
    for shade in (0, 128, 255):
        grey = Image.new("RGB", (32, 32), (shade,) * 3)
        overlay = heat_overlay(grey, np.array([[0.0, 2.0], [0.0, 0.0]]), side=80).astype(int)
        assert overlay.shape == (80, 80, 3)
        assert (overlay[60, 20] == shade).all()
        # outside of the middles of positions there is nothing to blend
        assert overlay[5, 75] == pytest.approx(0.1 * shade + 0.9 * np.array(HEAT), abs=1.5)


def test_an_overlay_is_seen_in_grey_too() -> None:
    """On a grey that is as light as the colour, the line round the region shows it."""
    shade = round(float(np.dot(HEAT, [0.299, 0.587, 0.114])))
    overlay = heat_overlay(Image.new("L", (32, 32), shade), np.array([[0.0, 2.0], [0.0, 0.0]]), side=80)
    grey = np.asarray(Image.fromarray(overlay).convert("L"))
    assert {0, 255} <= set(grey.flatten().tolist())
    region = np.argwhere(grey == 255)
    assert region[:, 0].max() < 45
    assert region[:, 1].min() > 35


def test_overlays_of_one_latent_are_of_one_scale() -> None:
    picture = Image.new("L", (8, 8), 255)
    weak = heat_overlay(picture, np.full((2, 2), 1.0), peak=4.0)
    strong = heat_overlay(picture, np.full((2, 2), 4.0), peak=4.0)
    assert (255 - weak[0, 0, 2]) * 4 == pytest.approx(255 - strong[0, 0, 2], abs=3)
    assert (heat_overlay(picture, np.zeros((2, 2)), peak=0.0) == 255).all()


@pytest.mark.parametrize("activation", [np.zeros(4), np.full((2, 2), np.nan)])
def test_an_overlay_of_no_grid(activation: np.ndarray) -> None:
    with pytest.raises(ValueError, match="activation must be a finite grid"):
        heat_overlay(Image.new("L", (8, 8)), activation)


def rows(count: int, images: int = 3, title: str = "latent", **more: object) -> list[LatentRow]:
    pictures = [Image.new("RGB", (20 + 10 * i, 30), (40 * i, 90, 200)) for i in range(images)]
    return [LatentRow(f"{title} {i}", pictures, ["a note"], [9.0, 8.5, 0.25][:images], **more) for i in range(count)]


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("maps", [None, np.ones((3, 2, 2))])
def test_a_sheet_shows_names_activations_and_images(count: int, maps: np.ndarray | None) -> None:
    figure = top_image_sheet(rows(count, maps=maps), title="a sheet")
    check_text(figure)
    assert texts(figure) == ["a sheet"] + [t for i in range(count) for t in (f"latent {i}", "a note", *ACTS)]
    assert len(figure.axes[0].images) == count * 3 * (1 if maps is None else 2)
    first = figure.axes[0].images[0]
    assert first.get_array().shape[:2] == (20, 20)  # the middle square
    figure.canvas.draw()
    assert all(picture.get_extent()[2] <= figure.get_figheight() for picture in figure.axes[0].images)


ACTS = ("9.00", "8.50", "0.250")


def test_long_and_hostile_names_stay_in_their_column() -> None:
    hostile = rows(2, title="a $very$ long \n name " * 40)
    figure = top_image_sheet(hostile, title="<script>$x_{$" * 50)
    check_text(figure)
    shown = drawn_texts(figure)[1]
    assert shown.get_text().endswith("…")
    assert r"\$very\$ long" in shown.get_text()
    assert shown.get_window_extent().x1 < figure.dpi * figure.axes[0].images[0].get_extent()[0]


def test_a_sheet_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one latent with an image"):
        top_image_sheet([])


@pytest.fixture
def sae() -> KSparseAutoencoder:
    return KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=24, k=4))


@pytest.fixture
def source() -> ImageSource:
    return open_images([Image.new("RGB", (16, 16), (20 * i, 0, 0)) for i in range(IMAGES)])


def features(positions: int = 4, labels: bool = True) -> FeatureSet:
    data = torch.randn(IMAGES * positions, 6, generator=torch.Generator().manual_seed(0))
    of_image = torch.arange(IMAGES) % 2 if labels else None
    return FeatureSet([data], rows_per_image=positions, labels=of_image, class_names=NAMES if labels else None)


@pytest.mark.parametrize(("positions", "labels"), [(4, True), (4, False), (1, True)])
def test_the_sheet_of_an_sae(sae: KSparseAutoencoder, source: ImageSource, positions: int, labels: bool) -> None:
    found = features(positions, labels)
    figure = firing_sheet(sae, found, source, count=3, columns=2, title="of an SAE")
    check_text(figure)
    statistics = latent_statistics(sae, found, 2)
    shown = [int(text.removeprefix("latent ")) for text in texts(figure) if text.startswith("latent ")]
    assert len(shown) == 3
    for latent in shown:
        assert f"{statistics.max_acts[latent].item():#.3g}" in texts(figure)
        assert f"fires on {100 * statistics.density[latent].item():.2g} % of images" in texts(figure)
    assert sum("of 2: " in text for text in texts(figure)) == (3 if labels else 0)
    assert len(figure.axes[0].images) == 6 * (2 if positions > 1 else 1)
    first = figure.axes[0].images[0].get_array()
    assert first[0, 0, 0] == 20 * int(statistics.top_images[shown[0], 0])


def test_chosen_and_named_latents(sae: KSparseAutoencoder, source: ImageSource) -> None:
    figure = firing_sheet(sae, features(), source, latents=[5, 2], names={2: "a snail"}, columns=3)
    assert [t for t in texts(figure) if t in ("latent 5", "latent 2", "a snail")] == ["latent 5", "a snail", "latent 2"]


def test_images_that_are_not_those_of_the_features(sae: KSparseAutoencoder, source: ImageSource) -> None:
    with pytest.raises(ValueError, match="features are of 12 images, the source has 5"):
        firing_sheet(sae, features(), source.first(5))
    silent = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=24, k=4))
    silent.b_enc.data -= 1e6
    with pytest.raises(ValueError, match="No latent fires on 8 of the 12 images"):
        firing_sheet(silent, features(), source)
