"""Files that somebody made to do harm: each is refused with the library's own error, at once, or shown to do none."""

import json
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffusion_sae import DiffusionProbe, FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.features import StoreWriter
from diffusion_sae.hub.safe_files import MAX_HEADER_BYTES, MAX_JSON_BYTES, refuse_not_finite, tensor_table
from diffusion_sae.provenance import Provenance
from hub_server import HubServer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SECRET = "root:x:0:0:the content of another file"


@pytest.fixture
def sae_folder(tmp_path: Path) -> Path:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=24, k=3))
    sae.provenance = Provenance(model="a/b", layers=("up_ft1",), timesteps=(25,), image_size=64, weights="0" * 16)
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Whatever a hostile file asks for, it is not given: neither the time nor the memory."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 10


def refused(folder: Path, message: str, loader: Any = KSparseAutoencoder) -> str:
    with pytest.raises((ValueError, OSError), match=message) as error:
        loader.from_pretrained(folder)
    return str(error.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


class TestConfigs:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            (
                {"d_in": 10**6, "num_latents": 10**7, "expansion_factor": 10},
                r"W_dec of shape \(24, 6\) where the config",
            ),
            ({"d_in": 10**12, "num_latents": 10**12, "expansion_factor": 1}, "more numbers than there can be|overflow"),
            ({"d_in": 6, "num_latents": 24, "k": 10**30}, "k must be at most num_latents = 24"),
            ({"d_in": -1}, "d_in must be an integer ≥ 1, got -1"),
            ({"num_labels": 10**15}, "num_labels of config.json must be an integer in 0…1000000"),
        ],
    )
    def test_huge_sizes(self, sizes: dict[str, int], message: str, sae_folder: Path) -> None:
        edit(sae_folder / "config.json", **sizes)
        refused(sae_folder, message)

    def test_a_probe_of_a_billion_layers(self, tmp_path: Path) -> None:
        config = {"model_type": "diffusion-probe", "d_in": 4, "head": "mlp", "depth": 10**9}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS)
        refused(tmp_path, "depth must be an integer in 1…1000, got 1000000000", DiffusionProbe)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[" * 10**6, "config.json is not valid JSON"),
            ("[1]", "config.json holds a list, not an object of settings"),
            (" " * (MAX_JSON_BYTES + 1), r"config.json has 16,777,217 bytes; at most 16,777,216 are read"),
            ("\0\xff", "config.json is not valid JSON"),
        ],
    )
    def test_no_config(self, content: str, message: str, sae_folder: Path) -> None:
        (sae_folder / "config.json").write_text(content, encoding="latin-1")
        refused(sae_folder, message)

    @pytest.mark.parametrize("change", [{"dtype": "no such type"}, {"id2label": [1]}])
    def test_values_that_transformers_cannot_take(self, change: dict[str, Any], sae_folder: Path) -> None:
        edit(sae_folder / "config.json", **change)
        refused(sae_folder, "The config holds a value that transformers cannot take")

    def test_no_code_comes_with_a_config(self, sae_folder: Path) -> None:
        """`auto_map` names a Python file of the artifact; nothing imports it."""
        marker = sae_folder / "ran"
        (sae_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n", encoding="utf-8")
        edit(sae_folder / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
        KSparseAutoencoder.from_pretrained(sae_folder)
        assert not marker.exists()

    @pytest.mark.parametrize(
        ("name", "message"),
        [("metrics.json", "metrics.json of .* holds a list"), ("extractor_config.json", "not the record")],
    )
    def test_records_of_another_form(self, name: str, message: str, sae_folder: Path) -> None:
        (sae_folder / name).write_text("[1]", encoding="utf-8")
        refused(sae_folder, message)


class TestWeights:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, value: float, sae_folder: Path) -> None:
        tensors = load_file(sae_folder / WEIGHTS)
        tensors["W_dec"][3, 2] = value
        save_file(tensors, sae_folder / WEIGHTS, metadata={"format": "pt"})
        refused(sae_folder, "W_dec holds NaN or infinite values")

    def test_a_sum_that_overflows_is_no_infinity(self) -> None:
        refuse_not_finite({"large": torch.full((4,), torch.finfo(torch.float32).max)}, "here")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
    def test_wrong_types(self, dtype: torch.dtype, sae_folder: Path) -> None:
        tensors = load_file(sae_folder / WEIGHTS)
        save_file(tensors | {"b_enc": tensors["b_enc"].to(dtype)}, sae_folder / WEIGHTS, metadata={"format": "pt"})
        refused(sae_folder, "has b_enc as .* where the config asks for F64, F32, F16, BF16")

    def test_a_million_tensors(self, sae_folder: Path) -> None:
        entries = {f"tensor.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}
        write_header(sae_folder / WEIGHTS, entries)
        refused(sae_folder, r"header of [\d,]+ bytes, which lists far more tensors than an SAE or a probe has")

    def test_as_many_tensors_as_are_read(self, sae_folder: Path) -> None:
        entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(15_000)}
        write_header(sae_folder / WEIGHTS, entries)
        assert (sae_folder / WEIGHTS).stat().st_size < MAX_HEADER_BYTES
        assert len(refused(sae_folder, "lacks W_dec.*has the unexpected t0, .* and 14,990 more")) < 2000

    @pytest.mark.parametrize(
        ("header", "length"),
        [
            (b"{}", 2**63),
            (b"{}", 2**20),
            (b"[" * 10**5, None),
            (b'{"W_enc": 3}', None),
            ({"W_enc": {"dtype": "F32", "shape": [6, "x"], "data_offsets": [0, 4]}}, None),
            ({"W_enc": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}, None),
            ({"W_enc": {"dtype": "F32", "shape": [6, 24], "data_offsets": [0, 10**15]}}, None),
        ],
    )
    def test_headers_that_lie(self, header: Any, length: int | None, sae_folder: Path) -> None:
        write_header(sae_folder / WEIGHTS, header, b"1234", length)
        refused(sae_folder, "header of|are damaged|lacks")
        with pytest.raises(ValueError, match=r"header of|is damaged"):
            KSparseAutoencoder.from_foreign(sae_folder / WEIGHTS, format="revelio", k=1)

    def test_the_table_is_that_of_the_file(self, sae_folder: Path) -> None:
        table = tensor_table(sae_folder / WEIGHTS)
        assert table["W_enc"] == ("F32", (6, 24))
        assert set(table) == {"W_enc", "b_enc", "W_dec", "b_dec"}

    def test_an_archive_of_torch_that_unpacks_to_more(self, tmp_path: Path) -> None:
        """A zip bomb: PyTorch itself would unpack it."""
        torch.save({"W_enc": torch.zeros(2000, 2000)}, tmp_path / "weights.pt")
        with (
            zipfile.ZipFile(tmp_path / "weights.pt") as archive,
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for member in archive.infolist():
                packed.writestr(member.filename.replace("weights", "bomb"), archive.read(member))
        assert (tmp_path / "bomb.pt").stat().st_size < 100_000
        with pytest.raises(ValueError, match=r"holds compressed members .* may unpack to any size"):
            KSparseAutoencoder.from_foreign(tmp_path / "bomb.pt", k=1)

    def test_a_pickle_of_megabytes(self, tmp_path: Path) -> None:
        torch.save({f"tensor {i}": 1 for i in range(10**5)}, tmp_path / "many.pt")
        with pytest.raises(ValueError, match=r"describes its tensors in [\d,]+ bytes, far more than an SAE needs"):
            KSparseAutoencoder.from_foreign(tmp_path / "many.pt", k=1)

    def test_damaged_archives(self, tmp_path: Path) -> None:
        torch.save({"W_enc": torch.ones(3, 2)}, tmp_path / "weights.pt")
        content = (tmp_path / "weights.pt").read_bytes()
        for start in range(0, len(content), 37):
            (tmp_path / "broken.pt").write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
            with pytest.raises(ValueError, match=r"broken\.pt|Revelio's weights|no checkpoint that is known"):
                KSparseAutoencoder.from_foreign(tmp_path / "broken.pt", k=1)


class TestShards:
    @pytest.fixture
    def sharded(self, sae_folder: Path) -> Path:
        sae = KSparseAutoencoder.from_pretrained(sae_folder)
        sae.save_pretrained(sae_folder, max_shard_size="1KB")
        assert (sae_folder / INDEX).is_file()
        KSparseAutoencoder.from_pretrained(sae_folder)
        return sae_folder

    @pytest.mark.parametrize(
        "place",
        [
            "../secret.safetensors",
            "/etc/secret.safetensors",
            "sub/secret.safetensors",
            "..\\secret.safetensors",
            ".hidden.safetensors",
            "secret.bin",
            7,
            None,
        ],
    )
    def test_a_shard_is_a_file_beside_the_index(self, place: Any, sharded: Path) -> None:
        save_file(
            load_file(sharded / sorted(p.name for p in sharded.glob("model-*"))[0]),
            sharded.parent / "secret.safetensors",
        )
        index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
        index["weight_map"]["W_enc"] = place
        (sharded / INDEX).write_text(json.dumps(index), encoding="utf-8")
        refused(sharded, "says that W_enc lies in .* A shard is a .safetensors file beside the index")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not valid JSON"),
            ("[" * 10**6, "is not valid JSON"),
            ("[]", "has no weight_map"),
            ('{"weight_map": {}}', "has no weight_map"),
            (
                json.dumps({"weight_map": {f"t{i}": f"model-{i}.safetensors" for i in range(1001)}}),
                "names 1,001 shards",
            ),
            ('{"weight_map": {"W_enc": "other.safetensors"}}', "names other.safetensors, which the artifact lacks"),
            (" " * (MAX_JSON_BYTES + 1), "has 16,777,217 bytes"),
        ],
    )
    def test_damaged_indexes(self, content: str, message: str, sharded: Path) -> None:
        (sharded / INDEX).write_text(content, encoding="utf-8")
        refused(sharded, message)

    def test_an_index_that_does_not_say_what_is_in_a_shard(self, sharded: Path) -> None:
        index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
        del index["weight_map"]["W_enc"]
        (sharded / INDEX).write_text(json.dumps(index), encoding="utf-8")
        refused(sharded, "and the index do not agree about W_enc")


class TestCards:
    def test_what_comes_from_a_file_is_text(self, sae_folder: Path) -> None:
        """Names of models, prompts and metrics are anyone's; the README.md of an artifact is never read."""
        script = "<script>alert(1)</script>"
        sae = KSparseAutoencoder.from_pretrained(sae_folder)
        sae.metrics = {script: 1.5, "fvu": script, "note": script, "data": {script: script}, "training": {script: 1}}
        sae.provenance = Provenance(
            model=f"`{script}", prompt=f"`|\n{script}", layers=(f"x`{script}",), timesteps=(25,), weights=script
        )
        sae.config.converted_from = script
        (sae_folder / "README.md").write_text(script, encoding="utf-8")
        sae.save_pretrained(sae_folder)
        front, body = (sae_folder / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)
        assert "&lt;script&gt;" in body
        assert "<script" not in body.lower()
        assert all(line.count("|") == 3 for line in body.splitlines() if line.startswith("| "))
        assert yaml.safe_load(front.strip("-"))["library_name"] == "diffusion_sae"
        KSparseAutoencoder.from_pretrained(sae_folder)


class TestSymlinks:
    """The Hub's cache is made of them, so they are followed, and lead to nothing but what is of the right form."""

    @pytest.mark.parametrize("name", ["config.json", WEIGHTS, "extractor_config.json", "metrics.json"])
    def test_nothing_of_another_file_is_shown(self, name: str, sae_folder: Path) -> None:
        secret = sae_folder.parent / "secret"
        secret.write_text(SECRET, encoding="utf-8")
        (sae_folder / name).unlink(missing_ok=True)
        (sae_folder / name).symlink_to(secret)
        assert SECRET[:12] not in refused(sae_folder, "JSON|damaged|header of")

    def test_saving_replaces_the_link_not_what_it_leads_to(self, sae_folder: Path) -> None:
        sae = KSparseAutoencoder.from_pretrained(sae_folder)
        for name in (WEIGHTS, "README.md", "config.json"):
            secret = sae_folder.parent / f"secret of {name}"
            secret.write_text(SECRET, encoding="utf-8")
            (sae_folder / name).unlink()
            (sae_folder / name).symlink_to(secret)
        sae.save_pretrained(sae_folder)
        for name in (WEIGHTS, "README.md", "config.json"):
            assert not (sae_folder / name).is_symlink()
            assert (sae_folder.parent / f"secret of {name}").read_text(encoding="utf-8") == SECRET
        KSparseAutoencoder.from_pretrained(sae_folder)

    def test_devices_are_no_files(self, sae_folder: Path) -> None:
        (sae_folder / WEIGHTS).unlink()
        (sae_folder / WEIGHTS).symlink_to("/dev/zero")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            KSparseAutoencoder.from_pretrained(sae_folder)


def write_store(folder: Path, images: int = 4) -> Path:
    record = Provenance(model="m", layers=("up_ft1",), timesteps=(25,), image_size=64, weights="0" * 16)
    names = [f"image {i}" for i in range(images)]
    writer = StoreWriter(folder, record, source_names=names, labels=[0] * images, class_names=["a"], shard_size=2)
    for number in writer.missing:
        shard, rows = writer.new_shard(), writer.part.rows(number)
        values = torch.arange(len(rows) * 3).reshape(-1, 3).float()
        shard.add({("up_ft1", 25): values}, *([given[i] for i in rows] for given in (names, names, [0] * images)))
        writer.write(number, shard)
    writer.finish()
    return folder


def replace_index(folder: Path, table: pa.Table, **settings: Any) -> None:
    """With a mark that fits, as its author would write it."""
    path, mark, manifest = folder / "shard-00000.parquet", folder / "shard-00000.json", folder / "manifest.json"
    says = pq.read_schema(path).metadata
    pq.write_table(table.replace_schema_metadata(says), path, **settings)
    content = json.loads(mark.read_text(encoding="utf-8"))
    content["bytes"][".parquet"] = path.stat().st_size
    mark.write_text(json.dumps(content), encoding="utf-8")
    listed = json.loads(manifest.read_text(encoding="utf-8"))
    listed["shards"][0] = content
    manifest.write_text(json.dumps(listed), encoding="utf-8")


class TestStores:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = write_store(tmp_path / "store")
        assert len(FeatureStore(folder).image_ids) == 4
        return folder

    @pytest.mark.parametrize(
        ("table", "settings", "message"),
        [
            (  # 10 MB in less than a kilobyte
                {"image_id": ["a", "b" * 10**7], "source": ["c", "d"], "label": [0, 0]},
                *({"compression": "zstd", "use_dictionary": False}, r"at most 1,056,768 bytes"),
            ),
            (  # a string that a dictionary holds once
                {"image_id": ["a" * 900_000] * 2, "source": ["c", "d"], "label": [0, 0]},
                *({"compression": "zstd"}, r"unpacks to 1,800,000 bytes; an index of 2 images has 1,056,768 at most"),
            ),
            (
                {"image_id": ["a", "b"], "source": ["c", "d"], "label": [[0] * 10**6, []]},
                *({}, "holds one value an image and column"),
            ),
            ({"image_id": ["a", "b"], "source": ["c", "d"], "label": ["x", "y"]}, {}, "is damaged"),
        ],
    )
    def test_parquet_that_unpacks_to_more(self, table: Any, settings: Any, message: str, folder: Path) -> None:
        replace_index(folder, pa.table(table), **settings)
        assert (folder / "shard-00000.parquet").stat().st_size < 2**20
        store = FeatureStore(folder)
        with pytest.raises(ValueError, match=rf"shard-00000\.parquet .*{message}"):
            _ = store.image_ids

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda m: m["parts"][0].update(num_images=10**30), "num_images must be an integer in 0…"),
            (
                lambda m: m["parts"][0].update(num_images=10**12, shard_size=1),
                "shards must hold 1000000000000 marks, got 2",
            ),
            (lambda m: m.update(complete=False), "shards must hold 0 marks, got 2"),
            (lambda m: m["parts"][0].update(first_shard=7), "parts must follow one another: one begins at shard 7"),
            (lambda m: m.update(parts=[]), "parts must hold at least one data set"),
            (lambda m: m.update(parts={}), "parts must be a list"),
            (lambda m: m["parts"][0].update(data_fingerprint=1), "data_fingerprint must be a string, got 1"),
            (lambda m: m.update(provenance=[]), r"provenance must be an object, got \[\]"),
            (lambda m: m.update(dtype="object"), "unknown dtype 'object'"),
            (lambda m: m.update(class_names=[1]), r"class_names must be names, got \[1\]"),
            (lambda m: m.update(labelled="yes"), "labelled and complete must be booleans"),
            (lambda m: m.update(label_name=3), "label_name must be a string, got 3"),
            (lambda m: m.update(more_labels=[3]), r"more_labels must be lists of names, got \[3\]"),
            (lambda m: m["shards"][0].update(shard="../../secret of x"), r"shard 0 is called '\.\./\.\./secret of x'"),
            (lambda m: m["shards"][0].update(shard=3), "shard must be a string, got 3"),
            (lambda m: m["shards"][0].update(sha256={"/../secret": "0"}), "sha256 must be of both files"),
            (lambda m: m["shards"][0].update(skipped=[1]), "skipped must be a list of sources and reasons"),
        ],
    )
    def test_manifests(self, edit: Callable[[Any], Any], message: str, folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        edit(content)
        (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            FeatureStore(folder)

    def test_an_unfinished_store_that_announces_any_number_of_shards(self, folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        content["parts"][0] |= {"num_images": 2**40, "shard_size": 1}
        (folder / "manifest.json").write_text(json.dumps(content | {"complete": False, "shards": []}), encoding="utf-8")
        assert len(FeatureStore(folder)) == 4

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b"[1]", "is no object of tensors"),
            (b"[" * 10**5, "is not valid JSON"),
            ({"up_ft1@25": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 24]}}, "its header says"),
            ({"up_ft1@25": {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}}, "its header says"),
            ({"up_ft1@25": {"dtype": "F32", "shape": [2, 0], "data_offsets": [0, 0]}}, "rows without numbers|damaged"),
        ],
    )
    def test_headers(self, header: Any, message: str, folder: Path) -> None:
        path, mark = folder / "shard-00000.safetensors", folder / "shard-00000.json"
        if isinstance(header, dict):
            says = json.loads(mark.read_text(encoding="utf-8"))["shard"]
            header = {"__metadata__": {"shard": says}} | header
        end = (
            max((e["data_offsets"][1] for n, e in header.items() if n[0] != "_"), default=0)
            if isinstance(header, dict)
            else 0
        )
        write_header(path, header, b"\0" * end)
        for file in (mark, folder / "manifest.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            (content["shards"][0] if "shards" in content else content)["bytes"][".safetensors"] = path.stat().st_size
            file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            FeatureStore(folder)

    def test_a_link_to_a_secret_is_not_pushed(self, folder: Path, hub: HubServer) -> None:
        """What is uploaded must have the SHA-256 that the store's mark says."""
        secret = folder.parent / "secret"
        secret.write_bytes(SECRET.encode().ljust((folder / "shard-00001.safetensors").stat().st_size))
        (folder / "shard-00001.safetensors").unlink()
        (folder / "shard-00001.safetensors").symlink_to(secret)
        with pytest.raises(ValueError, match="shard-00001"):
            FeatureStore(folder).push_to_hub("revelio/store")
        assert ("dataset", "revelio/store") not in hub.repos
