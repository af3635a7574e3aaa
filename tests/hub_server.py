"""A small Hugging Face Hub on 127.0.0.1, complete enough for the real `huggingface_hub` client (2.4).

`with HubServer(folder) as hub:`, in a new process HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET=1.
`hub.faults` are what goes wrong, and POST /faults sets them from another process.
Served: ROUTES, for models and datasets. Not served: spaces, discussions, Xet, multipart uploads, pages, `expand`.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Json = dict[str, Any]
LFS_BYTES = 10_000_000  # a file of this size or more never travels inside a commit
LFS_SUFFIX = r".*\.(7z|arrow|bin|ckpt|gz|h5|msgpack|np[yz]|onnx|parquet|pickle|pkl|pth?|safetensors|tar|zip)"
CARD = {"tags": "", "language": "", "library_name": "", "pipeline_tag": ""}  # the keys read from a card → tag prefix
CARD |= {"license": "license:", "datasets": "dataset:", "base_model": "base_model:"}
CHOICES = {
    "base_model_relation": ("adapter", "finetune", "merge", "quantized"),
    "pipeline_tag": ("image-classification", "image-feature-extraction"),  # of those the Hub has, what we use
    "license": ("apache-2.0", "cc-by-4.0", "mit", "other"),
}
REPO = "/api/(models|datasets)/([^/]+(?:/[^/]+)??)"
ROUTES = [  # methods, path, the right that the caller needs to the repository, method of Handler
    ("POST", "/faults", "", "set_faults"),
    ("GET", "/api/whoami-v2", "", "whoami"),
    ("POST", "/api/validate-yaml", "", "validate_yaml"),
    ("POST", "/api/repos/create", "", "create_repo"),
    ("GET", "/api/(models|datasets)", "", "list_repos"),
    ("GET", f"{REPO}/refs", "info", "list_refs"),
    ("GET POST", f"{REPO}/(?:tree|paths-info)/([^/]+)(?:/(.+))?", "files", "tree"),
    ("GET", f"{REPO}(?:/revision/([^/]+))?", "info", "info"),
    ("POST", f"{REPO}/preupload/([^/]+)", "write", "preupload"),
    ("POST", f"{REPO}/commit/([^/]+)", "write", "commit"),
    ("POST", f"{REPO}/(branch|tag)/([^/]+)", "write", "create_ref"),
    ("POST", r"/(datasets/)?([^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch", "write", "lfs_batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "", "lfs_upload"),
    ("GET", "/(datasets/)?([^/]+(?:/[^/]+)??)/resolve/([^/]+)/(.+)", "files", "resolve"),
]


def card_errors(text: str) -> list[str]:
    """What the Hub has against a card's metadata, as far as its documentation says what may be there."""
    card, found = yaml.safe_load(text.split("\n---")[0].removeprefix("---")) or {}, []
    for key, allowed in CHOICES.items():
        if key in card and card[key] not in allowed:
            found.append(f'"{key}" must be one of {", ".join(allowed)}')
    for key in ("tags", "datasets"):
        if any(not isinstance(entry, str) for entry in card.get(key, [])):
            found.append(f'"{key}" must be an array of strings')
    for model in card.get("model-index", []):
        for result in model["results"] if model.get("name") and model.get("results") else [{}]:
            of = {key: result.get(key) or {} for key in ("task", "dataset")}
            numbers = result.get("metrics") or [{}]
            complete = of["task"].get("type") and of["dataset"].get("type") and of["dataset"].get("name")
            if not complete or not all("type" in metric and "value" in metric for metric in numbers):
                found.append(f'"model-index" is incomplete: {result}')
    return found


class HubError(Exception): ...  # status and headers of an answer; the client chooses its exception by X-Error-Code


def require(condition: object, status: int, message: str, code: str = "", **headers: str) -> None:
    if not condition:
        raise HubError(status, {"X-Error-Message": message, "X-Error-Code": code, **headers})


@dataclass
class Fault:
    """Goes wrong `times` times, where method and path fit: 500; reset (the connection, at once); cut (after half of the
    content); drip (a few bytes at a time); hang (nothing is answered until the server ends)."""

    how: str
    path: str
    method: str = "GET"
    times: int = 1


@dataclass(frozen=True)
class Commit:
    """The tree after it, path → entry {oid, sha256, size, etag, lfs?}, and what it changed (None: deleted)."""

    oid: str
    title: str
    files: dict[str, Json]
    changed: dict[str, Json | None]


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool = False
    history: dict[str, Commit] = field(default_factory=dict)  # oldest first, all branches
    refs: dict[str, dict[str, str]] = field(
        default_factory=lambda: {"branch": {}, "tag": {}, "pr": {}}
    )  # name → commit

    def at(self, revision: str) -> Commit:
        oid = next((refs[revision] for refs in self.refs.values() if revision in refs), revision)
        require(oid in self.history, 404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def commit(self, branch: str, title: str, files: dict[str, Json]) -> str:
        before = self.at(branch).files if self.history else {}
        changed = {path: files.get(path) for path in before | files if files.get(path) != before.get(path)}
        kind = "pr" if branch.startswith("refs/pr/") else "branch"
        self.refs[kind][branch] = oid = hashlib.sha1(f"{self.id} {len(self.history)} {files}".encode()).hexdigest()
        self.history[oid] = Commit(oid, title, files, changed)
        return oid


class HubServer(ThreadingHTTPServer):
    """Repositories and commits are in memory, the contents of files in `folder`, each named by its sha256."""

    def __init__(self, folder: str | Path, orgs: Iterable[str] = ("revelio",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.socket.listen(64)  # snapshot_download connects with many threads at once
        self.folder = Path(folder)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []  # (method, path without query), in order of arrival
        self.repos: dict[tuple[str, str], Repo] = {}  # (model | dataset, id) → repository
        self.faults: list[Fault] = []
        self.ended = threading.Event()
        self.lock = threading.Lock()  # held during a commit
        self.token = "hf_token_of_tester"
        self.users: dict[str, tuple[str, ...]] = {self.token: ("tester", *orgs)}  # token → user, organisations
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def add_token(self, token: str, user: str, orgs: Iterable[str] = ()) -> None:
        self.users[token] = (user, *orgs)

    def commits(self, repo_id: str, repo_type: str = "model") -> list[Commit]:
        """All commits, oldest first. As on the Hub, the first is made by create_repo and holds .gitattributes."""
        return list(self.repos[repo_type, repo_id].history.values())

    def make_private(self, repo_id: str, repo_type: str = "model") -> None:
        self.repos[repo_type, repo_id].private = True

    def make_gated(self, repo_id: str, repo_type: str = "model") -> None:
        self.repos[repo_type, repo_id].gated = True

    def store(self, blocks: Iterable[bytes], announced: str = "") -> str:
        """Stream `blocks` into a file named by its sha256, which must be the one `announced`."""
        digest, part = hashlib.sha256(), self.folder / f"{threading.get_ident()}.part"
        with part.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
        sha256 = part.rename(self.folder / digest.hexdigest()).name
        require(announced in ("", sha256), 400, f"The content has sha256 {sha256}, announced was {announced}")
        return sha256

    def entry(self, sha256: str, lfs: bool = False) -> Json:
        """What a commit holds of a stored file: `oid` is git's id, of an LFS file that of its pointer."""
        path = self.folder / sha256
        require(path.is_file(), 400, f"LFS object {sha256} was not uploaded")
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        data = pointer if lfs else path.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"oid": oid, "blobId": oid, "sha256": sha256, "size": size, "etag": sha256 if lfs else oid}
        return entry | ({"lfs": {**entry, "oid": sha256, "pointerSize": len(pointer)}} if lfs else {})


class Handler(BaseHTTPRequestHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def dispatch(self) -> Any:
        url, method = urlsplit(self.path), self.command.replace("HEAD", "GET")
        self.server.requests.append((self.command, url.path))
        fits = (
            f for f in self.server.faults if f.times > 0 and f.method == self.command and re.search(f.path, url.path)
        )
        self.fault = next(fits, None)
        if self.fault is not None:
            self.fault.times -= 1
            if self.fault.how == "hang":
                self.server.ended.wait()
            if self.fault.how in ("hang", "reset"):
                return self.reset()
        size, step = int(self.headers.get("Content-Length") or 0), 1 << 20
        self.blocks = (self.rfile.read(min(step, size - start)) for start in range(0, size, step))
        self.query, self.body = parse_qs(url.query), b"" if url.path.startswith("/lfs/") else b"".join(self.blocks)
        try:
            require(self.fault is None or self.fault.how != "500", 500, "Internal Server Error")
            for methods, pattern, right, name in ROUTES:
                if method in methods and (match := re.fullmatch(pattern, url.path)):
                    groups = [unquote(group or "") for group in match.groups()]
                    return getattr(self, name)(*([self.repo(right, *groups[:2]), *groups[2:]] if right else groups))
            require(False, 404, f"The test Hub does not serve {method} {url.path}")
        except HubError as error:
            self.reply({"error": error.args[1]["X-Error-Message"]}, *error.args)

    do_HEAD = do_GET = do_POST = do_PUT = dispatch  # noqa: N815

    def reset(self) -> None:
        """As of a server that was killed: the client gets no end of the answer, but an error of the connection."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def set_faults(self) -> None:
        self.server.faults = [Fault(**fault) for fault in json.loads(self.body)]
        self.reply({})

    def log_message(self, format: str, *args: object) -> None: ...

    def reply(self, answer: Any, status: int = 200, headers: Json | None = None) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def names(self) -> tuple[str, ...]:  # the caller and their organisations, () without a token
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        require(not token or token in self.server.users, 401, "Invalid credentials in Authorization header")
        return self.server.users.get(token, ())

    def repo(self, right: str, kind: str, repo_id: str) -> Repo:
        key, names = (kind.rstrip("s/") or "model", repo_id), self.names()
        repo, member = self.server.repos.get(key, Repo("", private=True)), repo_id.split("/")[0] in names
        message = "Repository not found" if names else "Invalid username or password."
        require(repo.id and (member or not repo.private), 404 if names else 401, message, "RepoNotFound")
        status = 403 if names else 401
        require(member or right != "write", status, f"You don't have the rights to write to {repo_id}")
        require(member or right != "files" or not repo.gated, status, f"Access to {repo_id} is restricted", "GatedRepo")
        return repo

    def whoami(self) -> None:
        require(names := self.names(), 401, "Invalid username or password.")
        self.reply({"type": "user", "name": names[0], "orgs": [{"type": "org", "name": name} for name in names[1:]]})

    def validate_yaml(self) -> None:
        errors = [{"message": message} for message in card_errors(json.loads(self.body)["content"])]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self) -> None:
        asked, names = json.loads(self.body), self.names()
        kind, owner = asked.get("type") or "model", asked.get("organization") or "".join(names[:1])
        require(owner in names, 403 if names else 401, f"You don't have the rights to create a {kind} under {owner}")
        repo = Repo(f"{owner}/{asked['name']}", asked.get("visibility") == "private")
        exists = (kind, repo.id) in self.server.repos
        if not exists:
            attributes = self.server.store([b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"])
            repo.commit("main", "initial commit", {".gitattributes": self.server.entry(attributes)})
            self.server.repos[kind, repo.id] = repo
        url = f"{self.server.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo.id}"
        self.reply({"url": url, "error": f"This {kind} exists" if exists else None}, 409 if exists else 200)

    def info(self, repo: Repo, revision: str) -> None:
        self.reply(self.describe(repo, repo.at(revision or "main"), "blobs" in self.query))

    def list_repos(self, kind: str) -> None:
        names, tags = self.names(), {*self.query.get("filter", []), *self.query.get("pipeline_tag", [])}
        author, search, limit = (self.query.get(key, [""])[0] for key in ("author", "search", "limit"))
        repos = [repo for (of_kind, _), repo in list(self.server.repos.items()) if f"{of_kind}s" == kind]
        found = [self.describe(repo, repo.at("main")) for repo in repos if search.lower() in repo.id.lower()]
        found = [info for info in found if author in ("", info["author"]) and tags <= {*info["tags"]}]
        self.reply([info for info in found if not info["private"] or info["author"] in names][: int(limit or 1000)])

    def describe(self, repo: Repo, commit: Commit, sizes: bool = False) -> Json:
        """What model_info shows. Of the card, the keys in CARD, as text: enough YAML for what the client writes."""
        readme = commit.files.get("README.md")
        text = (self.server.folder / readme["sha256"]).read_text("utf-8").split("\n---")[0] if readme else ""
        found = re.findall(rf"^({'|'.join(CARD)}): *(.*)((?:\n *- .*)*)", text, re.MULTILINE)
        card = {key: one.strip("'\"") or re.findall(r"- ['\"]?(.+?)['\"]?(?:\n|$)", many) for key, one, many in found}
        tags = [CARD[key] + tag for key, tags in card.items() for tag in ([tags] if isinstance(tags, str) else tags)]
        files = [{"rfilename": path, **(commit.files[path] if sizes else {})} for path in sorted(commit.files)]
        info = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid, "tags": tags, "cardData": card}
        info |= {"private": repo.private, "gated": "auto" if repo.gated else False, "siblings": files}
        return info | {key: card.get(key) for key in ("pipeline_tag", "library_name")}

    def list_refs(self, repo: Repo) -> None:
        requests = [{"name": n, "ref": n, "targetCommit": oid} for n, oid in repo.refs["pr"].items()]
        answer: Json = {"converts": [], "pullRequests": requests}
        for key, kind, ref in (("branches", "branch", "refs/heads/"), ("tags", "tag", "refs/tags/")):
            answer[key] = [{"name": n, "ref": ref + n, "targetCommit": oid} for n, oid in repo.refs[kind].items()]
        self.reply(answer)

    def create_ref(self, repo: Repo, kind: str, target: str) -> None:
        asked = json.loads(self.body)
        name, start = (target, asked.get("startingPoint", "main")) if kind == "branch" else (asked["tag"], target)
        require(name not in repo.refs[kind], 409, f"Reference already exists: {name}")
        repo.refs[kind][name] = repo.at(start).oid
        self.reply({})

    def tree(self, repo: Repo, revision: str, folder: str) -> None:  # a POST is paths-info: the entries asked for
        commit, start, found = repo.at(revision), f"{folder}/" if folder else "", {}
        for path, entry in sorted(commit.files.items()):
            for parent in [str(parent) for parent in PurePosixPath(path).parents][-2::-1]:
                found[parent] = {"type": "directory", "path": parent, "oid": hashlib.sha1(parent.encode()).hexdigest()}
            found[path] = {"type": "file", "path": path, **entry}
        asked = [path.rstrip("/") for path in parse_qs(self.body.decode()).get("paths", [])]
        require(folder in ("", *found), 404, f"No folder {folder}", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        deep = self.query.get("recursive") == ["true"]
        inside = [path for path in found if path.startswith(start) and (deep or "/" not in path.removeprefix(start))]
        self.reply([found[path] for path in (inside if self.command == "GET" else asked) if path in found])

    def preupload(self, repo: Repo, revision: str) -> None:
        known, answers = {path: entry["etag"] for path, entry in repo.at(revision).files.items()}, []
        for file in json.loads(self.body)["files"]:
            path, size, sample = file["path"], file["size"], file["sample"]
            lfs = size >= LFS_BYTES or re.fullmatch(LFS_SUFFIX, path) or b"\0" in base64.b64decode(sample)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known.get(path)})
        self.reply({"files": answers})

    def lfs_batch(self, repo: Repo) -> None:
        objects = json.loads(self.body)["objects"]
        for new in [item for item in objects if not (self.server.folder / item["oid"]).exists()]:
            new["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{new['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, sha256: str) -> None:
        self.reply({"oid": self.server.store(self.blocks, announced=sha256)})

    def commit(self, repo: Repo, branch: str) -> None:
        with self.server.lock:
            known = repo.refs["branch"] | repo.refs["pr"]
            title, head = "", repo.at(known.get(branch, f"branch {branch}"))
            if self.query.get("create_pr") == ["1"]:
                branch = f"refs/pr/{len(repo.refs['pr']) + 1}"
                repo.refs["pr"][branch] = head.oid
            files = dict(head.files)
            for key, value in (json.loads(line).values() for line in self.body.splitlines()):
                path = value.get("path", "").rstrip("/")
                if key == "header":
                    title, same = value["summary"], value.get("parentCommit", head.oid) == head.oid
                    require(same, 412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[path] = self.server.entry(self.server.store([base64.b64decode(value["content"])]))
                elif key == "lfsFile":
                    files[path] = self.server.entry(value["oid"], lfs=True)
                else:  # deletedFile or deletedFolder
                    gone = [name for name in files if f"{name}/".startswith(f"{path}/")]
                    require(gone, 404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    files = {name: entry for name, entry in files.items() if name not in gone}
            oid = repo.commit(branch, title, files)
        answer = {"commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo.id}/commit/{oid}"}
        if branch in repo.refs["pr"]:
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo.id}/discussions/{branch.rsplit('/', 1)[-1]}"
        self.reply(answer)

    def resolve(self, repo: Repo, revision: str, path: str) -> Any:
        commit, asked = repo.at(revision), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        require(path in commit.files, 404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        entry, size = commit.files[path], commit.files[path]["size"]
        first, end = (int(asked[1]), min(int(asked[2] or size), size - 1) + 1) if asked else (0, size)
        require(first < end or not asked, 416, "Range Not Satisfiable")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry["etag"]}"', "Content-Length": end - first}
        headers |= {"Content-Range": f"bytes {first}-{end - 1}/{size}"} if asked else {}
        self.reply(b"", 206 if asked else 200, headers)
        if self.command == "GET" and size:
            with (self.server.folder / entry["sha256"]).open("rb") as file:
                if self.fault is not None and self.fault.how == "cut":
                    self.connection.sendfile(file, first, (end - first) // 2)
                    return self.reset()
                if self.fault is not None and self.fault.how == "drip":
                    for start in range(first, end, max(1, (end - first) // 20)):
                        self.connection.sendfile(file, start, min(max(1, (end - first) // 20), end - start))
                        time.sleep(0.05)
                    return None
                self.connection.sendfile(file, first, end - first)
        return None
