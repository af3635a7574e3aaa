"""encode_features and SparseCodes against `sae.encode`: every row, every format, and what a kill leaves."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, SparseCodes, encode_features
from diffusion_sae._weights import weights_hash
from diffusion_sae.features import FeatureSet, FeatureStore, StoreWriter
from diffusion_sae.provenance import Provenance, ProvenanceMismatchError
from diffusion_sae.sae import code_files, sparse_codes
from diffusion_sae.sae.code import SparseCode

FORMATS = ("parquet", "safetensors")
ROWS, LATENTS = 103, 64
SIZES = {"batch_size": 9, "file_rows": 25, "progress": False}


def make_sae(**settings: object) -> KSparseAutoencoder:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(**{"d_in": 16, "num_latents": LATENTS, "k": 4} | settings))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-4, -0.5, LATENTS))  # latents that are never active, rows with fewer than k
    return sae.eval()


@pytest.fixture
def features(superposition: Callable[..., Tensor]) -> Tensor:
    return superposition(ROWS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (code_files, sparse_codes):
        monkeypatch.setattr(module, "CHUNK_ROWS", 10)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encode(sae: KSparseAutoencoder, features: Tensor, timesteps: Tensor | None = None) -> SparseCode:
    """In the same batches: a product's last bit depends on how many rows it is of."""
    parts = []
    with torch.no_grad():
        for shard in torch.arange(len(features)).split(SIZES["file_rows"]):
            for rows in shard.split(SIZES["batch_size"]):
                parts.append(sae.encode(features[rows], None if timesteps is None else timesteps[rows]))
    return SparseCode(*map(torch.cat, zip(*_same_width(parts), strict=True)))


def require_equal(got: SparseCode, wanted: SparseCode) -> None:
    assert torch.equal(got.to_dense(LATENTS), wanted.to_dense(LATENTS))
    assert torch.equal(got.top_acts, wanted.top_acts)
    active = wanted.top_acts != 0
    assert torch.equal(got.top_indices[active], wanted.top_indices[active])
    assert got.top_indices.dtype == wanted.top_indices.dtype
    assert not got.top_indices[~active].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["topk", "signed_topk", "jumprelu", "relu"])
def test_gives_what_encode_gives(features: Tensor, tmp_path: Path, activation: str, format: str) -> None:
    sae = make_sae(activation=activation)
    wanted = encode(sae, features)
    made = encode_features(sae, features, tmp_path / "out", format=format, **SIZES)
    assert len(made) == ROWS
    assert (made.num_latents, made.k) == (LATENTS, 4)
    assert len(list((tmp_path / "out").glob(f"*.{format}"))) == 5
    require_equal(made[:], wanted)
    require_equal(SparseCode(*map(torch.cat, zip(*_same_width(made.batches(7)), strict=True))), wanted)
    for rows in (torch.tensor([102, 0, 24, 25, 24]), [50], slice(3, 90, 4), torch.arange(ROWS) % 3 == 0):
        index = torch.tensor(rows) if isinstance(rows, list) else rows
        assert torch.equal(made[rows].to_dense(LATENTS), wanted.to_dense(LATENTS)[index])
    assert made[[]].top_acts.shape[0] == 0
    dense = wanted.to_dense(LATENTS)
    torch.testing.assert_close(made.density(), (dense != 0).float().mean(0))
    largest = torch.where(dense != 0, dense, -torch.inf).amax(0)
    assert torch.equal(made.max_acts(), torch.where(largest.isinf(), 0.0, largest))
    for latent in (0, int(made.density().argmax()), LATENTS - 1):
        rows, acts = made.for_latent(latent)
        assert torch.equal(rows, torch.nonzero(dense[:, latent]).flatten())
        assert torch.equal(acts, dense[rows, latent])
    made.verify()


def _same_width(batches: Iterable[SparseCode]) -> list[SparseCode]:
    batches = list(batches)
    width = max(batch.top_acts.shape[1] for batch in batches)
    pad = [(batch, width - batch.top_acts.shape[1]) for batch in batches]
    return [SparseCode(*(torch.nn.functional.pad(part, (0, free)) for part in batch)) for batch, free in pad]


def test_rows_without_active_latents(features: Tensor, tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    for format in FORMATS:
        made = encode_features(sae, features, tmp_path / format, format=format, **SIZES)
        assert made[:].top_acts.shape == (ROWS, 4)
        assert not made[:].top_acts.any()
        assert len(made.for_latent(3)[0]) == 0
        assert not made.density().any()
        assert not made.max_acts().any()


def test_parquet_columns_are_the_active_latents_largest_first(features: Tensor, tmp_path: Path) -> None:
    sae = make_sae()
    tokens = FeatureSet([features[:102]], rows_per_image=6, timesteps=(10, 20))
    encode_features(sae, tokens, tmp_path, **SIZES)
    table = pq.read_table([str(path) for path in sorted(tmp_path.glob("*.parquet"))])
    assert [f"{field.name}: {field.type}" for field in table.schema] == [
        "row: int64",
        "image: int32",
        "position: int32",
        "timestep: int32",
        "latents: list<element: int32>",
        "acts: list<element: float>",
    ]
    for name, wanted in (("image", tokens.image_index), ("position", tokens.positions), ("timestep", tokens.timesteps)):
        assert table[name].to_pylist() == wanted.tolist()
    code = encode(sae, features[:102])
    assert table["row"].to_pylist() == list(range(102))
    for row, (latents, acts) in enumerate(zip(table["latents"].to_pylist(), table["acts"].to_pylist(), strict=True)):
        active = code.top_acts[row] != 0
        assert acts == code.top_acts[row][active].tolist() == sorted(acts, reverse=True)
        assert latents == code.top_indices[row][active].tolist()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("killed_at", [0, 4, 9])
def test_a_killed_call_is_gone_on_with_and_gives_the_same_bytes(
    features: Tensor,
    tmp_path: Path,
    format: str,
    killed_at: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sae = make_sae()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    encode_features(sae, features, whole, format=format, **SIZES)
    whole_encode, calls = sae.encode, []

    def fail(*arguments: object) -> SparseCode:
        calls.append(arguments)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return whole_encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sae, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            encode_features(sae, features, killed, format=format, **SIZES)
        (killed / ".codes-00003.parquet.abc.tmp").write_bytes(b"half")
        with pytest.raises(FileNotFoundError, match=r"lack \d of 5 shards: codes-0000\d\.\w+ and .* missing"):
            SparseCodes(killed)
    with caplog.at_level(logging.INFO, "diffusion_sae.sae.encoding"):
        encode_features(sae, features, killed, format=format, **SIZES)
    assert ("resuming at shard" in caplog.text) == (killed_at > 0)  # a shard has three batches
    assert shards(killed) == shards(whole)
    encode_features(sae, features, killed, format=format, **SIZES)
    assert shards(killed) == shards(whole)


def test_a_kill_between_a_shard_and_its_mark(features: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make_sae()
    encode_features(sae, features, tmp_path / "whole", **SIZES)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(code_files, "sha256_of", fail)
        with pytest.raises(OSError, match="no space left"):
            encode_features(sae, features, tmp_path / "killed", **SIZES)
    assert (tmp_path / "killed/codes-00000.parquet").exists()
    encode_features(sae, features, tmp_path / "killed", **SIZES)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_and_missing_shards_are_named_and_made_anew_alone(
    features: Tensor, tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    sae = make_sae()
    encode_features(sae, features, tmp_path, format=format, **SIZES)
    before = shards(tmp_path)
    short, gone, changed = (tmp_path / f"codes-0000{number}.{format}" for number in (1, 3, 4))
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"lack 1 of 5 shards: {short.name} is damaged: \d+ bytes instead of \d+"):
        SparseCodes(tmp_path)
    gone.unlink()
    with pytest.raises(ValueError, match=rf"lack 2 of 5 shards: .*{gone.name} missing.*Call encode_features again"):
        SparseCodes(tmp_path)
    untouched = (tmp_path / f"codes-00000.{format}").stat().st_mtime_ns
    encode_features(sae, features, tmp_path, format=format, **SIZES)
    assert "made anew" in caplog.text
    assert shards(tmp_path) == before
    assert (tmp_path / f"codes-00000.{format}").stat().st_mtime_ns == untouched
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 255
    changed.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{changed.name} is not what was written.*Delete {changed.name}"):
        SparseCodes(tmp_path, verify=True)
    changed.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=rf"{changed.name} is damaged"):
        SparseCodes(tmp_path)[100:]


def test_a_shard_of_another_folder_is_found_out(features: Tensor, tmp_path: Path) -> None:
    sae = make_sae()
    for name, rows in (("a", features), ("b", features + 1)):
        encode_features(sae, rows, tmp_path / name, **SIZES)
    for suffix in (".parquet", ".json"):
        (tmp_path / f"a/codes-00002{suffix}").write_bytes((tmp_path / f"b/codes-00002{suffix}").read_bytes())
    with pytest.raises(ValueError, match=r"codes-00002.parquet is of another folder"):
        SparseCodes(tmp_path / "a")


def test_another_sae_other_features_and_other_files_are_refused_with_both_named(
    features: Tensor, tmp_path: Path, provenance: Provenance
) -> None:
    sae, of_store = make_sae(), FeatureSet([features], provenance=provenance)
    encode_features(sae, of_store, tmp_path, **SIZES)
    before = shards(tmp_path)
    weights = SparseCodes(tmp_path).manifest.sae["weights"]
    other = make_sae()
    with torch.no_grad():
        other.W_dec[0, 0] += 1
    with pytest.raises(ValueError, match=rf"of another SAE.\n  there: .*{weights}\n  given: .*k 4 · topk · weights"):
        encode_features(other, of_store, tmp_path, **SIZES)
    with pytest.raises(ValueError, match=r"(?s)of another SAE.*there: .*· k 4 .*given: .*· k 3 "):
        encode_features(make_sae(k=3), of_store, tmp_path, **SIZES)
    others = FeatureSet([features + 1], provenance=dataclasses.replace(provenance, timesteps=(100,)))
    with pytest.raises(ValueError, match=r"(?s)of other features.*there: 103 rows .*t=25.*given: 103 rows .*t=100"):
        encode_features(sae, others, tmp_path, **SIZES)
    with pytest.raises(ValueError, match=r"(?s)another format.*there: format 'parquet'.*given: format 'safetensors'"):
        encode_features(sae, of_store, tmp_path, format="safetensors", **SIZES)
    with pytest.raises(ValueError, match=r"(?s)another file_rows.*there: file_rows 25.*given: file_rows 50"):
        encode_features(sae, of_store, tmp_path, **SIZES | {"file_rows": 50})
    assert shards(tmp_path) == before
    assert SparseCodes(tmp_path).provenance == provenance


def test_what_is_refused_before_anything_is_written(features: Tensor, tmp_path: Path, provenance: Provenance) -> None:
    sae, out = make_sae(), tmp_path / "out"
    sae.provenance = provenance
    other = FeatureSet([features], provenance=dataclasses.replace(provenance, timesteps=(100,)))
    with pytest.raises(ProvenanceMismatchError, match="differ in timesteps"):
        encode_features(sae, other, out)
    with pytest.raises(ValueError, match="width d_in = 16"):
        encode_features(sae, features[:, :15], out)
    with pytest.raises(ValueError, match="format must be one of 'parquet', 'safetensors', got 'csv'"):
        encode_features(sae, features, out, format="csv")
    for name in ("batch_size", "file_rows"):
        with pytest.raises(ValueError, match=f"{name} must be an integer ≥ 1, got 0"):
            encode_features(sae, features, out, **{name: 0})
    assert not out.exists()
    assert len(encode_features(sae, other, out, allow_mismatch=True, progress=False)) == ROWS


def test_a_folder_of_something_else_is_left_alone(features: Tensor, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"is not of sparse codes .*Choose another folder"):
        encode_features(make_sae(), features, tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "sparse-codes", "format_version": 9}')
    with pytest.raises(ValueError, match="format version 9; this library reads 1"):
        SparseCodes(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "sparse-codes", "format_version": 1}')
    with pytest.raises(ValueError, match="is damaged: it lacks format, num_latents"):
        SparseCodes(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no sparse codes in .*encode_features"):
        SparseCodes(tmp_path / "none")


def test_rows_and_latents_that_are_not_there(features: Tensor, tmp_path: Path) -> None:
    made = encode_features(make_sae(), features, tmp_path, **SIZES)
    with pytest.raises(IndexError, match=r"Rows must lie in 0…102, got 0…103"):
        made[[0, 103]]
    with pytest.raises(IndexError, match=r"one entry a row, 103, got the shape \(5,\)"):
        made[torch.ones(5, dtype=torch.bool)]
    with pytest.raises(IndexError, match=r"slice or a list of numbers, got the shape \(\)"):
        made[3]  # type: ignore[index]
    with pytest.raises(ValueError, match="latent_index must be an integer in 0…63, got 64"):
        made.for_latent(64)
    with pytest.raises(ValueError, match="batch_size must be an integer ≥ 1, got 0"):
        next(made.batches(0))


def test_timesteps_reach_the_sae(features: Tensor, tmp_path: Path) -> None:
    sae = make_sae(timesteps=[10, 20, 30])
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
        sae.timestep_scale.copy_(torch.tensor([1.0, 2.0, 0.5]))
    rows = FeatureSet([features[:102]], rows_per_image=2, timesteps=(30, 10))
    made = encode_features(sae, rows, tmp_path / "out", **SIZES)
    require_equal(made[:], encode(sae, features[:102], rows.timesteps))
    with pytest.raises(ValueError, match=r"for the timesteps \[10, 20, 30\], and the features do not say which"):
        encode_features(sae, features, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"the features are also of \[40\]"):
        encode_features(sae, FeatureSet([features], timesteps=(40,)), tmp_path / "unknown")


def test_no_more_than_a_few_batches_are_read_at_a_time(
    features: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a store, ahead of the model by two batches at most; and back, a chunk at a time."""
    record = Provenance(model="m", layers=("up_ft1",), timesteps=(25,), weights="abc")
    ids = [str(row) for row in range(ROWS)]
    writer = StoreWriter(
        tmp_path / "store", record, source_names=ids, labels=[0] * ROWS, class_names=None, shard_size=40
    )
    for number in writer.missing:
        shard, rows = writer.new_shard(), writer.part.rows(number)
        names = [ids[row] for row in rows]
        shard.add({("up_ft1", 25): features[rows.start : rows.stop]}, names, names, [0] * len(rows))
        writer.write(number, shard)
    writer.finish()
    stored = FeatureStore(tmp_path / "store").select("up_ft1", 25)
    sae, sizes, encoded = make_sae(), [], []
    own_encode, between = sae.encode, FeatureSet._between

    def read(self: FeatureSet, start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        assert len(sizes) <= len(encoded) + 3
        return between(self, start, stop)

    def encode_and_note(batch: Tensor, timesteps: Tensor | None) -> SparseCode:
        encoded.append(len(batch))
        return own_encode(batch, timesteps)

    monkeypatch.setattr(FeatureSet, "_between", read)
    monkeypatch.setattr(sae, "encode", encode_and_note)
    made = encode_features(sae, stored, tmp_path / "out", **SIZES)
    assert max(sizes) == 9
    assert sum(encoded) == ROWS
    chunks = []

    def read_chunk(path: Path, start: int, stop: int) -> code_files.ActiveLatents:
        chunks.append((path.name, start, stop))
        return code_files.read_chunk(path, start, stop)

    monkeypatch.setattr(sparse_codes, "read_chunk", read_chunk)
    assert sum(len(batch.top_acts) for batch in made.batches(4)) == ROWS
    assert max(stop - start for _, start, stop in chunks) == 10
    assert len(chunks) == len(set(chunks)) == 13  # each once
    chunks.clear()
    made[[99, 2, 1]]
    assert chunks == [("codes-00000.parquet", 0, 10), ("codes-00003.parquet", 20, 25)]


def test_the_manifest_names_the_sae_as_it_was_loaded(features: Tensor, tmp_path: Path) -> None:
    make_sae().save_pretrained(tmp_path / "sae")
    sae = KSparseAutoencoder.from_pretrained(tmp_path / "sae")
    manifest = encode_features(sae, features, tmp_path / "out", **SIZES).manifest
    assert manifest.sae["name"] == str(tmp_path / "sae")
    # under another name it is the same
    again = encode_features(make_sae(), features, tmp_path / "out", **SIZES).manifest
    assert again == manifest
    assert manifest.sae["weights"] == weights_hash({"sae": make_sae()}, {})
