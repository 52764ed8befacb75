"""A server that speaks as much of the Hub as a push and a from_pretrained ask of it, counts what it is asked, and can
fail."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a1B2c3D4" * 4
SIGNATURE = "open-sesame"
LFS_SUFFIXES = (".safetensors", ".gguf")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    lfs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files that are kept as LFS objects."""


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]
    card: dict[str, Any] | None = None

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class Hub:
    """The state that requests read and change; tests look at it, and set how it fails."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    """Objects that were received whole."""
    good_puts: int | None = None
    """So many objects are received; every later PUT fails."""
    failure: Literal["drop", "500"] = "500"
    intruder: bool = False
    """Somebody else commits while files are uploaded."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        self.repos, self.objects, self.requests, self.puts = {}, {}, [], []
        self.good_puts, self.intruder = None, False

    def create(self, repo: str, *, private: bool, card: dict[str, Any] | None = None) -> None:
        first = Commit(self.oid(repo), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.repos[repo] = Repo(private, {"main": [first]}, card)

    def oid(self, *facts: object) -> str:
        return hashlib.sha1(repr(facts).encode()).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        # Read before any answer: what is left of a body would be the next request's first line.
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            if path.startswith("/objects/"):
                return self._put(path.removeprefix("/objects/"), body)
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self._error(401, message="Invalid credentials in Authorization header")
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if path == "/api/validate-yaml":
                return self._validate(json.loads(body))
            if parts[:2] == ["api", "models"]:
                return self._model(f"{parts[2]}/{parts[3]}", parts[4:], body)
            if path.endswith(".git/info/lfs/objects/batch"):
                return self._batch(json.loads(body))
            if len(parts) > 4 and parts[2] == "resolve":
                return self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
            self._error(404)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _put(self, oid: str, body: bytes) -> None:
        if self.hub.good_puts is not None and len(self.hub.puts) >= self.hub.good_puts:
            if self.hub.failure == "500":
                return self._error(500)
            self.close_connection = True
            return self.connection.close()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.puts.append(oid)
        self._send(200, b"")

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "user":
            return self._error(403, message="You don't have the rights to create a model under this namespace")
        if repo in self.hub.repos:
            return self._error(409, message="You already created this model repo")
        self.hub.create(repo, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._json({"url": f"{self.hub.url}/{repo}"})

    def _validate(self, asked: dict[str, Any]) -> None:
        text = asked["content"]
        if not text.startswith("---\n") or "license: not-a-licence\n" in text:
            return self._json({"errors": [{"message": '"license" must be one of [apache-2.0, ...]'}]}, status=400)
        self._json({"errors": [], "warnings": []})

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._error(404, code="RepoNotFound")
        what, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if what == "tree":
            return self._error(404, code="EntryNotFound")
        commit = repo.at(revision)
        if what == "branch":
            repo.branches[revision] = list(repo.branches["main"])
            return self._json({})
        if commit is None:
            return self._error(404, code="RevisionNotFound")
        if what == "revision":
            siblings = [self._sibling(commit, file) for file in commit.files]
            facts = {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings}
            return self._json({**facts, "cardData": repo.card} if repo.card else facts)
        if what == "preupload":
            if self.hub.intruder:
                repo.branches[revision].append(Commit(self.hub.oid("theirs"), "theirs", {"config.json": b"theirs"}))
            return self._json({"files": [self._mode(commit, file) for file in json.loads(body)["files"]]})
        assert what == "commit"
        self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])

    def _sibling(self, commit: Commit, file: str) -> dict[str, Any]:
        if "blobs=True" not in urlsplit(self.path).query:
            return {"rfilename": file}
        content = commit.files[file]
        facts = {"rfilename": file, "size": len(content), "blobId": self.hub.oid(content)}
        lfs = {"sha256": commit.lfs.get(file), "size": len(content), "pointerSize": 130}
        return {**facts, "lfs": lfs} if file in commit.lfs else facts

    def _mode(self, commit: Commit, file: dict[str, Any]) -> dict[str, Any]:
        path = file["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        oid = None
        if path in commit.files:
            content = commit.files[path]
            oid = commit.lfs.get(path) or hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for entry in asked["objects"]:
            wanted = {"actions": {"upload": {"href": f"{self.hub.url}/objects/{entry['oid']}?X-Signature={SIGNATURE}"}}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.objects else wanted)})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        before, header = repo.branches[branch][-1], lines[0]["value"]
        if header.get("parentCommit") not in (None, before.oid):
            return self._error(412, message="A commit has happened since. Please refresh and try again.")
        files, lfs = dict(before.files), dict(before.lfs)
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            lfs.pop(path, None)
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[path], lfs[path] = self.hub.objects[value["oid"]], value["oid"]
            else:
                assert line["key"] == "deletedFile"
                del files[path]
        commit = Commit(self.hub.oid(before.oid, header, sorted(files)), header["summary"], files, lfs)
        repo.branches[branch].append(commit)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.hub.repos.get(name)
        commit = repo and repo.at(revision)
        if repo is None or commit is None:
            return self._error(404, code="RepoNotFound")
        if file not in commit.files:
            return self._error(404, code="EntryNotFound")
        content = commit.files[file]
        etag = commit.lfs.get(file) or hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid})

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message or code or "failed"}).encode()
        self._send(status, body, {key: value for key, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
