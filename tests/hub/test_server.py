"""The test Hub, as the real client sees it. Each process takes a second or more, so each does much."""

import hashlib
import http.client
import json
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hub_server import HubServer

RunClient = Callable[..., subprocess.CompletedProcess[str]]
LARGE = 12_000_000  # bytes: too many to travel inside a commit

PUSH = """
    import json, sys
    from huggingface_hub import HfApi
    folder, repo_id = sys.argv[1:]
    api = HfApi()
    url = api.create_repo(repo_id, exist_ok=True)
    info = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Push")
    print(json.dumps({"url": str(url), "repo_id": url.repo_id, "oid": info.oid, "user": api.whoami()["name"]}))
"""
# What a call raises, as one line: the name of the class, the status and the message.
ATTEMPT = """
    import json, sys
    from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
    api = HfApi()
    seen = {}

    def attempt(name, call, *args, **kwargs):
        try:
            seen[name] = call(*args, **kwargs)
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            seen[name] = [type(error).__name__, status, str(error)]
"""


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    (folder / "sub").mkdir()
    (folder / "config.json").write_text('{"k": 8}')
    (folder / "sub/notes.txt").write_text("notes\n")
    (folder / "empty.txt").touch()
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "large.txt").write_bytes(b"text " * (LARGE // 5))
    (folder / "weights.safetensors").write_bytes(bytes(range(250)) * (LARGE // 250))
    return folder


@pytest.fixture(scope="module")
def pushed(hub: HubServer, run_client: RunClient, folder: Path) -> dict[str, str]:
    return answer(run_client(PUSH, token=hub.token, args=(folder, "tester/pushed")))


def test_a_pushed_folder_is_one_commit(hub: HubServer, pushed: dict[str, str], folder: Path) -> None:
    assert pushed["user"] == "tester"
    assert pushed["repo_id"] == "tester/pushed"
    assert pushed["url"] == f"{hub.endpoint}/tester/pushed"
    first, commit = hub.commits("tester/pushed")
    assert set(first.files) == {".gitattributes"}
    assert (commit.oid, commit.title) == (pushed["oid"], "Push")
    assert set(commit.changed) == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    lfs = {path for path, entry in commit.files.items() if "lfs" in entry}
    assert lfs == {"weights.safetensors", "image.png", "large.txt"}  # by suffix, as binary, by size
    weights = commit.files["weights.safetensors"]
    assert weights["size"] == LARGE
    assert weights["sha256"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def test_only_what_changed_is_uploaded(hub: HubServer, run_client: RunClient, folder: Path) -> None:
    code = f"""{PUSH}
    import pathlib
    again = api.upload_folder(repo_id=repo_id, folder_path=folder)
    api.upload_file(repo_id=repo_id, path_in_repo="config.json", path_or_fileobj=b'{{"k": 16}}')
    api.upload_file(repo_id=repo_id, path_in_repo="copy.bin", path_or_fileobj=f"{{folder}}/weights.safetensors")
    print(json.dumps([info.oid, again.oid]))
    """
    start = len(hub.requests)
    done = run_client(code, token=hub.token, args=(folder, "revelio/changing"))
    first, again = answer(done)
    assert first == again
    assert "No files have been modified" in done.stderr
    commits = hub.commits("revelio/changing")
    assert [list(commit.changed) for commit in commits[2:]] == [["config.json"], ["copy.bin"]]
    requests = hub.requests[start:]
    weights = commits[1].files["weights.safetensors"]["sha256"]
    assert [path for method, path in requests if method == "PUT"].count(f"/lfs/{weights}") <= 1
    assert len([path for _, path in requests if "/commit/" in path]) == 3
    assert commits[-1].files["copy.bin"]["sha256"] == weights


def test_history(hub: HubServer, run_client: RunClient, folder: Path) -> None:
    code = f"""{PUSH}
    from huggingface_hub import hf_hub_download
    api.create_tag(repo_id, tag="v1")
    api.create_branch(repo_id, branch="dev/wide")
    dev = api.upload_file(
        repo_id=repo_id, path_in_repo="config.json", path_or_fileobj=b"dev", revision="dev/wide", commit_message="Dev"
    )
    api.delete_file("image.png", repo_id)
    last = api.delete_folder("sub", repo_id)

    def read(revision):
        return open(hf_hub_download(repo_id, "config.json", revision=revision)).read()

    try:
        api.upload_file(repo_id=repo_id, path_in_repo="a", path_or_fileobj=b"a", parent_commit=info.oid)
    except Exception as error:
        stale = str(error)
    try:
        api.create_tag(repo_id, tag="v1")
    except Exception as error:
        twice = error.response.status_code
    refs = api.list_repo_refs(repo_id)
    paths = api.get_paths_info(repo_id, ["sub", "none", "empty.txt"], revision="v1")
    print(json.dumps({{
        "oids": [info.oid, dev.oid, last.oid],
        "refs": {{ref.ref: ref.target_commit for ref in refs.branches + refs.tags}},
        "read": [read(revision) for revision in (None, "main", "v1", "dev/wide", info.oid, dev.oid)],
        "files": {{name: api.list_repo_files(repo_id, revision=name) for name in ("main", "v1")}},
        "tree": [entry.path for entry in api.list_repo_tree(repo_id, revision="v1")],
        "paths": [type(entry).__name__ for entry in paths],
        "lfs": api.model_info(repo_id, files_metadata=True).siblings[-1].lfs.size,
        "stale": stale, "twice": twice,
    }}))
    """
    seen = answer(run_client(code, token=hub.token, args=(folder, "tester/history")))
    pushed, dev, last = seen["oids"]
    assert seen["refs"] == {"refs/heads/main": last, "refs/heads/dev/wide": dev, "refs/tags/v1": pushed}
    main = '{"k": 8}'
    assert seen["read"] == [main, main, main, "dev", main, "dev"]
    assert seen["files"]["main"] == [".gitattributes", "config.json", "empty.txt", "large.txt", "weights.safetensors"]
    assert set(seen["files"]["v1"]) - set(seen["files"]["main"]) == {"image.png", "sub/notes.txt"}
    assert "sub" in seen["tree"]
    assert "sub/notes.txt" not in seen["tree"]
    assert seen["paths"] == ["RepoFolder", "RepoFile"]
    assert seen["lfs"] == LARGE
    assert "A commit has happened since" in seen["stale"]
    assert seen["twice"] == 409
    deleted = [commit.changed for commit in hub.commits("tester/history")[-2:]]
    assert deleted == [{"image.png": None}, {"sub/notes.txt": None}]


def test_download_then_offline(
    hub: HubServer, run_client: RunClient, pushed: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    code = f"""{ATTEMPT}
    attempt("folder", snapshot_download, "tester/pushed")
    attempt("file", hf_hub_download, "tester/pushed", "sub/notes.txt")
    attempt("no file", hf_hub_download, "tester/pushed", "none.txt")
    attempt("no revision", hf_hub_download, "tester/pushed", "config.json", revision="none")
    attempt("no repository", hf_hub_download, "tester/none", "config.json")
    print(json.dumps(seen))
    """
    online = answer(run_client(code, cache=tmp_path))
    snapshot = Path(online["folder"])
    assert snapshot.name == pushed["oid"]
    for path in folder.rglob("*"):
        assert path.is_dir() or (snapshot / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert [online[name][0] for name in ("no file", "no revision", "no repository")] == [
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
    ]
    start = len(hub.requests)
    offline = answer(run_client(code, cache=tmp_path, offline=True))
    assert offline["folder"] == online["folder"]
    assert offline["file"] == online["file"]
    misses = [offline[name][0] for name in ("no file", "no revision", "no repository")]
    assert misses == ["LocalEntryNotFoundError"] * 3
    assert hub.requests[start:] == []


def test_cards_and_listing(hub: HubServer, run_client: RunClient) -> None:
    code = f"""{ATTEMPT}
    from huggingface_hub import ModelCardData
    data = ModelCardData(
        license="mit", library_name="diffusion_sae", pipeline_tag="image-classification", tags=["sae", "k: 8"],
        base_model="tester/base", datasets=["tester/data"], model_name="card",
    )
    for repo_id in ("tester/card", "revelio/card", "revelio/plain"):
        api.create_repo(repo_id)
        content = f"---\\n{{data.to_yaml()}}\\n---\\n# Card\\n" if repo_id.endswith("card") else "# Plain\\n"
        ModelCard(content).push_to_hub(repo_id)
    info = api.model_info("tester/card")
    attempt("card", lambda: ModelCard.load("tester/card").data.to_dict() == data.to_dict())
    attempt("info", lambda: [info.pipeline_tag, info.library_name, info.card_data.license, info.tags])
    for name, query in {{
        "author": {{"author": "revelio"}},
        "tag": {{"filter": "sae"}},
        "tags": {{"filter": ["diffusion_sae", "base_model:tester/base", "k: 8"], "author": "revelio"}},
        "no tag": {{"filter": ["sae", "none"]}},
        "pipeline": {{"pipeline_tag": "image-classification", "author": "tester"}},
        "search": {{"search": "CARD", "limit": 1}},
    }}.items():
        seen[name] = [model.id for model in api.list_models(**query)]
    print(json.dumps(seen))
    """
    seen = answer(run_client(code, token=hub.token))
    assert seen["card"] is True
    pipeline_tag, library_name, license_name, tags = seen["info"]
    assert (pipeline_tag, library_name, license_name) == ("image-classification", "diffusion_sae", "mit")
    assert {"sae", "k: 8", "license:mit", "dataset:tester/data", "base_model:tester/base"} <= set(tags)
    assert {"revelio/card", "revelio/plain"} <= set(seen["author"])
    assert seen["tag"] == ["tester/card", "revelio/card"]
    assert seen["tags"] == ["revelio/card"]
    assert seen["no tag"] == []
    assert seen["pipeline"] == ["tester/card"]
    assert seen["search"] == ["tester/card"]


def test_rights(hub: HubServer, run_client: RunClient, folder: Path) -> None:
    for name in ("private", "gated"):
        run_client(PUSH, token=hub.token, args=(folder / "sub", f"tester/{name}"))
    hub.make_private("tester/private")
    hub.make_gated("tester/gated")
    hub.add_token("hf_token_of_other", "other")
    code = f"""{ATTEMPT}
    for name in ("private", "gated", "none"):
        attempt(name, hf_hub_download, f"tester/{{name}}", "notes.txt")
        attempt(f"{{name}} folder", snapshot_download, f"tester/{{name}}")
    attempt("info", lambda: [api.model_info("tester/gated").gated, api.repo_exists("tester/private")])
    attempt("listed", lambda: [model.id for model in api.list_models(author="tester")])
    attempt("user", lambda: api.whoami()["name"])
    attempt("create", lambda: str(api.create_repo("tester/new")))
    attempt("write", lambda: str(api.upload_file(repo_id="tester/gated", path_in_repo="a", path_or_fileobj=b"a")))
    print(json.dumps(seen))
    """
    anonymous = answer(run_client(code))
    assert anonymous["private"][:2] == anonymous["none"][:2] == ["RepositoryNotFoundError", 401]
    assert anonymous["private folder"][:2] == ["RepositoryNotFoundError", 401]
    assert anonymous["gated"][:2] == ["GatedRepoError", 401]
    assert anonymous["info"] == ["auto", False]
    assert "tester/private" not in anonymous["listed"]
    assert anonymous["create"][1] == anonymous["write"][1] == 401

    other = answer(run_client(code, token="hf_token_of_other"))
    assert other["private"][:2] == other["none"][:2] == ["RepositoryNotFoundError", 404]
    assert other["gated"][:2] == ["GatedRepoError", 403]
    assert other["user"] == "other"
    assert other["create"][1] == other["write"][1] == 403
    assert "You don't have the rights" in other["write"][2]

    owner = answer(run_client(code, token=hub.token))
    assert owner["private"].endswith("notes.txt")
    assert owner["gated"].endswith("notes.txt")
    assert owner["none"][:2] == ["RepositoryNotFoundError", 404]
    assert {"tester/private", "tester/gated"} <= set(owner["listed"])

    bad = answer(run_client(code, token="hf_wrong"))
    for name in ("private", "gated", "create", "write"):
        assert bad[name][:2] == ["HfHubHTTPError", 401]
        assert "Invalid credentials in Authorization header" in bad[name][2]
    assert "Invalid user token" in bad["user"][2]


def test_datasets(hub: HubServer, run_client: RunClient) -> None:
    code = """
    import json
    from datasets import Dataset, load_dataset
    rows = {"label": [0, 1, 2], "text": ["a", "b", "c"]}
    Dataset.from_dict(rows).push_to_hub("revelio/rows")
    back = load_dataset("revelio/rows", split="train")
    streamed = list(load_dataset("revelio/rows", split="train", streaming=True))
    print(json.dumps([back.to_dict() == rows, [row["text"] for row in streamed]]))
    """
    assert answer(run_client(code, token=hub.token)) == [True, ["a", "b", "c"]]
    commits = hub.commits("revelio/rows", repo_type="dataset")
    assert len(commits) == 2
    assert "README.md" in commits[-1].changed


def test_large_bodies_are_streamed_and_checked(hub: HubServer) -> None:
    block, count = bytes(1 << 20), 64
    sha256 = hashlib.sha256(block * count).hexdigest()
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
    tracemalloc.start()
    try:
        for name, status in ((sha256, 200), ("0" * 64, 400)):
            length = {"Content-Length": str(count * len(block))}
            connection.request("PUT", f"/lfs/{name}", body=(block for _ in range(count)), headers=length)
            response = connection.getresponse()
            assert response.status == status
            assert (b"announced" in response.read()) is (status == 400)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(block)
    finally:
        tracemalloc.stop()
        connection.close()
    assert (hub.folder / sha256).stat().st_size == count * len(block)
    assert not (hub.folder / ("0" * 64)).exists()


@pytest.mark.parametrize(
    ("asked", "status", "first", "end"),
    [
        ("bytes=0-", 206, 0, LARGE),
        ("bytes=5-9", 206, 5, 10),
        (f"bytes=7-{LARGE + 5}", 206, 7, LARGE),
        ("bytes=-10", 200, 0, LARGE),  # a suffix is not served, which HTTP allows: the whole file comes
        (f"bytes={LARGE}-", 416, 0, 0),
    ],
)
def test_ranges(
    hub: HubServer, pushed: dict[str, str], folder: Path, asked: str, status: int, first: int, end: int
) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
    connection.request("GET", "/tester/pushed/resolve/main/weights.safetensors", headers={"Range": asked})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == status
    if status != 416:
        assert body == (folder / "weights.safetensors").read_bytes()[first:end]
    if status == 206:
        assert response.headers["Content-Range"] == f"bytes {first}-{end - 1}/{LARGE}"
