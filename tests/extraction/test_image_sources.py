"""Folders, Parquet, datasets and lists as one kind of sequence."""

import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from diffusion_sae.extraction.images import ImageError
from diffusion_sae.extraction.sources import ImageSource, open_images


def pixels(image):
    return np.asarray(image)


@pytest.fixture(scope="module")
def table(images):
    features = Features({"image": Image(), "label": ClassLabel(names=["bag", "dress", "shoe"])})
    return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(12)]}, features=features)


@pytest.mark.parametrize(("values", "kind"), [(["cat", "dog"], "string"), ([0.5, 1.5], "float64")])
def test_labels_that_are_no_classes_are_left_out_with_a_warning(images, values, kind, caplog):
    table = Dataset.from_dict({"image": images[:2], "label": values}).cast_column("image", Image())
    assert open_images(table).labels == [None, None]
    assert f"the column 'label' holds no class numbers but Value('{kind}')" in caplog.text
    assert "class_encode_column('label')" in caplog.text
    caplog.clear()
    open_images(table.remove_columns("label"))
    assert not caplog.text


def test_folder_of_classes(image_folder, images):
    source = open_images(image_folder)
    assert source.class_names == ["bag", "dress", "shoe"]
    assert source.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert source.names[:5] == [*(f"bag/image-{i:02d}.png" for i in range(3)), "bag/image-03.jpg", "dress/image-04.png"]
    assert len(source) == 12
    assert (pixels(source.read(4)) == pixels(images[4])).all()
    assert np.abs(pixels(source.read(3)).astype(int) - pixels(images[3])).max() < 40  # a JPEG
    assert open_images(str(image_folder)).names == source.names


def test_folder_without_classes(tmp_path, images):
    for name in ("b.png", "a.PNG", "c.jpeg", "d.bmp"):
        images[0].save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    images[0].save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "empty").mkdir()
    source = open_images(tmp_path)
    assert source.names == ["a.PNG", "b.png", "c.jpeg", "d.bmp"]
    assert source.labels == [None] * 4
    assert source.class_names is None


def test_nested_files_belong_to_their_class(tmp_path, images):
    for path in ("cats/2023/a.png", "cats/b.png", "dogs/c.png", "nothing/readme.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        images[0].save(tmp_path / path) if path.endswith("png") else (tmp_path / path).write_text("")
    source = open_images(tmp_path)
    assert source.names == ["cats/2023/a.png", "cats/b.png", "dogs/c.png"]
    assert source.labels == [0, 0, 1]
    assert source.class_names == ["cats", "dogs"]


def test_mixed_folder_is_refused(tmp_path, images):
    (tmp_path / "cats").mkdir()
    images[0].save(tmp_path / "cats" / "a.png")
    images[0].save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"holds images beside class folders \('cats', …\)\. Put every image"):
        open_images(tmp_path)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images\. Files ending in \.bmp, .*\.png.* count"):
        open_images(tmp_path)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="holds no images"):
        open_images(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/folder", "./nothing", "nothing.parquet", "nothing.png"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} does not exist\. Give a folder of images, a Parquet file"
    ):
        open_images(name)


def test_a_file_that_is_no_data_set(tmp_path, images):
    images[0].save(tmp_path / "one.png")
    (tmp_path / "notes.txt").write_text("")
    for name in ("one.png", "notes.txt"):
        with pytest.raises(ValueError, match=rf"{name} is no Parquet file\. Give a folder"):
            open_images(tmp_path / name)


def test_parquet(tmp_path, table, images):
    path = tmp_path / "images.parquet"
    table.to_parquet(str(path))
    source = open_images(path)
    assert source.class_names == ["bag", "dress", "shoe"]
    assert source.labels == [i % 3 for i in range(12)]
    assert source.names == [str(i) for i in range(12)]
    for i in range(12):
        assert (pixels(source.read(i)) == pixels(images[i])).all()


def test_dataset_with_class_labels(table, images):
    source = open_images(table)
    assert (source.labels, source.class_names) == ([i % 3 for i in range(12)], ["bag", "dress", "shoe"])
    assert (pixels(source.read(7)) == pixels(images[7])).all()
    assert source.read(7).mode == "RGB"


def test_dataset_with_integer_labels(images):
    source = open_images(Dataset.from_dict({"image": images[:3], "fine_label": [4, 9, 4]}))
    assert source.labels == [4, 9, 4]
    assert source.class_names is None


def test_dataset_without_labels(images):
    source = open_images(Dataset.from_dict({"image": images[:3], "caption": ["a", "b", "c"], "width": [32, 32, 32]}))
    assert source.labels == [None] * 3
    assert source.class_names is None


def test_which_columns_are_taken(images):
    features = Features(
        {"mask": Image(), "image": Image(), "label": Value("int64"), "species": ClassLabel(names=["x"])}
    )
    rows = {"mask": images[:1], "image": images[1:2], "label": [5], "species": [0]}
    source = open_images(Dataset.from_dict(rows, features=features))
    assert (pixels(source.read(0)) == pixels(images[1])).all()
    assert (source.labels, source.class_names) == ([0], ["x"])  # a ClassLabel before a bare number
    only = Dataset.from_dict({"picture": images[:1]})
    assert (pixels(open_images(only).read(0)) == pixels(images[0])).all()


def test_dataset_without_images(table):
    with pytest.raises(
        ValueError, match=r"the data set has no image column; its columns are \{'label': 'ClassLabel'\}"
    ):
        open_images(table.remove_columns("image"))


def test_empty_data(table):
    for empty in (table.select([]), []):
        with pytest.raises(ValueError, match="The data set is empty"):
            open_images(empty)


def test_a_broken_row_is_named(images, tmp_path):
    features = Features({"image": Image()})
    (tmp_path / "broken.png").write_bytes(b"nothing")
    rows = [images[0], {"bytes": b"nothing", "path": None}, None, str(tmp_path / "broken.png")]
    source = open_images(Dataset.from_dict({"image": rows}, features=features))
    assert source.read(0).size == (32, 32)
    with pytest.raises(ImageError, match="Cannot read the image 'row 1 of the data set'"):
        source.read(1)
    with pytest.raises(ImageError, match=r"'row 2 of the data set': an image cannot be a NoneType"):
        source.read(2)
    with pytest.raises(ImageError, match=r"Cannot read the image '.*broken\.png'"):
        source.read(3)


def test_list_of_many_kinds(image_folder, images):
    path = image_folder / "bag" / "image-00.png"
    tensor = torch.zeros(3, 32, 32)
    source = open_images([images[0], str(path), path, path.read_bytes(), pixels(images[0]), tensor])
    assert source.names == ["0", str(path), str(path), "3", "4", "5"]
    assert source.labels == [None] * 6
    for i in range(5):
        assert isinstance(source.read(i), PILImage.Image)
        assert (pixels(source.read(i)) == pixels(images[0])).all()
    assert source.read(5) is tensor
    with pytest.raises(ImageError, match=r"Cannot read the image '1': an image cannot be a int"):
        open_images([images[0], 7]).read(1)


def test_wrong_kinds(table, images):
    for wrong in (5, None, DatasetDict({"train": table}), (image for image in images), torch.zeros(2, 3, 32, 32)):
        name = type(wrong).__name__
        with pytest.raises(TypeError, match=rf"Images cannot come from a {name}\. Allowed: a folder, a Parquet file"):
            open_images(wrong)


def test_first(image_folder):
    source = open_images(image_folder)
    assert source.first(None) is source
    assert source.first(5).names == source.names[:5]
    assert source.first(5).labels == [0, 0, 0, 0, 1]
    assert len(source.first(100)) == 12
    assert open_images(source) is source
    assert isinstance(source, ImageSource)
