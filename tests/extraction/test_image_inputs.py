"""Every kind of image, good and bad, into pixel_values."""

import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusion_sae.extraction.images import (
    ImageError,
    check_pixel_values,
    image_id,
    load_image,
    preprocess,
    to_pixel_values,
)


def grey_steps(count=16):
    return np.linspace(0, 255, count * count).astype(np.uint8).reshape(count, count)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bad_files(images, tmp_path_factory):
    """Files that cannot be read, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    png, jpeg = encode(images[0], "PNG"), encode(images[0].resize((256, 256)), "JPEG")
    contents = {
        "truncated.png": png[: len(png) // 2],
        "flipped.png": png[:40] + bytes([png[40] ^ 255]) + png[41:],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "headless.jpg": jpeg[100:],
        "text.png": b"This is a text file, not an image.\n" * 20,
        "empty.png": b"",
        "zeros.png": bytes(1000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


BAD_FILES = (
    "truncated.png",
    "flipped.png",
    "truncated.jpg",
    "headless.jpg",
    "text.png",
    "empty.png",
    "zeros.png",
)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_named(bad_files, name):
    path = bad_files / name
    with pytest.raises(ImageError, match=rf"Cannot read the image '.*{name}': .*\. Repair or remove it, or use"):
        load_image(path)
    with pytest.raises(ImageError, match=rf"Cannot read the image '.*{name}'"):
        load_image(str(path))
    with pytest.raises(ImageError, match=rf"Cannot read the image '{name}'"):
        load_image({"bytes": path.read_bytes(), "path": name})
    with pytest.raises(ImageError, match=r"Cannot read the image 'row 7'"):
        load_image(path.read_bytes(), "row 7")


def test_a_lazily_opened_broken_image(bad_files):
    with (
        Image.open(bad_files / "truncated.jpg") as image,
        pytest.raises(ImageError, match=r"Cannot read the image 'the given image': .*truncated"),
    ):
        load_image(image)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ImageError, match=r"There is no image file '.*missing\.png'\. Check the path"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"Cannot read the image '.*': .*[Dd]irectory"):
        load_image(tmp_path)


def test_a_decompression_bomb_is_refused(monkeypatch, images):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=r"Cannot read the image 'the given image': .*decompression bomb"):
            load_image(encode(images[0], "PNG"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, r"an image cannot be a NoneType\. Allowed: a PIL image, a path"),
        (3, r"an image cannot be a int\. Allowed"),
        ({"picture": 1}, r"an image cannot be a dict\. Allowed"),
        ({"bytes": None, "path": None}, r"an image cannot be a NoneType"),
        (np.zeros((8, 8, 3)), r"an image cannot be a ndarray of shape \(8, 8, 3\) and type float64"),
        (np.zeros((8, 8, 2), np.uint8), r"an image cannot be a ndarray of shape \(8, 8, 2\) and type uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"an image cannot be a ndarray of shape \(2, 8, 8, 3\)"),
        (np.zeros(8, np.uint8), r"an image cannot be a ndarray of shape \(8,\)"),
        (torch.zeros(3, 8, 8), r"an image cannot be a Tensor of shape \(3, 8, 8\) and type torch.float32"),
    ],
)
def test_what_is_no_image(wrong, message):
    with pytest.raises(ImageError, match=message):
        load_image(wrong)


def test_an_image_of_a_list_is_named_by_its_number(images, bad_files):
    with pytest.raises(ImageError, match=r"Cannot read the image '1': an image cannot be a int"):
        to_pixel_values([images[0], 5], 32)
    with pytest.raises(ImageError, match=r"Cannot read the image '2'"):
        to_pixel_values([images[0], images[1], (bad_files / "text.png").read_bytes()], 32)
    with pytest.raises(ImageError, match=r"Cannot use the image '1': pixel_values hold NaN"):
        to_pixel_values([images[0], torch.full((3, 32, 32), torch.nan)], 32)
    with pytest.raises(ImageError, match=r"Image '0' of a list must have shape \(3, 32, 32\), got \(2, 3, 32, 32\)"):
        to_pixel_values([torch.zeros(2, 3, 32, 32)], 32)


def test_no_images(images):
    with pytest.raises(ImageError, match=r"Got no images: an empty list\. Give a PIL image"):
        to_pixel_values([], 32)
    with pytest.raises(ImageError, match=r"an image cannot be a int"):
        to_pixel_values(17, 32)
    for size in ((0, 0), (5, 0)):
        with pytest.raises(ImageError, match=rf"it has no pixels, its size is {size[0]} × {size[1]}"):
            to_pixel_values(Image.new("RGB", size), 32)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(32, 32), r"must have the shape \(B, 3, 32, 32\), got \(32, 32\)"),
        (torch.zeros(1, 32, 32), r"must have the shape \(B, 3, 32, 32\), got \(1, 32, 32\)"),
        (torch.zeros(2, 4, 32, 32), r"must have the shape \(B, 3, 32, 32\), got \(2, 4, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3), r"must have the shape \(B, 3, 32, 32\), got \(2, 32, 32, 3\)"),
        (torch.zeros(2, 3, 16, 16), r"must have the shape \(B, 3, 32, 32\), got \(2, 3, 16, 16\)"),
        (torch.zeros(0, 3, 32, 32), r"must have the shape \(B, 3, 32, 32\), got \(0, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"must be floating point in \[-1, 1\], got torch.uint8\. Scale"),
        (torch.full((2, 3, 32, 32), torch.nan), r"hold NaN or infinite values"),
        (torch.full((2, 3, 32, 32), torch.inf), r"hold NaN or infinite values"),
        (torch.full((2, 3, 32, 32), 255.0), r"must lie in \[-1, 1\], got values from 255 to 255"),
        (torch.full((2, 3, 32, 32), -1.1), r"must lie in \[-1, 1\], got values from -1.1 to -1.1"),
    ],
)
def test_tensors_that_are_no_pixel_values(tensor, message):
    with pytest.raises(ImageError, match=message):
        to_pixel_values(tensor, 32)


def test_tensors_pass_unchanged():
    batch = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(to_pixel_values(batch, 32), batch)
    assert torch.equal(to_pixel_values(batch[0], 32), batch[:1])
    assert torch.equal(to_pixel_values(list(batch), 32), batch)
    assert torch.equal(check_pixel_values(batch[:, :, :16, :8]), batch[:, :, :16, :8])


# What each mode is as RGB, from a definition and not from `to_rgb`


def test_grey_becomes_three_equal_channels():
    grey = grey_steps()
    rgb = np.asarray(load_image(Image.fromarray(grey)))
    assert (rgb == grey[..., None]).all()
    assert (np.asarray(load_image(grey)) == rgb).all()
    assert (np.asarray(load_image(grey[..., None])) == rgb).all()
    bits = Image.fromarray(grey > 127)
    assert bits.mode == "1"
    assert (np.asarray(load_image(bits)) == np.where(grey > 127, 255, 0)[..., None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    grey, alpha = grey_steps(), grey_steps().T.copy()
    bands = [Image.fromarray(grey)] * (len(mode) - 1)
    image = Image.merge(mode, [*bands, Image.fromarray(alpha)])
    opacity = alpha.astype(float) / 255
    expected = grey * opacity + 255 * (1 - opacity)
    for given in (image, encode(image, "PNG")):
        assert np.abs(np.asarray(load_image(given)).astype(float) - expected[..., None]).max() <= 1
    if mode == "RGBA":
        assert np.abs(np.asarray(load_image(np.asarray(image))).astype(float) - expected[..., None]).max() <= 1


def test_palette_with_and_without_transparency():
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0, 1, 2, 0, 1])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    expected = colours[np.array([[0, 1, 2, 0], [1, 2, 0, 1]])]
    assert (np.asarray(load_image(encode(image, "PNG"))) == expected).all()
    colours[1] = 255  # the second colour is transparent: white shows
    expected = colours[np.array([[0, 1, 2, 0], [1, 2, 0, 1]])]
    assert (np.asarray(load_image(encode(image, "PNG", transparency=1))) == expected).all()
    assert (np.asarray(load_image(encode(image, "GIF", transparency=1))) == expected).all()


def test_sixteen_bit_grey_keeps_its_tones():
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    png = encode(Image.fromarray(values), "PNG")
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode.startswith("I")  # PIL's own convert("RGB") would clip all but the darkest tones
    rgb = np.asarray(load_image(png))
    assert (rgb == np.arange(256).reshape(16, 16, 1)).all()
    assert (np.asarray(load_image(Image.fromarray(values.astype(np.int32)))) == rgb).all()


def test_floating_point_grey():
    values = np.linspace(0, 255, 256, dtype=np.float32).reshape(16, 16)
    assert (np.asarray(load_image(Image.fromarray(values))) == np.arange(256).reshape(16, 16, 1)).all()
    for bad in (values - 1, values * 2, np.full_like(values, np.nan)):
        with pytest.raises(ImageError, match=r"floating-point image must have values in 0…255"):
            load_image(Image.fromarray(bad))


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow ink: red
    for given in (image, encode(image, "JPEG"), encode(image, "TIFF")):
        red, green, blue = np.asarray(load_image(given)).reshape(-1, 3).mean(0)
        assert red > 200
        assert max(green, blue) < 60


def test_exif_rotation_is_applied(images):
    """Orientations 1 … 8 of one picture, as a camera writes them, are all seen upright."""
    upright = images[0].resize((16, 16)).crop((0, 0, 16, 10))
    transposed = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, operation in transposed.items():
        stored = upright if operation is None else upright.transpose(operation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        loaded = load_image(encode(stored, "PNG", exif=exif))
        assert (np.asarray(loaded) == np.asarray(upright)).all(), orientation
    assert ImageOps.exif_transpose(upright).size == (16, 10)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (500, 3), (31, 33), (32, 32), (64, 32)])
def test_every_size_becomes_a_square(size):
    """A single colour stays that colour, whatever the shape."""
    pixel_values = to_pixel_values(Image.new("RGB", size, (10, 100, 200)), 32)
    expected = torch.tensor([10, 100, 200]).view(1, 3, 1, 1) / 127.5 - 1
    torch.testing.assert_close(pixel_values, expected.expand(1, 3, 32, 32), atol=1e-6, rtol=0)


def test_a_long_strip_needs_no_more_memory_than_its_crop():
    strip = np.zeros((1, 60_000, 3), np.uint8)
    strip[0, 30_000] = 255  # about the middle: at 512 px the whole strip resized would have 16 gigapixels
    pixel_values = to_pixel_values(strip, 512)
    assert pixel_values.shape == (1, 3, 512, 512)
    assert pixel_values.max() == 1


def test_the_crop_is_central():
    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    assert (preprocess(image, 32) == 1).all()
    assert (preprocess(image.transpose(Image.Transpose.ROTATE_90), 32) == 1).all()


def test_an_image_of_the_right_size_is_not_resampled(images):
    pixels = np.asarray(images[0])
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(preprocess(images[0], 32), expected)
    assert preprocess(images[0], 32).min() >= -1


def test_resizing_is_bicubic_with_antialiasing():
    """A fine checkerboard shrinks to grey: nearest or non-antialiased resampling would keep black and white."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    pixel_values = preprocess(load_image(board.astype(np.uint8)), 32)
    assert pixel_values.abs().max() < 0.1


def test_image_ids(images):
    ids = [image_id(preprocess(image, 32)) for image in images]
    assert len(set(ids)) == len(images)
    assert all(len(name) == 32 for name in ids)
    pixel_values = preprocess(images[0], 32)
    assert image_id(pixel_values + 1e-4) == ids[0]  # rounding of a float pipeline is no other image
    for dtype in (torch.float64, torch.float16):
        assert image_id(pixel_values.to(dtype)) == ids[0]
    changed = pixel_values.clone()
    changed[0, 3, 4] = torch.where(changed[0, 3, 4] > 0, changed[0, 3, 4] - 2 / 255, changed[0, 3, 4] + 2 / 255)
    assert image_id(changed) != ids[0]
    assert image_id(pixel_values.reshape(3, 16, 64)) != ids[0]


def test_loading_leaves_the_original_alone(images):
    image = images[0].convert("RGBA")
    before = image.tobytes()
    load_image(image)
    to_pixel_values([image, image], 16)
    assert image.mode == "RGBA"
    assert image.tobytes() == before
    for a, b in itertools.pairwise(to_pixel_values([image, image], 16)):
        assert torch.equal(a, b)
