"""to_dataset(): every value where it belongs."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Value
from test_feature_store import COUNT, IDS, LABELS, LAYERS, SOURCES, TENSORS, TIMESTEPS, begin, write_store

from diffusion_sae.features import FeatureStore


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_rows_are_images(tmp_path, pooling, dtype):
    features = write_store(tmp_path / "store", pooling, dtype)
    table = FeatureStore(tmp_path / "store").to_dataset(cache_dir=tmp_path / "cache")
    assert table.column_names == ["image_id", "source", "label", *TENSORS]
    assert (table["image_id"][:], table["source"][:], table["label"][:]) == (IDS, SOURCES, LABELS)
    assert table.features["label"] == ClassLabel(names=["a", "b", "c"])
    innermost = table.features[TENSORS[0]]
    while not isinstance(innermost, Value):
        innermost = innermost.feature
    assert innermost.dtype == ("float32" if dtype == "bfloat16" else dtype)
    rows = table.with_format("numpy")
    for (layer, t), values in features.items():
        got = np.stack([np.asarray(row[f"{layer}@{t}"], np.float32) for row in rows])
        assert np.array_equal(got, values.float().numpy())


def test_rows_of_tokens_have_positions(tmp_path):
    features = write_store(tmp_path / "store", "tokens", "float16")[LAYERS[1], 25]
    store = FeatureStore(tmp_path / "store")
    table = store.to_dataset(LAYERS[1], 25, cache_dir=tmp_path / "cache")
    assert table.column_names == ["image_id", "source", "label", "position", f"{LAYERS[1]}@25"]
    assert table["position"][:] == list(range(9)) * COUNT
    assert table["image_id"][:] == [i for i in IDS for _ in range(9)]
    assert table["label"][:] == store.select(LAYERS[1], 25).labels.tolist()
    got = table.with_format("torch")[f"{LAYERS[1]}@25"][:]
    assert torch.equal(got.float(), features.flatten(0, 1).float())


def test_one_layer_or_timestep(tmp_path):
    write_store(tmp_path / "store")
    store = FeatureStore(tmp_path / "store")
    one_layer = store.to_dataset(layer="bottleneck", cache_dir=tmp_path)
    assert one_layer.column_names[3:] == [f"bottleneck@{t}" for t in TIMESTEPS]
    one_timestep = store.to_dataset(timestep=0, cache_dir=tmp_path)
    assert one_timestep.column_names[3:] == [f"{layer}@0" for layer in LAYERS]
    with pytest.raises(ValueError, match=r"timestep must be one of 0, 25, got 3"):
        store.to_dataset(timestep=3)


def test_without_labels_or_class_names(tmp_path):
    write_store(tmp_path / "unlabelled", labels=[None] * COUNT, class_names=None)
    assert "label" not in FeatureStore(tmp_path / "unlabelled").to_dataset(cache_dir=tmp_path).column_names
    write_store(tmp_path / "numbers", class_names=None)
    table = FeatureStore(tmp_path / "numbers").to_dataset(cache_dir=tmp_path)
    assert table.features["label"] == Value("int64")
    assert table["label"][:] == LABELS


def test_an_unchanged_store_is_not_written_again(tmp_path):
    write_store(tmp_path / "store")
    for _ in range(2):
        FeatureStore(tmp_path / "store").to_dataset("bottleneck", 0, cache_dir=tmp_path / "cache")
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
        assert len(files) == 3
    write_store(tmp_path / "other", dtype="float16")
    FeatureStore(tmp_path / "other").to_dataset("bottleneck", 0, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_nothing_to_export(tmp_path):
    begin(tmp_path)
    with pytest.raises(ValueError, match="holds no images yet"):
        FeatureStore(tmp_path).to_dataset()
