"""A small Hugging Face Hub on 127.0.0.1, complete enough for the real `huggingface_hub` client (2.4).

`with HubServer(folder) as hub:` start a process with HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET=1.
Served: the ROUTES, for models and datasets. Not served: spaces, pull requests, Xet, multipart uploads, paging, `expand`.
Contents are files named by their sha256 under `folder`; repositories and commits live in memory.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]
LFS_BYTES = 10_000_000  # a file of this size or more never travels inside a commit
LFS_SUFFIX = r".*\.(7z|arrow|bin|ckpt|gz|h5|msgpack|np[yz]|onnx|parquet|pickle|pkl|pth?|safetensors|tar|zip)"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
CARD = {"tags": "", "library_name": "", "pipeline_tag": "", "license": "license:", "datasets": "dataset:"}
CARD |= {"base_model": "base_model:", "language": ""}  # the keys read from a card → the prefix of their tags
REPO = "/api/(models|datasets)/([^/]+(?:/[^/]+)??)"
ROUTES = [  # (method, path, what the caller must be allowed to do with the repository, method of Handler)
    ("GET", "/api/whoami-v2", "", "whoami"),
    ("POST", "/api/validate-yaml", "", "validate_yaml"),
    ("POST", "/api/repos/create", "", "create_repo"),
    ("GET", "/api/(models|datasets)", "", "list_repos"),
    ("GET", f"{REPO}/refs", "info", "list_refs"),
    ("GET", f"{REPO}/tree/([^/]+)(?:/(.+))?", "files", "tree"),
    ("GET", f"{REPO}(?:/revision/([^/]+))?", "info", "info"),
    ("POST", f"{REPO}/paths-info/([^/]+)", "files", "paths_info"),
    ("POST", f"{REPO}/preupload/([^/]+)", "write", "preupload"),
    ("POST", f"{REPO}/commit/([^/]+)", "write", "commit"),
    ("POST", f"{REPO}/(branch|tag)/([^/]+)", "write", "create_ref"),
    ("POST", r"/(datasets/)?([^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch", "write", "lfs_batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "", "lfs_upload"),
    ("GET", "/(datasets/)?([^/]+(?:/[^/]+)??)/resolve/([^/]+)/(.+)", "files", "resolve"),
]


class HubError(Exception):
    """An answer of 4xx: status, headers. The client chooses its exception by X-Error-Code."""


def require(condition: object, status: int, message: str, code: str = "", **headers: str) -> None:
    if not condition:
        raise HubError(status, {"X-Error-Message": message, "X-Error-Code": code, **headers})


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
    refs: dict[str, dict[str, str]] = field(default_factory=lambda: {"branch": {}, "tag": {}})  # name → commit

    def at(self, revision: str) -> Commit:
        oid = self.refs["branch"].get(revision) or self.refs["tag"].get(revision) or revision
        require(oid in self.history, 404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def commit(self, branch: str, title: str, files: dict[str, Json]) -> str:
        before = self.at(branch).files if self.history else {}
        changed = {path: files.get(path) for path in before | files if files.get(path) != before.get(path)}
        oid = hashlib.sha1(f"{self.id} {len(self.history)} {title} {files}".encode()).hexdigest()
        self.history[oid] = Commit(oid, title, files, changed)
        self.refs["branch"][branch] = oid
        return oid


class HubServer(ThreadingHTTPServer):
    """The server, with one user, "tester", whose `token` may also write to the organisations `orgs`."""

    request_queue_size = 64

    def __init__(self, folder: str | Path, orgs: Iterable[str] = ("revelio",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = Path(folder)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []  # (method, path without query), in order of arrival
        self.repos: dict[tuple[str, str], Repo] = {}  # (model | dataset, id) → repository
        self.token = "hf_token_of_tester"
        self.users: dict[str, tuple[str, ...]] = {self.token: ("tester", *orgs)}  # token → user, organisations
        self.lock = threading.Lock()  # held while a POST is answered
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
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
        pointer = LFS_POINTER.format(sha256, size := path.stat().st_size).encode()
        data = pointer if lfs else path.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"oid": oid, "blobId": oid, "sha256": sha256, "size": size, "etag": sha256 if lfs else oid}
        pointed = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}
        return entry | {"lfs": pointed} if lfs else entry


class Handler(BaseHTTPRequestHandler):
    """The methods named in ROUTES are given the repository and the groups of the path; they return JSON to send."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def dispatch(self) -> None:
        url, method = urlsplit(self.path), self.command.replace("HEAD", "GET")
        self.server.requests.append((self.command, url.path))
        self.query, self.blocks = parse_qs(url.query), self.read_blocks()
        self.body = b"" if method == "PUT" else b"".join(self.blocks)
        try:
            for verb, pattern, need, name in ROUTES:
                if verb == method and (match := re.fullmatch(pattern, url.path)):
                    groups = [unquote(group or "") for group in match.groups()]
                    with self.server.lock if method == "POST" else nullcontext():
                        arguments = [self.repo(need, *groups[:2]), *groups[2:]] if need else groups
                        answer = getattr(self, name)(*arguments)
                    return self.send(200, {}, json.dumps(answer).encode()) if name != "resolve" else None
            require(False, 404, f"The test Hub does not serve {method} {url.path}")
        except HubError as error:
            status, headers = error.args
            self.send(status, headers, json.dumps({"error": headers["X-Error-Message"]}).encode())

    do_HEAD = do_GET = do_POST = do_PUT = dispatch  # noqa: N815

    def log_message(self, format: str, *args: object) -> None: ...

    def read_blocks(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left and (block := self.rfile.read(min(left, 1 << 20))):
            left -= len(block)
            yield block

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for item in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(*item)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def names(self) -> tuple[str, ...]:
        """The caller and their organisations, () without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        require(not token or token in self.server.users, 401, "Invalid credentials in Authorization header")
        return self.server.users.get(token, ())

    def repo(self, need: str, kind: str, repo_id: str) -> Repo:
        names, repo = self.names(), self.server.repos.get((kind.rstrip("s/") or "model", repo_id))
        member, status = repo_id.split("/")[0] in names, 403 if names else 401
        message = "Repository not found" if names else "Invalid username or password."
        if repo is None or (repo.private and not member):  # a stranger is not told which
            raise HubError(404 if names else 401, {"X-Error-Message": message, "X-Error-Code": "RepoNotFound"})
        require(member or need != "write", status, f"You don't have the rights to write to {repo_id}")
        require(member or need != "files" or not repo.gated, status, f"Access to {repo_id} is restricted", "GatedRepo")
        return repo

    def whoami(self) -> Json:
        require(names := self.names(), 401, "Invalid username or password.")
        return {"type": "user", "name": names[0], "orgs": [{"type": "org", "name": name} for name in names[1:]]}

    def validate_yaml(self) -> Json:
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Json:
        asked, names = json.loads(self.body), self.names()
        kind, owner = asked.get("type") or "model", asked.get("organization") or "".join(names[:1])
        require(owner in names, 403 if names else 401, f"You don't have the rights to create a {kind} under {owner}")
        repo = Repo(f"{owner}/{asked['name']}", asked.get("visibility") == "private")
        answer = {"url": f"{self.server.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo.id}"}
        require((kind, repo.id) not in self.server.repos, 409, f"You already created this {kind} repo")
        attributes = self.server.store([b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"])
        repo.commit("main", "initial commit", {".gitattributes": self.server.entry(attributes)})
        self.server.repos[kind, repo.id] = repo
        return answer
