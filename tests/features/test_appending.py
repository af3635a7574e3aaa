"""append=True: another data set behind those of a store; and the type that the numbers are stored in."""

import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from diffusion_sae.features import FeatureStore, Shard
from diffusion_sae.provenance import ProvenanceMismatchError

LAYER = "up_ft1"


@pytest.fixture(scope="module")
def extractor(make_sd_extractor):
    return make_sd_extractor(layers=LAYER, timesteps=25)


@pytest.fixture(scope="module")
def extract(extractor):
    def run(data, folder, **options):
        return extractor.extract(data, folder, **{"batch_size": 2, "shard_size": 3, "progress": False, **options})

    return run


@pytest.fixture(scope="module")
def joined(extract, images, tmp_path_factory):
    """Seven images, then five."""
    folder = tmp_path_factory.mktemp("joined") / "store"
    extract(images[:7], folder)
    extract(images[7:], folder, append=True)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def labelled(images, names=("a", "b")):
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": [i % 2 for i in range(len(images))]}, features=features)


def test_appended_images_come_behind(extractor, joined, images):
    store = FeatureStore(joined, verify=True)
    expected = extractor(images)
    assert store.complete
    assert store.image_ids == expected.image_ids
    assert store.sources == [*map(str, range(7)), *map(str, range(5))]
    torch.testing.assert_close(store.select(LAYER, 25).to_tensor(), expected[LAYER, 25], atol=1e-5, rtol=0)


def test_the_calls_that_made_a_store_find_it_done(extract, joined, images, tmp_path):
    """So that a script of several calls can be started again, whenever it was killed."""
    folder = shutil.copytree(joined, tmp_path / "store")
    for data, append in ((images[:7], False), (images[7:], True), (images[:7], True)):
        assert len(extract(data, folder, append=append)) == 12
    assert contents(folder) == contents(joined)


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_an_interrupted_append_goes_on(extract, joined, images, tmp_path, monkeypatch, kept):
    folder = tmp_path / "store"
    extract(images[:7], folder)
    write, done = Shard.add, [0]

    def interrupted(self, *args):
        done[0] += 1
        if done[0] == kept:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(Shard, "add", interrupted)
    if kept <= 3:  # five images in shards of three and batches of two are three batches
        with pytest.raises(KeyboardInterrupt):
            extract(images[7:], folder, append=True)
        assert not FeatureStore(folder).complete
        with pytest.raises(ValueError, match=r"is unfinished: it lacks some of the 5 images .* then append"):
            extract(images[:4], folder, append=True)
    monkeypatch.setattr(Shard, "add", write)
    extract(images[:7], folder)  # what was there before is not disturbed
    extract(images[7:], folder, append=True)
    assert contents(folder) == contents(joined)


def test_without_append_other_data_are_refused(extract, joined, images, tmp_path):
    folder = shutil.copytree(joined, tmp_path / "store")
    for other in (images[:5], images[5:]):
        with pytest.raises(ValueError, match=r"was begun with other images.*append=True to add these images behind"):
            extract(other, folder)
    assert contents(folder) == contents(joined)


def test_a_damaged_shard_is_made_anew_by_the_call_that_made_it(extract, joined, images, tmp_path):
    for shard, first, second in (("shard-00001", images[:7], images[7:]), ("shard-00004", images[7:], images[:7])):
        folder = shutil.copytree(joined, tmp_path / shard)
        for path in folder.glob(f"{shard}.*"):
            path.unlink()
        if shard == "shard-00001":
            with pytest.raises(ValueError, match=r"lacks shard-00001 of the 7 images before these"):
                extract(second, folder, append=True)
        extract(first, folder, append=True)
        assert contents(folder) == contents(joined)


def test_equally_named_images_are_told_apart_by_content(extract, extractor, images, tmp_path):
    """Two lists of five have the same names: 0 … 4."""
    extract(images[:5], tmp_path)
    store = extract(images[5:10], tmp_path, append=True)
    assert store.image_ids == extractor(images[:10]).image_ids
    assert len(extract(images[5:10], tmp_path, append=True)) == 10
    for path in tmp_path.glob("shard-00003.*"):
        path.unlink()
    changed = [images[11], *images[6:10]]
    with pytest.raises(ValueError, match=r"was begun with other images: '0' is another one"):
        extract(changed, tmp_path, append=True)
    assert len(extract(images[5:10], tmp_path, append=True)) == 10


def test_there_must_be_a_store_to_append_to(extract, images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no feature store in '.*' to append to\. Leave out append"):
        extract(images[:2], tmp_path / "none", append=True)
    assert not (tmp_path / "none").exists()


def test_what_is_appended_must_fit(extract, make_sd_extractor, images, tmp_path):
    table = tmp_path / "table"
    extract(labelled(images[:4]), table)
    with pytest.raises(ValueError, match=r"has the class names \['a', 'b'\], the data to append \['a', 'c'\]"):
        extract(labelled(images[4:8], names="ac"), table, append=True)
    with pytest.raises(ValueError, match=r"has the class names \['a', 'b'\], the data to append None"):
        extract(images[4:8], table, append=True)
    numbered = labelled(images[:4]).cast_column("label", ClassLabel(names=["x", "y"]))
    plain = Dataset.from_dict(
        {"image": images[:4], "label": [5, 6, 7, 8]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    extract(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has labels, the data to append has no labels\. Give both or neither"):
        extract(images[4:8], tmp_path / "plain", append=True)
    with pytest.raises(ValueError, match=r"class names"):
        extract(numbered, tmp_path / "plain", append=True)
    other = make_sd_extractor(layers=LAYER, timesteps=25, seed=9)
    with pytest.raises(ProvenanceMismatchError, match=r"differ in seed"):
        other.extract(labelled(images[4:8]), table, append=True, progress=False)
    store = extract(labelled(images[4:8]), table, append=True)
    assert store.labels.tolist() == [0, 1] * 4


# Type of the stored numbers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_stored_type(extractor, extract, images, tmp_path, dtype):
    store = extract(images[:4], tmp_path, store_dtype=dtype)
    assert store.dtype == getattr(torch, dtype or "float32")
    computed = extractor(images[:4])[LAYER, 25]
    np.testing.assert_allclose(store.select(LAYER, 25)[:], computed.to(store.dtype).float(), atol=2e-3, rtol=8e-3)
    assert store.provenance == extractor.provenance  # the computation is the same
    other = "float32" if dtype == "float16" else "float16"
    with pytest.raises(ValueError, match=rf"was begun with store_dtype '{dtype or 'float32'}', got '{other}'"):
        extract(images[:4], tmp_path, store_dtype=other)


def test_unknown_type(extract, images, tmp_path):
    with pytest.raises(ValueError, match=r"store_dtype must be one of None, 'float32', .*, got 'float64'"):
        extract(images, tmp_path, store_dtype="float64")


def test_overflow_names_layer_and_image():
    values = torch.ones(3, 4)
    values[1, 2] = 7e4
    with pytest.raises(
        ValueError, match=r"up_ft1@25 reaches 7e\+04 for b\.png, which torch\.float16 cannot hold .* 6\.55e\+04\)\. Use"
    ):
        Shard(torch.float16).add({(LAYER, 25): values}, list("abc"), ["a.png", "b.png", "c.png"], [None] * 3)
    Shard(torch.bfloat16).add({(LAYER, 25): values}, list("abc"), ["a.png", "b.png", "c.png"], [None] * 3)
