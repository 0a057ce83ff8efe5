"""The Hub's HTTP API, as far as huggingface_hub asks it for models, on loopback; and things that go wrong.

    GET  /api/models/ORG/NAME/revision/REV?blobs=true   what a commit holds, with sizes and digests
    HEAD /ORG/NAME/resolve/REV/FILE   what a file is: ETag, X-Repo-Commit, length
    GET  the same                     its content; a large file is a link (302) to its store
    GET  /store/DIGEST                the store of large files: Range, no account, another host

Small files are named by their id in git, large ones by SHA-256, as the Hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", "tokenizer.json")


def digest_of(path: str, content: bytes) -> str:
    if path.endswith(LARGE_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repo:
    """One repository: its commits, and which of them branches and tags stand for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        told = json.dumps({path: digest_of(path, content) for path, content in sorted(files.items())})
        commit = hashlib.sha1(f"{len(self.commits)} {told}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """What the server says, and what it was asked. Fields that break things may be set at any time."""

    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    """Of accounts, with the gated repositories whose terms they have accepted."""
    endpoint: str = ""
    store: str = ""
    asked: list[str] = field(default_factory=list)
    """Each request: method, path, and its Range."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of content by path."""
    break_after: int | None = None
    """The store closes the connection after so many bytes of each answer."""
    ignores_range: bool = False
    damages: bool = False
    """The store changes a byte."""
    flood_nbytes: int = 0
    """So much comes behind a whole file of the store."""
    status: int | None = None
    """All that is asked is answered so."""
    expires: int = 0
    """So many answers of the store are 403, as of links that are old, after a part was sent."""
    has_xet: bool = True
    """Large files say that they are in Xet's store as well."""
    held: threading.Event | None = None
    """The store sends half of a file of weights (of 50 kB or more), and the rest when this is set."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Half of a file was sent."""

    def add(self, name: str, model: Path | dict[str, bytes]) -> Repo:
        files = model if isinstance(model, dict) else files_of(model)
        self.repos[name] = repo = Repo()
        repo.commit(files)
        return repo

    def of_store(self, digest: str) -> bytes | None:
        for repo in self.repos.values():
            for files in repo.commits.values():
                for path, content in files.items():
                    if digest_of(path, content) == digest:
                        return content
        return None

    def fetched(self) -> list[str]:
        """Paths of which content was asked for."""
        return [line.split()[1] for line in self.asked if line.startswith("GET") and "/api/" not in line]


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """At ``hub.endpoint`` on 127.0.0.1; its store has another port, as it has another host elsewhere."""
    servers = [_server(hub, _Endpoint), _server(hub, _Store)]
    hub.endpoint, hub.store = (f"http://127.0.0.1:{each.server_port}" for each in servers)
    threads = [
        threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}) for each in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        if hub.held is not None:
            hub.held.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _server(hub: Hub, handler: type[_Handler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._take()

    def do_GET(self) -> None:
        self._take()

    def _take(self) -> None:
        given = self.headers.get("Range", "")
        self.hub.asked.append(f"{self.command} {urlsplit(self.path).path} {given}".rstrip())
        if self.hub.status is not None:
            self._answer(self.hub.status, {})
        else:
            self.answer(unquote(urlsplit(self.path).path))

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def _answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, status: int, code: str, text: str) -> None:
        self._answer(
            status, {"X-Error-Code": code, "X-Error-Message": text} if code else {"X-Error-Message": text}
        )


class _Endpoint(_Handler):
    def answer(self, path: str) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        else:
            self._answer(404, {})

    def _account(self) -> str | None:
        """The token; None: none was given. ``""``: one that is not known."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return None if not given else given if given in self.hub.tokens else ""

    def _repo(self, name: str) -> Repo | None:
        token, repo = self._account(), self.hub.repos.get(name)
        if token == "":
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.is_private and token is None):
            # As the Hub: who may not know that it is there is not told.
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _describe(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        if (commit := repo.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        with_sizes = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = []
        for path, content in repo.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": path}
            if with_sizes:
                sibling |= {"size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                if path.endswith(LARGE_SUFFIXES):
                    sha256 = digest_of(path, content)
                    sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
                else:
                    sibling["blobId"] = digest_of(path, content)
            siblings.append(sibling)
        gated = "manual" if repo.is_gated else False
        told: dict[str, Any] = {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": commit,
            "gated": gated,
            "tags": [],
        }
        self._json({**told, "private": repo.is_private, "downloads": 0, "likes": 0, "siblings": siblings})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        token = self._account()
        if repo.is_gated and (token is None or name not in self.hub.tokens[token]):
            text = f"Access to model {name} is restricted."
            self._refuse(401 if token is None else 403, "GatedRepo", text)
            return
        if (commit := repo.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        content = repo.commits[commit].get(path)
        if content is None:
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        digest = digest_of(path, content)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.endswith(LARGE_SUFFIXES):
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            headers |= {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
            if self.hub.has_xet:
                # As all models of the Hub are stored today; who does not speak its protocol gets the link.
                headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.hub.endpoint}/xet-token"}
            self._answer(302, {**headers, "Location": f"{self.hub.store}/store/{digest}?signature=x"})
            return
        self.hub.sent[path] = self.hub.sent.get(path, 0) + len(content) * (self.command == "GET")
        self._answer(200, {**headers, "ETag": f'"{digest}"', "Content-Length": str(len(content))}, content)


class _Store(_Handler):
    def answer(self, path: str) -> None:
        content = self.hub.of_store(path.removeprefix("/store/"))
        if self.headers.get("Authorization"):
            self._answer(400, {})  # as signed links do
        elif content is None:
            self._answer(404, {})
        else:
            self._send(path, content)

    def _send(self, path: str, content: bytes) -> None:
        hub, begin = self.hub, 0
        given = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if given and hub.expires:
            hub.expires -= 1
            self._answer(403, {})
            return
        headers = {"Content-Length": str(len(content))}
        if given and not hub.ignores_range:
            begin = int(given[1])
            headers = {
                "Content-Length": str(len(content) - begin),
                "Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}",
            }
        if hub.flood_nbytes:
            headers = {"Connection": "close"}
        self.send_response(206 if begin else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if hub.damages:
            content = content[:-1] + bytes([content[-1] ^ 1])
        rest = content[begin:]
        if hub.break_after is not None:
            rest = rest[: hub.break_after]
        held = hub.held if len(content) >= 50_000 else None
        half = len(rest) // 2 if held is not None else len(rest)
        self._write(path, rest[:half])
        if held is not None:
            hub.reached.set()
            held.wait()
            self._write(path, rest[half:])
        for _ in range(0, hub.flood_nbytes, 1 << 20):
            if not self._write(path, bytes(1 << 20)):
                break
        if hub.break_after is not None:
            self.close_connection = True

    def _write(self, path: str, content: bytes) -> bool:
        try:
            self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True
            return False
        self.hub.sent[path] = self.hub.sent.get(path, 0) + len(content)
        return True
