"""The files of a report, read as the page reads them."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_report import CLASSES, HOSTILE, IMAGES, SIDE, TIMESTEPS, Made, make_report, pictures

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, encode_features
from diffusion_sae import report as package
from diffusion_sae.extraction.sources import ImageSource
from diffusion_sae.features import FeatureSet
from diffusion_sae.report.build import Report, files_of, write_report
from diffusion_sae.report.grids import Grid
from diffusion_sae.report.latents import OF_IMAGE, Dictionary, Labels
from diffusion_sae.report.packing import DataFolder, clean
from diffusion_sae.report.samples import RANDOM, SAMPLES, TOP
from diffusion_sae.report.thumbnails import seen, write_thumbnails
from diffusion_sae.sae.sparse_codes import SparseCodes

STATIC, SOURCES = (Path(package.__file__).parent / name for name in ("static", "page"))


@dataclass
class Content:
    text: Any
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def read(path: Path) -> Content:
    """The file's only call, `report(name, header, packed)`."""
    match = re.fullmatch(r'report\((".+?"),(\{.*\}),"([\w+/=]*)"\);\n', path.read_text(encoding="ascii"), re.DOTALL)
    assert match
    header, body = json.loads(match[2]), zlib.decompress(base64.b64decode(match[3])) if match[3] else b""
    content, offset = Content(header["text"]), 0
    for name, kind, shape in header["arrays"]:
        size = int(np.prod(shape))
        content.arrays[name] = np.frombuffer(body, kind, size, offset).reshape(shape)
        offset += -(-content.arrays[name].nbytes // 4) * 4
    return content


@pytest.fixture(scope="module")
def data(made: Made) -> Callable[[str], Content]:
    return lambda name: read(files_of(made.folder) / "data" / f"{name}.js")


def test_the_bundle_is_made_of_these_sources() -> None:
    """What is committed in static/ was made of what is committed in page/: `make page` makes it anew."""
    record = json.loads((STATIC / "hashes.json").read_text())
    present = {path.name for path in SOURCES.iterdir() if path.suffix in (".js", ".mjs", ".css", ".html", ".json")}
    assert set(record["sources"]) == present
    for folder, kind in ((SOURCES, "sources"), (STATIC, "made")):
        for name, digest in record[kind].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, f"{name}: run `make page`"
    assert {path.name for path in STATIC.iterdir()} == {*record["made"], "hashes.json"}
    assert not re.search(r"\beval\(|new Function\(", (STATIC / "browser.js").read_text())


def test_table_of_latents(made: Made, data: Callable[[str], Content]) -> None:
    table, acts = data("sae0/latents").arrays, made.acts.max((0, 2))  # (images, num_latents)
    living = np.flatnonzero(acts.max(0))
    np.testing.assert_array_equal(table["index"], living)
    np.testing.assert_allclose(table["density"], (acts > 0).mean(0)[living], rtol=1e-6)
    np.testing.assert_array_equal(table["max"], acts.max(0)[living])
    for row, latent in enumerate(living.tolist()):
        order = np.argsort(-acts[:, latent], kind="stable")
        firing = order[: int((acts[:, latent] > 0).sum())]
        np.testing.assert_array_equal(table["top"][row][: len(firing)], firing[:6])
        top = made.labels[order[:10]]
        if len(firing) >= 10:
            assert table["purity"][row] == pytest.approx(np.bincount(top).max() / 10)
            assert (top == table["label"][row]).sum() == np.bincount(top).max()
        else:
            assert np.isnan(table["purity"][row])
            assert table["label"][row] == -1


def test_blocks_of_latents(made: Made, data: Callable[[str], Content]) -> None:
    acts, maps = made.acts.max((0, 2)), made.acts.max(0)  # (images, latents), (images, positions, latents)
    living = np.flatnonzero(acts.max(0))
    for row, latent in enumerate(living.tolist()):
        block, i = data(f"sae0/latents-{row // 64:04d}").arrays, row % 64
        images, firing = block["images"][i], np.flatnonzero(acts[:, latent])
        assert len(images) == SAMPLES
        for place, image in enumerate(images.tolist()):
            if image < 0:
                continue
            assert block["acts"][i][place] == acts[image, latent] > 0
            own = maps[image, :, latent]
            np.testing.assert_array_equal(block["maps"][i][place], np.ceil(255 * (own / own.max())))
        assert (images[:TOP] >= 0).sum() == min(TOP, len(firing))
        drawn = images[SAMPLES - RANDOM :]
        assert len(set(drawn[drawn >= 0])) == min(RANDOM, len(firing))
        assert block["histogram"][i].sum() == len(firing)
        np.testing.assert_array_equal(block["classes"][i], np.bincount(made.labels[firing], minlength=len(CLASSES)))
        np.testing.assert_allclose(block["rate"][i], (made.acts.max(2)[:, :, latent] > 0).mean(1), rtol=1e-6)
        assert latent not in block["similar"][i]
        assert latent not in block["together"][i]


def test_samples_of_quarters_come_from_their_quarter(made: Made, data: Callable[[str], Content]) -> None:
    acts = made.acts.max((0, 2))
    table = data("sae0/latents").arrays
    row = int(table["density"].argmax())
    ranked = np.argsort(-acts[:, table["index"][row]], kind="stable")[: int((acts[:, table["index"][row]] > 0).sum())]
    block = data(f"sae0/latents-{row // 64:04d}").arrays
    for i, quarter in enumerate(np.array_split(ranked, 4)):
        assert set(block["images"][row % 64][TOP + 3 * i : TOP + 3 * i + 3]) <= set(quarter.tolist())


def test_blocks_of_images(made: Made, data: Callable[[str], Content]) -> None:
    acts, maps = made.acts.max((0, 2)), made.acts.max(0)
    for image in range(IMAGES):
        block, i = data(f"sae0/images-{image // 64:04d}").arrays, image % 64
        order = np.argsort(-acts[image], kind="stable")[: min(OF_IMAGE, int((acts[image] > 0).sum()))]
        np.testing.assert_array_equal(block["acts"][i][: len(order)], acts[image, order])
        np.testing.assert_array_equal(block["latents"][i][: len(order)], order)
        for place, latent in enumerate(order.tolist()):
            own = maps[image, :, latent]
            np.testing.assert_array_equal(block["maps"][i][place], np.ceil(255 * (own / own.max())))


def test_class_moments_are_shares_of_the_largest_activation(made: Made, data: Callable[[str], Content]) -> None:
    acts = made.acts.max((0, 2))
    living = np.flatnonzero(acts.max(0))
    shares = acts[:, living] / acts[:, living].max(0)
    moments = data("sae0/classes-0000").arrays
    for label in range(len(CLASSES)):
        own = shares[made.labels == label]
        np.testing.assert_allclose(moments["mean"][label] / 65535, own.mean(0), atol=1e-5)
        np.testing.assert_allclose(moments["std"][label] / 65535, own.std(0), atol=1e-4)
    np.testing.assert_allclose(data("sae0/classes-all").arrays["mean"][0] / 65535, shares.mean(0), atol=1e-5)


def test_summary(made: Made, data: Callable[[str], Content]) -> None:
    report = data("report").text
    (sae,) = report["saes"]
    assert sae["living"] == int((made.acts.max((0, 1, 2)) > 0).sum())
    assert sae["l0"] == pytest.approx((made.acts > 0).sum() / np.prod(made.acts.shape[:3]))
    assert sae["grid"] == [SIDE, SIDE]
    assert sae["timesteps"] == list(TIMESTEPS)
    assert sae["purity"] > sae["shuffledPurity"]
    assert report["classes"] == list(CLASSES)
    assert report["sheets"] == {"count": IMAGES, "side": 80, "across": 16, "crisp": False}
    names = data("images").text["names"]
    assert names[4] == "square/004.png"
    browse = json.loads((files_of(made.folder) / "browse.json").read_text())
    assert browse["saes"]["sae0"]["path"] == str(made.sae_path)
    assert (
        str(made.sae_path) not in (files_of(made.folder) / "data/report.js").read_text()
    )  # no path leaves the machine


def test_thumbnails_are_the_images(made: Made) -> None:
    sheet = np.asarray(Image.open(files_of(made.folder) / "data/sheet-0000.webp"), np.float32)
    for i, image in enumerate(pictures(IMAGES, 80)):
        left, top = i % 16 * 80, i // 16 * 80
        assert np.abs(sheet[top : top + 80, left : left + 80] - np.asarray(image, np.float32)).mean() < 6, i


def test_many_sheets_and_small_images(tmp_path: Path) -> None:
    images = [Image.new("L", (28, 28), i % 256) for i in range(300)]
    source = ImageSource([str(i) for i in range(300)], images.__getitem__, [None] * 300, None)
    sheets = write_thumbnails(tmp_path, source)
    assert (sheets.side, sheets.crisp) == (28, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet-0000.webp", "sheet-0001.webp"]
    second = Image.open(tmp_path / "sheet-0001.webp")
    assert second.getpixel((5 * 28 + 3, 28 + 3))[0] == (256 + 16 + 5) % 256  # lossless


def test_thumbnails_show_the_square_that_the_model_saw() -> None:
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste("red", (20, 0, 40, 20))
    assert seen(wide, 20).getcolors() == [(400, (255, 0, 0))]
    assert len(seen(wide, 20, "none").getcolors()) > 1
    assert seen(torch.full((3, 4, 4), -1.0), 4).getcolors() == [(16, (0, 0, 0))]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_cleaned(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned) == min(300, len(text))
    changed = [old for old, new in zip(text[:299], cleaned, strict=False) if old != new]
    assert set(changed) <= set("\x00\x1b\ud800")
    cleaned.encode()  # no broken Unicode


def test_hostile_texts_stay_within_their_strings(hostile: Made) -> None:
    for path in files_of(hostile.folder).rglob("*.js"):
        if path.parent.name == "data" or path.parent.name == "sae0":
            read(path)  # one call whose arguments are JSON, all of it ASCII
    assert read(files_of(hostile.folder) / "data/report.js").text["classes"] == [clean(text) for text in HOSTILE]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    first = make_report(tmp_path)
    before = files_of(first.folder)
    second = make_report(tmp_path)
    assert files_of(second.folder) != before
    assert not before.exists()
    assert [path.name for path in tmp_path.joinpath("report").iterdir() if path.name != "index.html"] == [
        files_of(second.folder).name
    ]


def test_what_cannot_be_shown_is_refused(made: Made, tmp_path: Path) -> None:
    source = ImageSource([""] * 3, pictures(3, 8).__getitem__, [None] * 3, None)
    with pytest.raises(ValueError, match="at least one SAE"):
        write_report(tmp_path, Report("x", source), [])
    one = Dictionary("x", made.sae, SparseCodes(made.folder.parent / "encoded"))
    with pytest.raises(ValueError, match="are of 90 images, the data have 3"):
        write_report(tmp_path, Report("x", source), [one])
    right = ImageSource([""] * IMAGES, pictures(IMAGES, 8).__getitem__, [None] * IMAGES, None)
    with pytest.raises(ValueError, match="labels must have one entry an image: 90 images, 2 entries"):
        write_report(tmp_path, Report("x", right, labels=Labels(np.zeros(2, int), ["a"])), [one])
    with pytest.raises(ValueError, match="one row a layer, one cell a timestep"):
        Grid("x", ["a"], [1, 2], [[0.5]])
    (tmp_path / "index.html").write_text("my own page")
    with pytest.raises(ValueError, match="is of something else"):
        write_report(tmp_path, Report("x", right), [one])
    with pytest.raises(FileNotFoundError, match="holds no report"):
        files_of(tmp_path / "nothing")
    with pytest.raises(ValueError, match="of the type float64; a page reads"):
        DataFolder(tmp_path).write("x", None, {"a": np.zeros(1)})


def test_a_dead_sae_has_no_report(tmp_path: Path) -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=4, num_latents=8, k=2)).eval()
    sae.b_enc.data.fill_(-1e6)
    encoded = encode_features(sae, FeatureSet([torch.randn(3, 4)]), tmp_path / "encoded", progress=False)
    source = ImageSource([""] * 3, pictures(3, 8).__getitem__, [None] * 3, None)
    with pytest.raises(ValueError, match="No latent of 'dead' fires on these images"):
        write_report(tmp_path / "report", Report("x", source), [Dictionary("dead", sae, encoded)])
    assert not (tmp_path / "report/index.html").exists()


def test_without_labels_and_grid(tmp_path: Path) -> None:
    """Pooled features of images without labels: no classes, no heat maps."""
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=4, num_latents=8, k=2)).eval()
    encoded = encode_features(sae, FeatureSet([torch.randn(20, 4)]), tmp_path / "encoded", progress=False)
    source = ImageSource([str(i) for i in range(20)], pictures(20, 8).__getitem__, [None] * 20, None)
    write_report(tmp_path / "report", Report("x", source), [Dictionary("x", sae, encoded)])
    report = read(files_of(tmp_path / "report") / "data/report.js").text
    assert report["classes"] is None
    assert report["saes"][0]["grid"] is None
    block = read(files_of(tmp_path / "report") / "data/sae0/latents-0000.js").arrays
    assert "maps" not in block
    assert block["classes"].shape[1] == 0
