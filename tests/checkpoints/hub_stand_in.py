"""A stand-in of the Hub: an HTTP server in a thread that gives what the Hub's client asks for, of any version."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "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"


class Hub:
    """Repositories as revisions of files, and what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.down: int | None = None  # the status of every answer
        self.drops = 0  # how many times a download of weights ends in the middle
        self.asked: list[str] = []
        self.endpoint = ""

    def add(self, repo: str, folder: Path, revision: str = "main", **more: bytes) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repos.setdefault(repo, {})[revision] = files | more

    @property
    def downloaded(self) -> set[str]:
        """The files that were asked for."""
        return {path.rpartition("/")[2] for path in self.asked if path.startswith("GET") and "/resolve/" in path}


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def give(self, content: bytes, drop: bool = False, **headers: str) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : start + (len(content) - start) // 2] if drop else content[start:])

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.down is not None:
            return self.refuse(self.hub.down)
        if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if len(parts) < 4:
            return self.refuse(404)
        owner, name, kind, *rest = parts[2:] if api else parts
        repo = f"{owner}/{name}"
        if repo not in self.hub.repos:
            return self.refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        revisions = self.hub.repos[repo]
        known = {given: each for each in revisions for given in (each, commit_of(repo, each))}
        asked = "/".join(rest[:3]) if rest[0] == "refs" else rest[0]
        if asked not in known:
            return self.refuse(404, "RevisionNotFound")
        files, commit = revisions[known[asked]], commit_of(repo, known[asked])
        if api:
            return self.give(json.dumps(described(repo, files, commit, kind)).encode())
        file = "/".join(rest[asked.count("/") + 1 :])
        if repo in self.hub.gated and "Authorization" not in self.headers:
            return self.refuse(401, "GatedRepo")
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        drop = self.command == "GET" and file.endswith(".safetensors") and self.hub.drops > 0
        self.hub.drops -= drop
        return self.give(files[file], drop, ETag=f'"{blob_of(files[file])}"', X_Repo_Commit=commit)


def blob_of(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def described(repo: str, files: dict[str, bytes], commit: str, kind: str) -> Any:
    """The files of a revision, as the Hub lists them."""
    if kind == "tree":
        return [
            {"type": "file", "path": name, "size": len(content), "oid": blob_of(content)}
            for name, content in files.items()
        ]
    siblings = [{"rfilename": name} for name in files]
    return {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}


@contextmanager
def running() -> Iterator[Hub]:
    """The Hub, served on a free port of this machine."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
