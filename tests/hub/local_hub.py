"""A small Hub on 127.0.0.1, enough of the real one for pushes and loads by the unmodified client libraries.

It keeps everything in memory and speaks the classic (git-lfs) upload protocol; `xet_storage.py` adds the newer one.
"""

import base64
import fnmatch
import hashlib
import itertools
import json
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


DATE = "2026-01-01T00:00:00.000Z"
POINTER_SIZE = 134
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".png", ".jpg")


class HubError(Exception):
    """An answer the client turns into one of its exceptions, by status and by `code` (the X-Error-Code header)."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any):
        super().__init__(message or code)
        self.status, self.body = status, {"error": message or code, **body}
        self.headers = {"X-Error-Message": message or code} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    """One file of a commit: its content is `hub.blobs[sha256]`."""

    sha256: str
    size: int
    is_lfs: bool
    git_oid: str

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid

    def describe(self, path: str) -> dict:
        description = {"type": "file", "path": path, "size": self.size, "oid": self.git_oid}
        if self.is_lfs:
            description["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": POINTER_SIZE}
        return description


@dataclass
class Repo:
    """A repository: `refs` names branches and pull requests, `tags` tags; both point at ids in `commits`."""

    id: str
    private: bool
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, tag, pull request or commit id."""
        known = {**{commit: commit for commit in self.commits}, **self.tags, **self.refs}
        if revision not in known:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return known[revision]

    def files(self, revision: str) -> dict[str, File]:
        return self.commits[self.resolve(revision)]["files"]

    def commit(self, ref: str, title: str, files: dict[str, File], parent: str | None = None) -> str:
        digest = hashlib.sha1(repr((self.id, ref, title, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = {"title": title, "files": files, "parent": parent}
        self.refs[ref] = digest
        return digest


class LocalHub:
    """The server and its state. `tokens` maps an access token to its user.

    `after_put` is called when a large file has arrived and before the client hears of it, `requests` lists what was
    asked, and `blobs` holds every byte that was ever stored.
    """

    def __init__(self, tokens: dict[str, str], handler: type["Handler"] | None = None):
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.after_put: Callable[[], None] | None = None
        self.lock = threading.RLock()
        bound_handler = type("BoundHandler", (handler or Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), bound_handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def store(self, content: bytes, is_lfs: bool) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return self.file(sha256, is_lfs)

    def file(self, sha256: str, is_lfs: bool) -> File:
        content = self.blobs[sha256]
        stored = content
        if is_lfs:
            stored = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        return File(sha256, len(content), is_lfs, hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest())

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        """The content of one file, for tests."""
        return self.blobs[self.repos[kind, repo_id].files(revision)[path].sha256]

    def paths(self, repo_id: str, revision: str = "main", kind: str = "models") -> set[str]:
        """The names of the files of one revision, for tests."""
        return set(self.repos[kind, repo_id].files(revision))


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{_ID}"
_FILE = rf"/(?:(?P<kind>datasets|spaces)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"

ROUTES = [
    ("GET", r"/api/whoami-v2", "get_whoami"),
    ("POST", r"/api/repos/create", "post_create"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("POST", r"/api/validate-yaml", "post_validate_yaml"),
    ("PUT", rf"{API}/settings", "put_settings"),
    ("GET", API, "get_info"),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "get_info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "get_tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "post_paths_info"),
    ("GET", rf"{API}/refs", "get_refs"),
    ("GET", rf"{API}/commits/(?P<revision>[^/]+)", "get_commits"),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "post_branch"),
    ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", "delete_branch"),
    ("POST", rf"{API}/tag/(?P<name>[^/]+)", "post_tag"),
    ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", "delete_tag"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "post_preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "post_commit"),
    ("POST", rf"/(?:(?P<kind>datasets|spaces)/)?{_ID}\.git/info/lfs/objects/batch", "post_lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put_blob"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "post_verify"),
    ("GET", _FILE, "get_file"),
    ("HEAD", _FILE, "get_file"),
]


class Handler(BaseHTTPRequestHandler):
    """One request: `routes` says which method answers it."""

    hub: LocalHub
    routes = ROUTES
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keeps the test output quiet."""

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = body
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            for verb, pattern, name in self.routes:
                match = re.fullmatch(pattern, url.path)
                if match and verb == self.command:
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    with self.hub.lock:
                        answer = getattr(self, name)(**groups)
                    if name == "put_blob" and self.hub.after_put is not None:
                        self.hub.after_put()
                    break
            else:
                raise HubError(404, message=f"no such route: {self.command} {url.path}")
        except HubError as error:
            answer = error.status, error.body, error.headers
        except Exception:
            answer = 500, {"error": traceback.format_exc()}, {"X-Error-Message": "the test server broke"}
        self.reply(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what.

    def user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repo(self, kind: str, repo_id: str, content: bool = False) -> Repo:
        """The repository when the caller may see it; one it may not see looks as if it did not exist."""
        repo = self.hub.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and self.user() != owner):
            raise HubError(404 if self.user() else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and self.user() != owner:
            raise HubError(403 if self.user() else 401, "GatedRepo", "Access to this repository is restricted")
        return repo

    def writable(self, kind: str, repo_id: str) -> Repo:
        repo = self.repo(kind, repo_id)
        self.check_namespace(repo_id.split("/")[0])
        return repo

    def check_namespace(self, namespace: str) -> None:
        if self.user() is None:
            raise HubError(401, message="Invalid user token")
        if self.user() != namespace:
            raise HubError(403, message=f"You have no write access to the namespace {namespace}")

    # Account and repositories.

    def get_whoami(self) -> tuple:
        if self.user() is None:
            raise HubError(401, message="Invalid user token")
        token = {"role": "write", "displayName": "test"}
        return 200, {"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": token}}

    def post_create(self) -> tuple:
        request = json.loads(self.body)
        namespace = request.get("organization") or self.user() or ""
        self.check_namespace(namespace)
        kind, repo_id = request.get("type", "model") + "s", f"{namespace}/{request['name']}"
        prefix = "" if kind == "models" else kind + "/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, message="You already created this repo", **answer)
        private = request.get("visibility") == "private" or request.get("private") is True
        repo = self.hub.repos[kind, repo_id] = Repo(repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n", False)})
        return 200, answer

    def delete_repo(self) -> tuple:
        request = json.loads(self.body)
        kind, repo_id = request.get("type", "model") + "s", f"{request.get('organization')}/{request['name']}"
        self.writable(kind, repo_id)
        del self.hub.repos[kind, repo_id]
        return 200, {}

    def put_settings(self, kind: str, repo_id: str) -> tuple:
        repo, request = self.writable(kind, repo_id), json.loads(self.body)
        repo.private = request.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = bool(request.get("gated", repo.gated))
        return 200, {}

    def get_info(self, kind: str, repo_id: str, revision: str = "main") -> tuple:
        repo = self.repo(kind, repo_id)
        siblings = []
        for path, file in repo.files(revision).items():
            lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": POINTER_SIZE} if file.is_lfs else None
            sizes = {"size": file.size, "blobId": file.git_oid, "lfs": lfs} if "blobs" in self.query else {}
            siblings.append({"rfilename": path} | sizes)
        info = {"id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": repo.resolve(revision)}
        flags = {"private": repo.private, "gated": repo.gated, "disabled": False, "tags": []}
        dates = {"lastModified": DATE, "createdAt": DATE}
        return 200, info | flags | dates | {"downloads": 0, "likes": 0, "siblings": siblings}

    def get_tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> tuple:
        files, prefix = self.repo(kind, repo_id).files(revision), f"{path}/" if path else ""
        below = {name: file for name, file in files.items() if name.startswith(prefix)}
        if path and not below:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        entries, folders = [], set()
        for name, file in below.items():
            parts = name.removeprefix(prefix).split("/")
            folders |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))}
            if len(parts) == 1 or self.query.get("recursive", "").lower() == "true":
                entries.append(file.describe(name))
        if self.query.get("recursive", "").lower() != "true":
            folders = {folder for folder in folders if "/" not in folder.removeprefix(prefix)}
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        return 200, entries

    def post_paths_info(self, kind: str, repo_id: str, revision: str) -> tuple:
        files = self.repo(kind, repo_id).files(revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        return 200, [files[path].describe(path) for path in asked if path in files]

    def get_refs(self, kind: str, repo_id: str) -> tuple:
        repo = self.repo(kind, repo_id)
        refs = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, commit in repo.refs.items():
            is_pull = name.startswith("refs/pr/")
            ref = name if is_pull else f"refs/heads/{name}"
            refs["pullRequests" if is_pull else "branches"].append({"name": name, "ref": ref, "targetCommit": commit})
        refs["tags"] = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
        return 200, refs

    def get_commits(self, kind: str, repo_id: str, revision: str) -> tuple:
        repo = self.repo(kind, repo_id)
        history, commit = [], repo.resolve(revision)
        while commit is not None:
            title = repo.commits[commit]["title"]
            history.append({"id": commit, "title": title, "message": "", "authors": [], "date": DATE})
            commit = repo.commits[commit]["parent"]
        return 200, history

    def post_branch(self, kind: str, repo_id: str, name: str) -> tuple:
        repo = self.writable(kind, repo_id)
        if name in repo.refs:
            raise HubError(409, message=f"Reference already exists: {name}")
        repo.refs[name] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint", "main"))
        return 200, {}

    def delete_branch(self, kind: str, repo_id: str, name: str) -> tuple:
        self.writable(kind, repo_id).refs.pop(name)
        return 200, {}

    def post_tag(self, kind: str, repo_id: str, name: str) -> tuple:
        repo, tag = self.writable(kind, repo_id), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise HubError(409, message=f"Tag already exists: {tag}")
        repo.tags[tag] = repo.resolve(name)
        return 200, {}

    def delete_tag(self, kind: str, repo_id: str, name: str) -> tuple:
        self.writable(kind, repo_id).tags.pop(name)
        return 200, {}

    # Uploads: card check, preupload, git-lfs batch, PUT, verify, commit.

    def post_validate_yaml(self) -> tuple:
        content = json.loads(self.body)["content"]
        return 200, {"errors": [], "warnings": [] if content.startswith("---") else [{"message": "no metadata"}]}

    def post_preupload(self, kind: str, repo_id: str, revision: str) -> tuple:
        repo, request = self.repo(kind, repo_id), json.loads(self.body)
        files = repo.files(revision)
        ignored = request.get("gitIgnore")
        if ignored is None and ".gitignore" in files:
            ignored = self.hub.blobs[files[".gitignore"].sha256].decode()
        answers = []
        for file in request["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            ignore = any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in (ignored or "").split())
            oid = {"oid": files[path].git_oid} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore} | oid)
        return 200, {"files": answers}

    def post_lfs_batch(self, kind: str | None = None, repo_id: str = "") -> tuple:
        self.repo(kind or "models", repo_id)
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{item['oid']}/verify"}}
            objects.append(item)
        return 200, {"transfer": "basic", "objects": objects}

    def put_blob(self, oid: str) -> tuple:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, message="The content does not have the sha256 announced")
        self.hub.blobs[oid] = self.body
        return 200, b""

    def post_verify(self, oid: str) -> tuple:
        if len(self.hub.blobs.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, message="The upload is incomplete")
        return 200, {}

    def post_commit(self, kind: str, repo_id: str, revision: str) -> tuple:
        repo = self.repo(kind, repo_id)
        parent = repo.resolve(revision)
        create_pr = self.query.get("create_pr") == "1"
        if not create_pr:
            self.check_namespace(repo_id.split("/")[0])
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", parent) != parent:
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(revision))
        for line in lines:
            self.apply(files, line["key"], line["value"])
        ref, pull_request = revision, None
        if create_pr:
            number = next(n for n in itertools.count(1) if f"refs/pr/{n}" not in repo.refs)
            ref, pull_request = f"refs/pr/{number}", f"{self.hub.url}/{repo_id}/discussions/{number}"
        oid = repo.commit(ref, header["summary"], files, parent)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull_request}

    def apply(self, files: dict[str, File], key: str, value: dict) -> None:
        """Carries out one line of a commit."""
        path = value.get("path")
        if key == "file":
            files[path] = self.hub.store(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise HubError(400, message=f"{path}: its content was never uploaded")
            files[path] = self.hub.file(value["oid"], is_lfs=True)
        elif key == "deletedFile":
            files.pop(path, None)
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path)]:
                del files[name]

    # Downloads.

    def get_file(self, repo_id: str, revision: str, path: str, kind: str | None = None) -> tuple:
        repo = self.repo(kind or "models", repo_id, content=True)
        commit = {"X-Repo-Commit": repo.resolve(revision)}
        file = repo.files(revision).get(path)
        if file is None:
            missing = HubError(404, "EntryNotFound", f"{path} does not exist")
            return missing.status, missing.body, missing.headers | commit
        content = self.hub.blobs[file.sha256]
        headers = commit | {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        first, last = int(wanted[1]), min(int(wanted[2] or file.size), file.size - 1)
        return 206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{file.size}"}
