"""extract(): a whole data set into a store, its refusals, and going on after an interruption."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from safetensors import safe_open

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.images import ImageError
from diffusion_sae.features import FeatureStore
from diffusion_sae.provenance import ProvenanceMismatchError

LAYER = "up_ft1"


@pytest.fixture(scope="module")
def extractor(make_sd_extractor):
    return make_sd_extractor(layers=("bottleneck", LAYER), timesteps=(25, 100))


@pytest.fixture(scope="module")
def extract(extractor):
    def run(data, folder, **options):
        return extractor.extract(data, folder, **{"batch_size": 4, "shard_size": 4, "progress": False, **options})

    return run


@pytest.fixture(scope="module")
def undisturbed(extract, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    extract(image_folder, folder)
    return folder


@pytest.fixture
def count_forwards(extractor):
    """Images that went through the denoiser."""
    count = [0]

    def hook(_module, args, kwargs):
        count[0] += len(kwargs["sample"])

    handle = extractor.backbone.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    yield count
    handle.remove()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_store_holds_what_a_call_gives(extractor, undisturbed, image_folder):
    store = FeatureStore(undisturbed)
    assert store.complete
    assert store.provenance == extractor.provenance
    assert store.class_names == ["bag", "dress", "shoe"]
    assert store.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(list(undisturbed.glob("shard-*.safetensors"))) == 3
    out = extractor([image_folder / source for source in store.sources])
    assert store.image_ids == out.image_ids
    for key, expected in out.items():
        torch.testing.assert_close(store.select(*key).to_tensor(), expected, atol=1e-5, rtol=0)


def test_a_selection_has_the_fingerprint_of_its_own_extraction(undisturbed, make_sd_extractor):
    selected = FeatureStore(undisturbed).select(LAYER, 100)
    assert selected.provenance.fingerprint == make_sd_extractor(layers=LAYER, timesteps=100).provenance.fingerprint


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 5), (5, 12), (32, 7), (3, 1000)])
def test_batch_and_shard_size_do_not_change_the_features(
    extract, undisturbed, image_folder, tmp_path, batch_size, shard_size
):
    store = extract(image_folder, tmp_path, batch_size=batch_size, shard_size=shard_size)
    expected = FeatureStore(undisturbed)
    assert len(list(tmp_path.glob("*.safetensors"))) == -(-12 // shard_size)
    assert (store.image_ids, store.sources) == (expected.image_ids, expected.sources)
    for key in ((LAYER, 25), ("bottleneck", 100)):
        torch.testing.assert_close(store.select(*key).to_tensor(), expected.select(*key).to_tensor(), atol=1e-5, rtol=0)


def test_every_kind_of_data_gives_the_same_features(extract, images, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    table = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(12)]}, features=features)
    table.to_parquet(str(tmp_path / "images.parquet"))
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images]
    stores = {
        kind: extract(data, tmp_path / kind)
        for kind, data in {
            "list": images,
            "tensors": tensors,
            "Dataset": table,
            "Parquet": tmp_path / "images.parquet",
        }.items()
    }
    expected = stores["list"].select(LAYER, 25).to_tensor()
    for kind, store in stores.items():
        assert store.image_ids == stores["list"].image_ids, kind
        assert torch.equal(store.select(LAYER, 25).to_tensor(), expected), kind
    assert stores["list"].labels is None
    for kind in ("Dataset", "Parquet"):
        assert stores[kind].labels.tolist() == [0, 1] * 6
        assert stores[kind].class_names == ["a", "b"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_as_it_is(make_sd_extractor, tiny_sd_folder, images, tmp_path, dtype):
    half = DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, layers=LAYER, pooling="tokens", dtype=dtype)
    store = half.extract(images[:3], tmp_path, batch_size=3, progress=False)
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        assert file.get_tensor(f"{LAYER}@25").dtype == getattr(torch, dtype)
    selected = store.select(LAYER, 25)
    assert (len(selected), selected.rows_per_image) == (3 * 16, 16)
    assert torch.equal(selected.to_tensor(), half(images[:3])[LAYER, 25].flatten(0, 1).float())


def test_limit(extract, undisturbed, image_folder, tmp_path):
    store = extract(image_folder, tmp_path / "five", limit=5)
    assert store.sources == FeatureStore(undisturbed).sources[:5]
    assert store.labels.tolist() == [0, 0, 0, 0, 1]
    assert len(extract(image_folder, tmp_path / "all", limit=100)) == 12


@pytest.mark.parametrize("option", ["limit", "batch_size", "shard_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(extract, image_folder, tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"{option} must be at least 1, got {value}"):
        extract(image_folder, tmp_path / "store", **{option: value})
    assert not (tmp_path / "store").exists()


def test_no_images_leave_no_store(extract, tmp_path):
    (tmp_path / "images").mkdir()
    for data in ([], tmp_path / "images", tmp_path / "missing.parquet"):
        with pytest.raises(ValueError, match=r"data set is empty|holds no images|does not exist"):
            extract(data, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_unwritable_folder_is_found_out_first(extract, image_folder, tmp_path, count_forwards):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(PermissionError, match=r"Cannot write to the output folder '.*store'"):
        extract(image_folder, tmp_path / "file" / "store")
    assert count_forwards == [0]


def test_progress_goes_to_stderr_and_can_be_off(extract, image_folder, tmp_path, capsys):
    extract(image_folder, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    extract(image_folder, tmp_path / "shown", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "12/12" in shown.err
    assert "img" in shown.err


# Broken images


@pytest.fixture
def broken_folder(image_folder, tmp_path):
    """Broken files at the start, within and at the end of the classes; what is left keeps its class."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    jpeg = (folder / "bag" / "image-03.jpg").read_bytes()
    (folder / "bag" / "a-text.png").write_text("no image")
    (folder / "dress" / "image-05a.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "shoe" / "z-empty.png").write_bytes(b"")
    return folder


def test_a_broken_image_stops_the_run_and_is_named(extract, broken_folder, tmp_path):
    with pytest.raises(ImageError, match=r"Cannot read the image '.*bag/a-text\.png'.*use skip_broken"):
        extract(broken_folder, tmp_path / "store")
    assert list((tmp_path / "store").glob("shard-*")) == []


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 100), (4, 4), (2, 3), (15, 100)])
def test_skipped_images_do_not_shift_the_labels(extract, broken_folder, undisturbed, tmp_path, batch_size, shard_size):
    store = extract(broken_folder, tmp_path / "store", batch_size=batch_size, shard_size=shard_size, skip_broken=True)
    expected = FeatureStore(undisturbed)
    assert store.sources == expected.sources
    assert store.image_ids == expected.image_ids
    assert store.labels.tolist() == expected.labels.tolist()
    torch.testing.assert_close(
        store.select(LAYER, 25).to_tensor(), expected.select(LAYER, 25).to_tensor(), atol=1e-5, rtol=0
    )
    assert [entry["source"] for entry in store.skipped] == [
        "bag/a-text.png",
        "dress/image-05a.jpg",
        "shoe/z-empty.png",
    ]
    assert all("Cannot read the image" in entry["reason"] for entry in store.skipped)


def test_a_whole_broken_shard_is_skipped(extract, images, tmp_path):
    data = [*images[:4], b"1", b"2", b"3", b"4", *images[4:6]]
    store = extract(data, tmp_path, skip_broken=True)
    assert store.sources == ["0", "1", "2", "3", "8", "9"]
    assert [entry["source"] for entry in store.skipped] == ["4", "5", "6", "7"]
    assert len(store.select(LAYER, 25)) == 6
    assert extract(data, tmp_path, skip_broken=True).image_ids == store.image_ids


def test_nothing_but_broken_images(extract, tmp_path):
    with pytest.raises(ImageError, match=r"None of the 2 images could be read; .*store holds the reasons"):
        extract([b"a", b"b"], tmp_path / "store", skip_broken=True)
    assert [entry["source"] for entry in FeatureStore(tmp_path / "store").skipped] == ["0", "1"]


def test_a_repaired_image_lets_the_run_go_on(extract, image_folder, undisturbed, tmp_path, count_forwards):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    victim = folder / "dress" / "image-06.png"
    content = victim.read_bytes()
    victim.write_bytes(content[:50])
    with pytest.raises(ImageError, match=r"image-06\.png"):
        extract(folder, tmp_path / "store")
    assert len(FeatureStore(tmp_path / "store")) == 4  # the finished shard counts
    victim.write_bytes(content)
    count_forwards[0] = 0
    extract(folder, tmp_path / "store")
    assert count_forwards == [8 * 2]  # the two other shards at two timesteps
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_non_finite_features_are_refused(make_sd_extractor, tiny_sd_pipeline, image_folder, tmp_path):
    pipeline = copy.copy(tiny_sd_pipeline)
    pipeline.unet = copy.deepcopy(tiny_sd_pipeline.unet)
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[0, 0] = torch.nan
    broken = make_sd_extractor(pipeline=pipeline, layers=LAYER)
    with pytest.raises(ValueError, match=r"up_ft1@25 came out as NaN or infinite for bag/image-00\.png, bag"):
        broken.extract(image_folder, tmp_path, batch_size=4, progress=False)
    assert list(tmp_path.glob("*shard-*")) == []
    # what comes before the broken block is sound
    sound = make_sd_extractor(pipeline=pipeline, layers="down_ft0")
    assert len(sound.extract(image_folder, tmp_path / "sound", progress=False)) == 12


# Going on


def test_a_finished_store_is_returned_at_once(extract, undisturbed, image_folder, tmp_path, count_forwards):
    folder = shutil.copytree(undisturbed, tmp_path / "store")
    assert len(extract(image_folder, folder)) == 12
    assert count_forwards == [0]
    assert contents(folder) == contents(undisturbed)


def test_interrupted_at_every_rename(extract, undisturbed, image_folder, tmp_path, monkeypatch):
    """Each file gets its name in one step; an interruption before or after any of these steps loses nothing."""
    rename = Path.replace
    steps = 2 + 3 * 3  # two manifests, and a Parquet file, a shard and a manifest for each of three shards
    for step in range(steps):
        for when in ("before", "after"):
            done = [0]

            def interrupted(self, target, step=step, when=when, done=done):
                if done[0] == step and when == "before":
                    raise KeyboardInterrupt
                done[0] += 1
                rename(self, target)
                if done[0] == step + 1:
                    raise KeyboardInterrupt

            folder = tmp_path / f"{step}-{when}"
            monkeypatch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                extract(image_folder, folder, batch_size=12)
            monkeypatch.setattr(Path, "replace", rename)
            assert not list(folder.glob("*.tmp"))
            extract(image_folder, folder, batch_size=12)
            assert contents(folder) == contents(undisturbed), (step, when)


def test_another_extraction_is_refused(make_sd_extractor, undisturbed, image_folder, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "store")
    for changes in ({"seed": 1}, {"prompt": "a bag"}, {"pooling": "max"}, {"timesteps": 25}, {"layers": LAYER}):
        other = make_sd_extractor(**{"layers": ("bottleneck", LAYER), "timesteps": (25, 100), **changes})
        message = rf"they differ in {next(iter(changes))}\)[^!]*another folder to begin a new store"
        with pytest.raises(ProvenanceMismatchError, match=message):
            other.extract(image_folder, folder, shard_size=4, progress=False)
    assert contents(folder) == contents(undisturbed)


def test_other_names_labels_or_shards_are_refused(extract, undisturbed, image_folder, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "store")
    renamed = shutil.copytree(image_folder, tmp_path / "renamed")
    (renamed / "bag").rename(renamed / "purse")
    for data, options in ((renamed, {}), (image_folder, {"limit": 8}), (image_folder, {"shard_size": 6})):
        with pytest.raises(ValueError, match=r"begun with other images, labels, class names or shard size"):
            extract(data, folder, **options)
    assert contents(folder) == contents(undisturbed)


def test_other_images_of_the_same_names_are_refused(extract, image_folder, images, tmp_path):
    """Rows and numbered images are called alike in every data set: their content tells them apart."""
    store = extract(images, tmp_path / "list")
    before = contents(tmp_path / "list")
    for other in (images[::-1], [*images[:7], images[0], *images[8:]]):
        with pytest.raises(ValueError, match=r"was begun with other images: '\d+' is another one\. Give the same data"):
            extract(other, tmp_path / "list")
    assert contents(tmp_path / "list") == before
    assert extract(images, tmp_path / "list").image_ids == store.image_ids

    changed = shutil.copytree(image_folder, tmp_path / "changed")
    extract(changed, tmp_path / "folder")
    images[11].save(changed / "dress" / "image-05.png")
    with pytest.raises(ValueError, match=r"'dress/image-05\.png' is another one"):
        extract(changed, tmp_path / "folder")
