"""LatentTable: what it refuses, names, and that it travels with an SAE."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.sae.latent_table import SCHEMA, LatentRecord, LatentSource, LatentTable

SOURCE = LatentSource(num_images=9, images_per_latent=2, dataset="owner/images", split="train")
ROWS: dict[str, list[Any]] = {
    "latent_index": [0, 1, 2],
    "density": [0.5, 0.0, 1.0],
    "mean_activation": [1.5, 0.0, 2.0],
    "max_activation": [2.0, 0.0, 4.0],
    "top_image_ids": [["b", "a"], [], ["c", "a"]],
    "top_activations": [[2.0, 1.0], [], [4.0, 3.0]],
    "label": ["shoe", None, None],
    "purity": [1.0, None, None],
    "name": [None, None, "stripes"],
    "name_score": [None, None, 0.5],
}


def table(**changes: Any) -> LatentTable:
    return LatentTable(pa.table(ROWS | changes, schema=SCHEMA), SOURCE)


def sae(num_latents: int = 3) -> KSparseAutoencoder:
    return KSparseAutoencoder(KSparseAutoencoderConfig(d_in=2, num_latents=num_latents, k=1))


def test_names_are_labels_where_nobody_has_given_one() -> None:
    assert table().names() == {"0": "shoe", "2": "stripes"}
    assert table(purity=[0.5, None, None]).names() == {"2": "stripes"}
    assert table().with_names({0: "heels", 2: None}).names() == {"0": "heels"}


def test_reading() -> None:
    latents = table()
    assert len(latents) == 3
    assert latents[0] == LatentRecord(0, 0.5, 1.5, 2.0, ("b", "a"), (2.0, 1.0), "shoe", 1.0, None, None)
    assert latents[1].top_image_ids == ()
    assert torch.equal(latents.density, torch.tensor([0.5, 0, 1]))
    assert torch.equal(latents.mean_activation, torch.tensor([1.5, 0, 2]))
    assert torch.equal(latents.max_activation, torch.tensor([2.0, 0, 4]))
    assert repr(latents) == "LatentTable(3 latents on 9 images, 1 named)"
    with pytest.raises(IndexError, match=r"Latents are 0…2, got 3"):
        latents[3]


def test_names() -> None:
    named = table().with_names({0: "heels", 2: "dots"}, scores={0: 0.75})
    assert [(named[i].name, named[i].name_score) for i in range(3)] == [("heels", 0.75), (None, None), ("dots", None)]
    assert named != table()
    assert table().with_names({}) == table()
    with pytest.raises(ValueError, match=r"Latents are 0…2, got names of \[3\]"):
        table().with_names({3: "x"})
    with pytest.raises(ValueError, match=r"Latents \[1\] have a score but no name"):
        table().with_names({0: "x"}, scores={1: 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_index": [0, 2, 1]}, "latent_index must be 0, 1, 2, … in order"),
        ({"density": [0.5, 0.0, 1.5]}, "density of the latents must lie in 0…1"),
        ({"max_activation": [0.5, 0.0, float("nan")]}, "max_activation of the latents has NaN"),
        ({"top_activations": [[2.0], [], [4.0, 3.0]]}, "top_image_ids and top_activations of the latents differ"),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_travels_with_the_sae(tmp_path: Path) -> None:
    model = sae()
    model.latents, model.latent_sheet = table(), b"\x89PNG"
    model.save_pretrained(tmp_path)
    loaded = KSparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.latents == table()
    assert loaded.latents.source == SOURCE
    assert loaded.latent_sheet == b"\x89PNG"
    before = (tmp_path / "latents.parquet").read_bytes()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "latents.parquet").read_bytes() == before
    loaded.latents = loaded.latent_sheet = None
    loaded.save_pretrained(tmp_path)
    assert KSparseAutoencoder.from_pretrained(tmp_path).latents is None
    assert not list(tmp_path.glob("latents.*"))


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        table().save(tmp_path / "latents.parquet")
        return tmp_path / "latents.parquet"

    def test_of_another_sae(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"is of 3 latents, the SAE has 4"):
            LatentTable.load(path, 4)

    def test_damaged(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"is damaged .*Download it again"):
            LatentTable.load(path, 3)

    def test_other_columns(self, path: Path) -> None:
        pq.write_table(pq.read_table(path).drop_columns(["purity"]), path)
        with pytest.raises(ValueError, match="lacks the columns purity"):
            LatentTable.load(path, 3)
        pq.write_table(pa.table(ROWS, schema=SCHEMA).append_column("more", pa.array([1, 2, 3])), path)
        with pytest.raises(ValueError, match="has the unknown columns more"):
            LatentTable.load(path, 3)

    def test_no_description(self, path: Path) -> None:
        pq.write_table(pa.table(ROWS, schema=SCHEMA), path)
        with pytest.raises(ValueError, match=r"The description in .*latents.parquet is not valid JSON"):
            LatentTable.load(path, 3)

    def test_small_files_that_grow(self, path: Path) -> None:
        """A million values, and a text of a hundred megabytes, each a few kilobytes on the disk."""
        many = ["a"] * 1_000_000
        rows = ROWS | {"top_image_ids": [many, [], []], "top_activations": [[0.0] * len(many), [], []]}
        pq.write_table(pa.table(rows, schema=SCHEMA), path, compression="zstd")
        with pytest.raises(ValueError, match="holds more than a table of 3 latents can"):
            LatentTable.load(path, 3)
        pq.write_table(pa.table(ROWS | {"name": ["x" * 10**8, None, None]}, schema=SCHEMA), path, compression="zstd")
        with pytest.raises(ValueError, match="holds more than a table of 3 latents can"):
            LatentTable.load(path, 3)
        # one text of 40 kilobytes in a dictionary, of which every one of 3,000 rows is
        rows = {name: [values[2]] * 3000 for name, values in ROWS.items()}
        rows |= {"latent_index": list(range(3000)), "name": ["x" * 40_000] * 3000, "label": ["y" * 40_000] * 3000}
        pq.write_table(pa.table(rows, schema=SCHEMA), path, compression="zstd")
        assert path.stat().st_size < 100_000
        with pytest.raises(ValueError, match="holds more than a table of latents can"):
            LatentTable.load(path, 3000)

    def test_the_source_is_recorded_whole(self, path: Path) -> None:
        assert LatentTable.load(path, 3).source == SOURCE
        assert set(dataclasses.asdict(SOURCE)) == {
            *("num_images", "images_per_latent", "dataset", "split", "labels", "format_version"),
        }
