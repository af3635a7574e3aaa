"""Labels from a table: in the order of the images, of each problem type, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffusion_sae.features.label_files import read_label_file

IMAGES = ["a/1.png", "b/2.png", "007"]
CLASSES = "image,kind\n007,dog\na/1.png,cat\nother.png,bird\nb/2.png,dog\n"
SEVERAL = "image,striped,red\nb/2.png,0,1\n007,1,1\na/1.png,0,0\n"
NUMBERS = "image,age\na/1.png,1.5\nb/2.png,-2\n007,3\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_classes(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, CLASSES)
    if kind == "parquet":
        path = tmp_path / "labels.parquet"
        names = ["007", "a/1.png", "other.png", "b/2.png"]
        pq.write_table(pa.table({"image": names, "kind": ["dog", "cat", "bird", "dog"]}), path)
    found = read_label_file(path, IMAGES, "single_label_classification")
    assert found.values.tolist() == [0, 1, 1]
    assert found.names == ["cat", "dog"], "those of the images alone"
    given = read_label_file(path, IMAGES[:1], "single_label_classification", ["dog", "cat"])
    assert given.values.tolist() == [1]


def test_numbers_as_classes_are_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, "image,kind\na/1.png,10\nb/2.png,9\n007,10\n")
    found = read_label_file(path, IMAGES, "single_label_classification")
    assert (found.names, found.values.tolist()) == (["9", "10"], [1, 0, 1])


def test_several_labels_an_image(tmp_path: Path) -> None:
    path = write(tmp_path, SEVERAL)
    found = read_label_file(path, IMAGES, "multi_label_classification")
    assert found.names == ["striped", "red"]
    assert torch.equal(found.values, torch.tensor([[0.0, 0], [0, 1], [1, 1]]))
    other = read_label_file(path, IMAGES, "multi_label_classification", ["red", "striped"])
    assert torch.equal(other.values, found.values.flip(1))


def test_numbers(tmp_path: Path) -> None:
    found = read_label_file(write(tmp_path, NUMBERS), IMAGES, "regression")
    assert found.values.tolist() == [[1.5], [-2.0], [3.0]]
    assert found.names == ["age"]


@pytest.mark.parametrize(
    ("text", "problem_type", "message"),
    [
        ("name,kind\na,b\n", "regression", "must have the column 'image' and at least one of labels, got name, kind"),
        ("image\na/1.png\n", "regression", "at least one of labels"),
        ("image,x\na/1.png,1\n", "regression", r"no row of 2 of the 3 images, such as b/2\.png, 007.*such as a/1\.png"),
        (NUMBERS + "007,4\n", "regression", "several rows of 007"),
        (NUMBERS, "multi_label_classification", r"must have 0 and 1 for each label, got others, such as \[1\.5\]"),
        (CLASSES, "regression", "has string in the column 'kind', where numbers are needed"),
        (SEVERAL, "single_label_classification", "one class an image is one column. For several labels"),
        (NUMBERS.replace("-2", ""), "regression", "images without a value in age"),
        (NUMBERS.replace("-2", "inf"), "regression", "NaN or infinite"),
        ("image,x\na,1,2\n", "regression", "cannot be read as CSV"),
        (NUMBERS, "ranking", "problem_type must be one of"),
    ],
)
def test_what_is_refused(text: str, problem_type: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_label_file(write(tmp_path, text), IMAGES, problem_type)


def test_labels_that_the_training_images_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes that the training images do not have: dog"):
        read_label_file(write(tmp_path, CLASSES), IMAGES, "single_label_classification", ["cat"])
    with pytest.raises(ValueError, match="lacks the columns blue that the training images have"):
        read_label_file(write(tmp_path, SEVERAL), IMAGES, "multi_label_classification", ["red", "blue"])
