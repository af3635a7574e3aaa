"""Feature stores as dataset repositories: pushed by one process, opened and streamed by others. See test_hub.py."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer

RunClient = Callable[..., subprocess.CompletedProcess[str]]
STORE, PRIVATE, MODEL = "revelio/shapes-features", "revelio/private-features", "revelio/an-sae"

NAMES = f"""
    import json, shutil, sys
    from pathlib import Path
    import torch
    from diffusion_sae import FeatureStore
    STORE, PRIVATE, MODEL = {STORE!r}, {PRIVATE!r}, {MODEL!r}
    LAYERS, TIMESTEPS = ("bottleneck", "up_ft1"), (25, 100)
    KEYS = [(layer, t) for layer in LAYERS for t in TIMESTEPS]
    seen = {{}}

    def features():
        generator = torch.Generator().manual_seed(0)
        return {{key: torch.randn(8, 4, 6, generator=generator).half() for key in KEYS}}

    def attempt(name, call, *args, **kwargs):
        try:
            seen[name] = str(call(*args, **kwargs))
        except (ValueError, OSError) as error:
            seen[name] = [type(error).__name__, str(error)]
"""
PUSH = (
    NAMES
    + """
    from huggingface_hub import DatasetCard, HfApi
    from diffusion_sae.features import LabelSet, StoreWriter
    from diffusion_sae.provenance import Provenance

    def write(folder, shard_size):
        record = Provenance(model="some/model", layers=LAYERS, timesteps=TIMESTEPS, pooling="tokens", weights="abc")
        names, labels, sizes = [f"{i}.png" for i in range(8)], [0, 1] * 4, [0, 0, 1, 1] * 2
        writer = StoreWriter(folder, record, source_names=names, labels=labels, class_names=["square", "disc"],
                             shard_size=shard_size, store_dtype="float16",
                             more_labels={"size": LabelSet(sizes, ["small", "large"])})
        for number in writer.missing:
            shard, rows = writer.new_shard(), writer.part.rows(number)
            values = {key: value[rows.start : rows.stop] for key, value in features().items()}
            shard.add(values, [f"id-{i}" for i in rows], [names[i] for i in rows], [labels[i] for i in rows],
                      {"size": [sizes[i] for i in rows]})
            writer.write(number, shard)
        unfinished = FeatureStore(folder)
        writer.finish()
        return unfinished

    (work,) = sys.argv[1:]
    api = HfApi()
    unfinished = write(work + "/small-shards", 2)
    attempt("unfinished", unfinished.push_to_hub, STORE)
    store = FeatureStore(work + "/small-shards")
    seen["url"] = store.push_to_hub(STORE)
    seen["files"] = api.list_repo_files(STORE, repo_type="dataset")
    seen["card"] = DatasetCard.load(STORE).content

    card = DatasetCard.load(STORE)
    card.data.license = "cc-by-4.0"
    card.push_to_hub(STORE)
    write(work + "/store", 3)  # other shards: what is left of the old ones must go
    FeatureStore(work + "/store").push_to_hub(STORE, commit_message="Larger shards")
    seen["license"] = DatasetCard.load(STORE).data.license
    seen["url_of_branch"] = FeatureStore(work + "/small-shards").push_to_hub(STORE, revision="small")
    FeatureStore(work + "/store").push_to_hub(PRIVATE, private=True)
    api.create_repo(MODEL)
    api.create_repo("revelio/no-store", repo_type="dataset")

    damaged = Path(work + "/damaged")
    shutil.copytree(work + "/store", damaged)
    content = bytearray((damaged / "shard-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "shard-00001.safetensors").write_bytes(content)
    attempt("damaged", FeatureStore(damaged).push_to_hub, "revelio/damaged")
    print(json.dumps(seen))
"""
)
LOAD = (
    NAMES
    + """
    store, expected = FeatureStore.from_hub(STORE), features()
    store.verify()
    seen["repr"] = repr(store)
    seen["equal"] = all(torch.equal(store.select(*key)[:], expected[key].flatten(0, 1).float()) for key in KEYS)
    seen["labels"], seen["classes"] = store.labels.tolist(), store.class_names
    sizes = store.select(*KEYS[0], labels="size")
    seen["sizes"] = [sizes.image_labels.tolist(), sizes.class_names]
    seen["fingerprint"] = store.provenance.fingerprint
    seen["shards"] = [len(FeatureStore.from_hub(STORE, revision=r).marks) for r in (None, "small")]
    elsewhere = FeatureStore.from_hub(STORE, cache_dir=sys.argv[1])
    seen["elsewhere"] = str(elsewhere.path).startswith(sys.argv[1])

    attempt("missing", FeatureStore.from_hub, "revelio/missing")
    attempt("private", FeatureStore.from_hub, PRIVATE)
    attempt("model", FeatureStore.from_hub, MODEL)
    attempt("no store", FeatureStore.from_hub, "revelio/no-store")
    attempt("revision", FeatureStore.from_hub, STORE, revision="v9")
    attempt("stream missing", FeatureStore.stream, "revelio/missing", "up_ft1", 25)
    attempt("stream model", FeatureStore.stream, MODEL, "up_ft1", 25)
    attempt("stream no store", FeatureStore.stream, "revelio/no-store", "up_ft1", 25)
    attempt("stream labels", FeatureStore.stream, STORE, "up_ft1", 25, labels="colour")
    attempt("stream layer", FeatureStore.stream, STORE, "up_ft9", 25)
    print(json.dumps(seen))
"""
)
STREAM = (
    NAMES
    + """
    expected = features()["up_ft1", 100]
    first = next(FeatureStore.stream(PRIVATE, "up_ft1", 100))
    seen["first"] = torch.equal(first[:], expected[:3].flatten(0, 1).float())
    seen["row"] = [first.rows_per_image, first.labels.tolist(), list(first.image_ids), first.provenance.timesteps]
    parts = list(FeatureStore.stream(STORE, "up_ft1", 100))
    seen["equal"] = torch.equal(torch.cat([part[:] for part in parts]), expected.flatten(0, 1).float())
    seen["images"] = [part.num_images for part in parts]
    by_size = list(FeatureStore.stream(STORE, "up_ft1", 100, labels="size"))
    seen["sizes"] = [torch.cat([part.image_labels for part in by_size]).tolist(), by_size[0].class_names]
    import os
    seen["on the disk"] = [str(p) for p in Path(os.environ["HF_HOME"]).rglob("*") if "shard" in p.name]
    print(json.dumps(seen))
"""
)
CACHED = (
    NAMES
    + """
    seen["images"] = len(FeatureStore.from_hub(STORE, local_files_only=True))
    attempt("uncached", FeatureStore.from_hub, PRIVATE, local_files_only=True)
    print(json.dumps(seen))
"""
)


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pushed(hub: HubServer, run_client: RunClient, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return answer(run_client(PUSH, token=hub.token, args=(tmp_path_factory.mktemp("stores"),)))


def test_a_push_is_one_commit_to_a_dataset_repository(hub: HubServer, pushed: Any) -> None:
    shards = [f"shard-0000{i}.{kind}" for i in range(4) for kind in ("json", "parquet", "safetensors")]
    assert sorted(pushed["files"]) == sorted([".gitattributes", "README.md", "manifest.json", *shards])
    commits = hub.commits(STORE, "dataset")
    titles = [commit.title for commit in commits]
    assert titles[:2] == ["initial commit", "Upload features with diffusion_sae"]
    assert set(commits[1].changed) == {"README.md", "manifest.json", *shards}
    assert pushed["url"].endswith(commits[1].oid)
    assert hub.repos["dataset", PRIVATE].private
    assert not hub.repos["dataset", STORE].private


def test_another_push_replaces_the_store(hub: HubServer, pushed: Any) -> None:
    (commit,) = [commit for commit in hub.commits(STORE, "dataset") if commit.title == "Larger shards"]
    assert {name for name, entry in commit.changed.items() if entry is None} == {
        f"shard-00003.{kind}" for kind in ("json", "parquet", "safetensors")
    }
    assert len([name for name in commit.files if name.startswith("shard-")]) == 9
    assert pushed["license"] == "cc-by-4.0"  # what the user wrote into the card
    assert "small" in hub.repos["dataset", STORE].refs["branch"]


def test_the_card(pushed: Any) -> None:
    card = pushed["card"]
    assert "- diffusion_sae\n- bottleneck\n- up_ft1\n- timestep-25\n- timestep-100" in card
    assert "license:" not in card
    assert f'FeatureStore.from_hub("{STORE}")' in card
    assert "Activations of `some/model` on 8 images" in card
    assert "| labels | square, disc |" in card
    assert "| labels `size` | small, large |" in card
    assert "| type of the stored numbers | float16 |" in card
    assert "| pooling | `tokens` |" in card
    assert "| weights | `abc` |" in card


def test_what_is_not_pushed(hub: HubServer, pushed: Any) -> None:
    kind, message = pushed["unfinished"]
    assert (kind, "is unfinished. Call extract again" in message) == ("ValueError", True)
    kind, message = pushed["damaged"]
    assert kind == "ValueError"
    assert "content of shard-00001.safetensors" in message
    assert ("dataset", "revelio/damaged") not in hub.repos


def test_from_hub(hub: HubServer, run_client: RunClient, pushed: Any, tmp_path: Path) -> None:
    cache = tmp_path / "hf_home"
    seen = answer(run_client(LOAD, cache=cache, args=(tmp_path / "elsewhere",)))
    assert seen["equal"]
    assert "8 images" in seen["repr"]
    assert (seen["labels"], seen["classes"]) == ([0, 1] * 4, ["square", "disc"])
    assert seen["sizes"] == [[0, 0, 1, 1] * 2, ["small", "large"]]
    assert seen["shards"] == [3, 4]
    assert seen["elsewhere"]
    for name in ("missing", "private", "stream missing"):
        kind, message = seen[name]
        assert kind == "FileNotFoundError", name
        assert "There is no data set on the Hub that you may read" in message, name
    for name in ("model", "stream model"):
        assert seen[name][0] == "FileNotFoundError", name
        assert f"No features can be loaded from {MODEL!r}. It is the name of a model repository" in seen[name][1], name
    assert "it has no manifest.json" in seen["no store"][1]
    assert "'revelio/no-store' has no file manifest.json" in seen["stream no store"][1]
    assert f"The data set {STORE!r} has no branch, tag or commit 'v9'" in seen["revision"][1]
    assert "layer must be one of 'bottleneck', 'up_ft1', got 'up_ft9'" in seen["stream layer"][1]
    assert "have no labels 'colour'. Their labels: 'label', 'size'." in seen["stream labels"][1]

    offline = answer(run_client(CACHED, cache=cache, offline=True))
    assert offline["images"] == 8
    assert f"The data set {PRIVATE!r} is not in the cache" in offline["uncached"][1]


def test_streaming_downloads_one_tensor_of_one_shard_at_a_time(
    hub: HubServer, run_client: RunClient, pushed: Any
) -> None:
    before = len(hub.requests)
    seen = answer(run_client(STREAM, token=hub.token))
    assert seen["first"]
    assert seen["row"] == [4, [0] * 4 + [1] * 4 + [0] * 4, ["id-0", "id-1", "id-2"], [100]]
    assert seen["equal"]
    assert seen["images"] == [3, 3, 2]
    assert seen["sizes"] == [[0, 0, 1, 1] * 2, ["small", "large"]]
    assert seen["on the disk"] == []
    asked = [path for method, path in hub.requests[before:] if method == "GET" and "/resolve/" in path]
    # of the private store only the first shard was asked for
    assert not [path for path in asked if PRIVATE in path and "shard-00001" in path]
    assert [path for path in asked if PRIVATE in path and "shard-00000.safetensors" in path]
