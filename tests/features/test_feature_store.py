"""The store on disk: what goes in comes out, and what does not belong there is found on opening."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_sae.features import FeatureStore, Shard, StoreWriter
from diffusion_sae.features.layout import MANIFEST, read_header
from diffusion_sae.provenance import Provenance, ProvenanceMismatchError

LAYERS, TIMESTEPS = ("bottleneck", "up_blocks.1.attentions.0"), (0, 25)
KEYS = [(layer, t) for layer in LAYERS for t in TIMESTEPS]
SHARD_SIZE, COUNT = 3, 8
SHARD_SIZES = (3, 3, 2)
SHARD_FILES = [f"shard-0000{i}.{kind}" for i in range(3) for kind in ("json", "parquet", "safetensors")]
TENSORS = [f"{layer}@{t}" for layer, t in KEYS]
IDS = [f"id-{i}" for i in range(COUNT)]
SOURCES = [f"bag/image-{i}.png" for i in range(COUNT)]
LABELS = [2, 0, 1, 1, 0, 2, 2, 1]
REPAIR = r"delete shard-00001\.safetensors, shard-00001\.parquet and shard-00001\.json and call extract again"
SHAPES = {"mean": (8,), "max": (8,), "tokens": (9, 8), "none": (8, 3, 3)}


def provenance(pooling="mean", dtype="float32", **changes):
    return Provenance(
        model="m",
        **{"layers": LAYERS, "timesteps": TIMESTEPS, "pooling": pooling, "dtype": dtype, "weights": "abc", **changes},
    )


def make_features(pooling="mean", dtype="float32"):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(COUNT, *SHAPES[pooling], generator=generator).to(getattr(torch, dtype)) for key in KEYS}


def begin(folder, pooling="mean", dtype="float32", *, record=None, **data):
    given = {"source_names": SOURCES, "labels": LABELS, "class_names": ["a", "b", "c"], "shard_size": SHARD_SIZE}
    return StoreWriter(folder, record or provenance(pooling, dtype), **given | data)


def write_shard(writer, number, features, *, ids=IDS, sources=SOURCES, labels=LABELS):
    """In two batches."""
    shard, rows = writer.new_shard(), writer.part.rows(number)
    for batch in (rows[:1], rows[1:]):
        values = {key: v[batch.start : batch.stop] for key, v in features.items()}
        shard.add(values, *([c[i] for i in batch] for c in (ids, sources, labels)))
    writer.write(number, shard)


def write_store(folder, pooling="mean", dtype="float32", *, labels=LABELS, **begun):
    features = make_features(pooling, dtype)
    writer = begin(folder, pooling, dtype, labels=labels, **begun)
    for number in writer.missing:
        write_shard(writer, number, features, labels=labels)
    writer.finish()
    return features


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "store"
    write_store(folder)
    return folder


@pytest.fixture
def store_folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "store")


def edit_manifest(folder, **changes):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pooling", ["mean", "max", "tokens", "none"])
def test_round_trip(tmp_path, pooling, dtype):
    features = write_store(tmp_path, pooling, dtype)
    store = FeatureStore(tmp_path)
    assert store.complete
    assert (store.layers, store.timesteps, len(store)) == (LAYERS, TIMESTEPS, COUNT)
    assert (store.image_ids, store.sources, store.labels.tolist()) == (IDS, SOURCES, LABELS)
    assert store.class_names == ["a", "b", "c"]
    assert store.skipped == []
    for key, values in features.items():
        selected = store.select(*key)
        expected = values.flatten(0, 1) if pooling == "tokens" else values
        assert torch.equal(selected.to_tensor(), expected.float())
        assert selected.provenance == provenance(pooling, dtype).select(*key)
        assert selected.image_ids == IDS
        assert selected.class_names == ["a", "b", "c"]


def test_random_gather_over_shards_equals_the_naive_version(tmp_path):
    features = write_store(tmp_path, "tokens", "bfloat16")
    selected = FeatureStore(tmp_path).select("bottleneck", 25)
    whole = features["bottleneck", 25]
    rows = torch.randint(len(selected), (200,), generator=torch.Generator().manual_seed(0))
    naive = torch.stack([whole[row // 9, row % 9] for row in rows.tolist()]).float()
    assert torch.equal(selected[rows], naive)


def test_rows_of_tokens(tmp_path):
    features = write_store(tmp_path, "tokens")["bottleneck", 0]
    selected = FeatureStore(tmp_path).select("bottleneck", 0)
    assert (len(selected), selected.num_images, selected.rows_per_image, selected.d_in) == (72, 8, 9, 8)
    assert selected.positions.tolist() == list(range(9)) * 8
    assert selected.image_index.tolist() == [i for i in range(8) for _ in range(9)]
    assert selected.labels.tolist() == [label for label in LABELS for _ in range(9)]
    for row in (0, 8, 9, 40, 71):
        assert torch.equal(selected[[row]][0], features[selected.image_index[row], selected.positions[row]])


def test_selected_features_are_mapped_not_read(pristine):
    """Opening and selecting must not read the data: writing through the map would, and must not reach the disk."""
    before = (pristine / "shard-00000.safetensors").read_bytes()
    selected = FeatureStore(pristine).select("bottleneck", 0)
    assert [len(block) for block in selected._blocks] == list(SHARD_SIZES)
    assert not any(isinstance(block, torch.Tensor) for block in selected._blocks)
    selected._block(0).fill_(5)
    assert selected[[0]].tolist() == [[5.0] * 8]
    assert (pristine / "shard-00000.safetensors").read_bytes() == before


def test_shards_are_plain_safetensors(pristine):
    features = make_features()
    loaded = load_file(pristine / "shard-00002.safetensors")
    assert set(loaded) == {"bottleneck@0", "bottleneck@25", "up_blocks.1.attentions.0@0", "up_blocks.1.attentions.0@25"}
    assert torch.equal(loaded["bottleneck@25"], features["bottleneck", 25][6:])
    index = pq.read_table(pristine / "shard-00002.parquet").to_pydict()
    assert index == {"image_id": IDS[6:], "source": SOURCES[6:], "label": LABELS[6:]}
    names = sorted(path.name for path in pristine.iterdir())
    assert names == [MANIFEST, *SHARD_FILES]


def test_writing_twice_gives_the_same_bytes(pristine, tmp_path):
    write_store(tmp_path)
    for path in pristine.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_unlabelled_images(tmp_path):
    write_store(tmp_path, labels=[None] * COUNT)
    store = FeatureStore(tmp_path)
    assert store.labels is None
    assert store.select("bottleneck", 0).labels is None


def test_select_names_what_there_is(pristine):
    with pytest.raises(ValueError, match=r"layer must be one of 'bottleneck', 'up_blocks.*', got 'up_ft1'"):
        FeatureStore(pristine).select("up_ft1", 25)
    with pytest.raises(ValueError, match=r"timestep must be one of 0, 25, got 100"):
        FeatureStore(pristine).select("bottleneck", 100)


def test_no_store(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"There is no feature store in '.*': it has no manifest\.json"):
            FeatureStore(folder)


def test_unfinished_store(tmp_path):
    writer = begin(tmp_path)
    store = FeatureStore(tmp_path)
    assert not store.complete
    assert "unfinished" in repr(store)
    with pytest.raises(ValueError, match="holds no images yet"):
        store.select("bottleneck", 0)
    features = make_features()
    write_shard(writer, 0, features)
    store = FeatureStore(tmp_path)
    assert (len(store), store.complete) == (3, False)
    assert torch.equal(store.select("bottleneck", 0).to_tensor(), features["bottleneck", 0][:3])
    writer.finish()  # does not complete what lacks shards
    assert not FeatureStore(tmp_path).complete


def test_unfinished_store_with_a_hole(tmp_path):
    """As several processes leave it: the second shard is not there yet."""
    features, writer = make_features(), begin(tmp_path)
    for number in (2, 0):
        write_shard(writer, number, features)
    store = FeatureStore(tmp_path)
    kept = [0, 1, 2, 6, 7]
    assert store.image_ids == [IDS[i] for i in kept]
    assert torch.equal(store.select("bottleneck", 0).to_tensor(), features["bottleneck", 0][kept])
    again = begin(tmp_path)
    assert again.missing == [1]
    write_shard(again, 1, features)
    again.finish()
    assert FeatureStore(tmp_path).image_ids == IDS


def test_the_manifest_is_written_at_the_beginning_and_at_the_end(tmp_path):
    features, writer = make_features(), begin(tmp_path)
    begun = (tmp_path / MANIFEST).read_bytes()
    for number in writer.missing:
        write_shard(writer, number, features)
        assert (tmp_path / MANIFEST).read_bytes() == begun
    writer.finish()
    marks = [json.loads((tmp_path / f"shard-0000{i}.json").read_text()) for i in range(3)]
    assert json.loads((tmp_path / MANIFEST).read_text())["shards"] == marks
    assert [mark["rows"] for mark in marks] == list(SHARD_SIZES)


def test_a_shard_without_rows(tmp_path):
    """All its images were broken: it keeps the count of shards and the reasons."""
    features = make_features()
    writer = begin(tmp_path)
    write_shard(writer, 0, features)
    writer.write(1, Shard(skipped=[{"source": "x.png", "reason": "broken"}]))
    write_shard(writer, 2, features)
    writer.finish()
    store = FeatureStore(tmp_path)
    assert store.skipped == [{"source": "x.png", "reason": "broken"}]
    assert torch.equal(store.select("bottleneck", 0).to_tensor(), features["bottleneck", 0][[0, 1, 2, 6, 7]])
    assert begin(tmp_path).missing == []


def test_a_shard_of_other_images_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"make the shards 0…2, got 3"):
        begin(tmp_path).write(3, Shard())


# Damage


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.parquet"])
def test_missing_file_is_named(store_folder, name):
    (store_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {name}, which shard-00001\.json lists.*{REPAIR}"):
        FeatureStore(store_folder)


def test_missing_mark_is_named(store_folder):
    (store_folder / "shard-00001.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks shard-00001\.json, which its manifest lists.*{REPAIR}"):
        FeatureStore(store_folder)


def test_a_damaged_shard_is_made_anew(pristine, store_folder):
    """After deleting the three files that the message names, a complete store goes on like an unfinished one."""
    for path in store_folder.glob("shard-00001.*"):
        path.unlink()
    writer = begin(store_folder)
    assert writer.missing == [1]
    assert not FeatureStore(store_folder).complete
    write_shard(writer, 1, make_features())
    writer.finish()
    assert {p.name: p.read_bytes() for p in store_folder.iterdir()} == {
        p.name: p.read_bytes() for p in pristine.iterdir()
    }


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_flipped_byte_is_found_by_verifying(store_folder, suffix):
    path = store_folder / f"shard-00002.{suffix}"
    content = bytearray(path.read_bytes())
    content[-20 if suffix == "safetensors" else 10] ^= 1
    path.write_bytes(content)
    store = FeatureStore(store_folder)
    message = rf"content of shard-00002\.{suffix} in .* damaged\. To have it made anew, delete shard-00002\.safetens"
    with pytest.raises(ValueError, match=message):
        store.verify()
    with pytest.raises(ValueError, match=message):
        FeatureStore(store_folder, verify=True)


def test_an_undamaged_store_verifies(pristine):
    FeatureStore(pristine, verify=True)


@pytest.mark.parametrize("content", ["{}", "[]", '{"shard": "x"', None])
def test_damaged_mark_is_named(store_folder, content):
    path = store_folder / "shard-00000.json"
    text = path.read_text()
    path.write_text(text.replace('"rows"', '"lines"') if content is None else content)
    with pytest.raises(ValueError, match=r"shard-00000\.json is (damaged|not valid JSON)"):
        FeatureStore(store_folder)


def test_edited_mark_is_found(store_folder):
    path = store_folder / "shard-00000.json"
    path.write_text(path.read_text().replace('"skipped": []', '"skipped": [{"source": "x", "reason": "y"}]'))
    with pytest.raises(ValueError, match=r"shard-00000\.json is not the one that the manifest lists"):
        FeatureStore(store_folder)


def test_files_beyond_the_last_shard_are_foreign(store_folder):
    shutil.copy(store_folder / "shard-00002.json", store_folder / "shard-00003.json")
    with pytest.raises(ValueError, match=r"holds shard-00003\.json, which do not belong to its store of 3 shards"):
        FeatureStore(store_folder)
    (store_folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"holds shard-00000\.json, .* do not belong to its store of 0 shards"):
        begin(store_folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard_is_named(store_folder, keep):
    path = store_folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is damaged or from elsewhere: \d+ bytes"):
        FeatureStore(store_folder)


@pytest.mark.parametrize("garbage", [b"\xff", b"\0", b"{"])
def test_overwritten_shard_is_named(store_folder, garbage):
    path = store_folder / "shard-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(garbage * len(content))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is no complete safetensors file"):
        FeatureStore(store_folder)
    path.write_bytes(content[:8] + garbage * (len(content) - 8))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged: its header is not valid JSON"):
        FeatureStore(store_folder)


def test_header_that_announces_another_length(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    assert read_header(path)[0]["a"]["shape"] == [4]
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: it has \d+ bytes, its header announces \d+"):
        read_header(path)


def test_damaged_index_is_named(store_folder):
    path = store_folder / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-4] + b"nope")
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is damaged"):
        FeatureStore(store_folder)


def test_index_of_another_shard_is_named(store_folder):
    shutil.copy(store_folder / "shard-00000.parquet", store_folder / "shard-00001.parquet")
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is from another store: 3 rows of shard shard-00000 of"):
        FeatureStore(store_folder)


def test_foreign_shard_is_named(store_folder, tmp_path):
    """Of a store with other settings or other data: same names, shapes and size, other numbers."""
    message = r"shard-00002\.safetensors is from another store: it holds .* of shard shard-00002 of \w+ over \w+, exp"
    write_store(tmp_path / "seed", record=provenance(seed=5))
    write_store(tmp_path / "data", labels=LABELS[::-1])
    for other in ("seed", "data"):
        foreign = tmp_path / other / "shard-00002.safetensors"
        assert foreign.stat().st_size == (store_folder / foreign.name).stat().st_size
        shutil.copy(foreign, store_folder / foreign.name)
        with pytest.raises(ValueError, match=message):
            FeatureStore(store_folder)


def test_exchanged_shards_are_named(store_folder):
    for kind in ("safetensors", "parquet", "json"):
        shutil.copy(store_folder / f"shard-00001.{kind}", store_folder / f"shard-00000.{kind}")
    with pytest.raises(ValueError, match=r"shard-00000\.json is from another store: of shard-00001 of"):
        FeatureStore(store_folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"stranger": torch.zeros(3, 8)}, r"it holds \['stranger'\] of shard None"),
        ({tensor: torch.zeros(3, 7) for tensor in TENSORS}, r"is float32 of shape \[3, 7\], expected is .*\[3, 8\]"),
        (
            {tensor: torch.zeros(3, 8).half() for tensor in TENSORS},
            r"is float16 of shape \[3, 8\], expected is float32",
        ),
    ],
    ids=["names", "shape", "dtype"],
)
def test_shard_with_other_tensors_is_named(store_folder, tensors, message):
    path, mark = store_folder / "shard-00001.safetensors", store_folder / "shard-00001.json"
    content = json.loads(mark.read_text())
    save_file(tensors, path, metadata=None if "stranger" in tensors else {"shard": content["shard"]})
    content["bytes"][".safetensors"] = path.stat().st_size
    mark.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"shard-00001\.safetensors is from another store: .*{message}"):
        FeatureStore(store_folder)


def test_damaged_manifest(store_folder):
    path = store_folder / MANIFEST
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        FeatureStore(store_folder)


def test_manifest_of_another_format(store_folder):
    edit_manifest(store_folder, format_version=99)
    with pytest.raises(ValueError, match=r"manifest\.json has format version 99; this library reads 2"):
        FeatureStore(store_folder)


def test_edited_provenance_does_not_fit_the_shards(store_folder):
    edit_manifest(store_folder, provenance=provenance(seed=1).to_dict())
    with pytest.raises(ValueError, match=r"is damaged: shard 0 is called .* over"):
        FeatureStore(store_folder)


# Going on


def test_another_extraction_is_refused_and_the_store_untouched(store_folder):
    (store_folder / ".notes.tmp").write_text("not ours")
    before = {path.name: path.read_bytes() for path in store_folder.iterdir()}
    for changes in ({"seed": 1}, {"weights": "other"}, {"pooling": "max"}, {"timesteps": (0,)}, {"prompt": "x"}):
        with pytest.raises(ProvenanceMismatchError, match=rf"The feature store .* differ in {next(iter(changes))}\)"):
            begin(store_folder, record=provenance(**changes))
    for data in (
        {"source_names": SOURCES[::-1]},
        {"source_names": SOURCES[:-1]},
        {"labels": LABELS[::-1]},
        {"class_names": ["a", "b", "d"]},
        {"class_names": None},
        {"shard_size": 5},
    ):
        with pytest.raises(ValueError, match=r"was begun with other images, labels, class names or shard size"):
            begin(store_folder, **data)
    assert {path.name: path.read_bytes() for path in store_folder.iterdir()} == before


def test_damage_is_found_before_going_on(store_folder):
    (store_folder / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shard-00001\.safetensors"):
        begin(store_folder)


def test_leftovers_of_a_killed_run_are_removed(store_folder):
    for name in (
        ".shard-00003.parquet.abc.tmp",
        ".shard-00003.safetensors.x_y.tmp",
        ".manifest.json.abc.tmp",
        ".tmpA1b2c3",
    ):
        (store_folder / name).write_bytes(b"half")
    (store_folder / ".someone-elses.tmp").write_bytes(b"keep")
    assert begin(store_folder).missing == []
    assert [path.name for path in store_folder.glob(".*")] == [".someone-elses.tmp"]


def test_other_names_and_versions_go_on(store_folder):
    moved = Provenance.from_dict(provenance().to_dict() | {"model": "moved", "versions": {"torch": "9"}})
    assert begin(store_folder, record=moved).missing == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("a regular file")
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(PermissionError, match=r"Cannot write to the output folder '.*file.*Choose a folder"):
            begin(folder)


def test_non_finite_features_name_their_image():
    values = torch.zeros(4, 8)
    values[2, 3] = torch.nan
    shard = Shard()
    with pytest.raises(ValueError, match=r"up_ft1@25 came out as NaN or infinite for c\.png\. Use dtype bfloat16"):
        shard.add({("up_ft1", 25): values}, list("abcd"), ["a.png", "b.png", "c.png", "d.png"], [None] * 4)
    values[2, 3], values[0, 0] = 0, torch.inf
    with pytest.raises(ValueError, match=r"for a\.png\."):
        shard.add({("up_ft1", 25): values}, list("abcd"), ["a.png", "b.png", "c.png", "d.png"], [None] * 4)


def test_tens_of_thousands_of_rows(tmp_path):
    """Every row holds its number, and its image is named by it."""
    count = 30_000
    values = torch.arange(count, dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.5])
    names = [f"{i}.png" for i in range(count)]
    labels = [i % 7 for i in range(count)]
    record = provenance(layers=("mid",), timesteps=(0,))
    writer = begin(tmp_path, record=record, source_names=names, labels=labels, shard_size=999)
    for number in reversed(writer.missing):  # as they come from several processes
        write_shard(writer, number, {("mid", 0): values}, ids=names, sources=names, labels=labels)
    writer.finish()
    selected = FeatureStore(tmp_path).select("mid", 0)
    assert len(selected) == count
    for seed in range(3):
        rows = torch.randint(count, (4096,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(selected[rows], values[rows])
        assert torch.equal(selected.labels[rows], rows % 7)
    assert torch.equal(selected.to_tensor(), values)
    assert selected.image_ids == names
    assert all(selected.image_ids[i] == names[i] for i in (0, 998, 999, 29_999))
