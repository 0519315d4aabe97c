"""A stand-in for the Hugging Face Hub that speaks real HTTP on 127.0.0.1, with faults to switch on."""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BIG = (".safetensors", ".bin", ".parquet")  # these the Hub keeps elsewhere and redirects to


class StandInHub:
    """Repositories in memory; `push` adds a commit, `requests` remembers who asked for what."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}  # (kind, repo) -> commit -> files
        self.refs: dict[tuple[str, str], dict[str, str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range header
        self.authorizations: set[str | None] = set()  # tokens that were sent
        self.gated: set[str] = set()
        self.cut: dict[str, str] = {}  # file -> "close" or "reset": break the connection half way through, once
        self.status = 200  # another one is the answer to everything
        self.login_page = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        # HTTP/1.0 closes every connection after its answer, so a stopped server leaves none open.
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def push(self, repo: str, files: dict[str, bytes] | Path, kind: str = "models", tag: str | None = None) -> str:
        """Add a commit to main, with all files of a folder or a dict; returns its hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        key = (kind, repo)
        commits, refs = self.commits.setdefault(key, {}), self.refs.setdefault(key, {})
        commit = hashlib.sha1(f"{key} {len(commits)}".encode()).hexdigest()
        commits[commit] = dict(files)
        refs["main"] = commit
        if tag:
            refs[tag] = commit
        return commit

    def asked_for(self, method: str) -> list[str]:
        """Names of the files that were asked for with this method."""
        found = (RESOLVE.fullmatch(path) for m, path, _ in self.requests if m == method)
        return [match[4] for match in found if match]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        address = urlsplit(handler.path)
        path = unquote(address.path)
        if path == "/api/agent-harnesses":  # huggingface_hub's own question, once a process
            return self._send_json(handler, {"standardEnvVars": [], "harnesses": {}})
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        self.authorizations.add(handler.headers.get("Authorization"))
        if self.status != 200:
            return self._send(handler, self.status)
        if self.login_page:
            return self._send(handler, 200, b"<html>Welcome! Please log in.</html>", {"Content-Type": "text/html"})
        if path.startswith("/cdn/"):
            return self._send_file(handler, path.rsplit("/", 1)[1], self._blob(path.split("/")[2]), {})

        # A revision may contain slashes, which come quoted.
        api, resolve = API.fullmatch(address.path), RESOLVE.fullmatch(address.path)
        if api:
            key, revision = (api[1], api[2]), unquote(api[3] or "main")
        elif resolve:
            key, revision = ("datasets" if resolve[1] else "models", resolve[2]), unquote(resolve[3])
        else:
            return self._send(handler, 404)
        if key not in self.commits:
            # The Hub does not tell strangers whether a repository is private or not there.
            return self._send(handler, 401, headers={"X-Error-Code": "RepoNotFound"})
        commit = self.refs[key].get(revision, revision)
        files = self.commits[key].get(commit)
        if files is None:
            return self._send(handler, 404, headers={"X-Error-Code": "RevisionNotFound"})
        if api:
            with_sizes = "blobs" in parse_qs(address.query)
            siblings = [{"rfilename": n, **({"size": len(b)} if with_sizes else {})} for n, b in files.items()]
            return self._send_json(handler, {"id": key[1], "sha": commit, "siblings": siblings, "tags": []})
        assert resolve
        name = unquote(resolve[4])
        if key[1] in self.gated:  # what a gated repository is called and holds is public, its files are not
            return self._send(handler, 401, headers={"X-Error-Code": "GatedRepo"})
        if name not in files:
            return self._send(handler, 404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(files[name]).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if name.endswith(BIG):
            headers |= {"X-Linked-Size": str(len(files[name])), "X-Linked-Etag": f'"{etag}"'}
            # Another host name than the Hub's, as with the real one.
            return self._send(
                handler, 302, headers={**headers, "Location": f"http://localhost:{self.port}/cdn/{etag}/{name}"}
            )
        return self._send_file(handler, name, files[name], headers)

    def _blob(self, etag: str) -> bytes:
        everything = (b for commits in self.commits.values() for files in commits.values() for b in files.values())
        return next(b for b in everything if hashlib.sha256(b).hexdigest() == etag)

    def _send_file(self, handler: BaseHTTPRequestHandler, name: str, body: bytes, headers: dict[str, str]) -> None:
        how = self.cut.pop(name, None) if handler.command == "GET" else None
        status, start = 200, 0
        if asked := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or ""):
            status, start = 206, int(asked[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        part = body[start:]
        if how is None:
            return self._send(handler, status, part, headers)
        self._send(handler, status, part, headers, n_sent=len(part) // 2)
        if how == "reset":  # with a linger time of 0 closing sends RST, as a lost network does
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    def _send_json(self, handler: BaseHTTPRequestHandler, data: Any) -> None:
        self._send(handler, 200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        n_sent: int | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[:n_sent])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    """A stand-in Hub that this process takes for the real one; Taleloom's folder is `tmp_path / "home"`."""
    hub = StandInHub()
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path / "home"))
    # huggingface_hub reads its environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "HF_XET_CACHE", "AGENT_HARNESSES_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "hf" / name.lower()))
    yield hub
    hub.stop()
