"""A server that speaks the Hugging Face Hub's file API, with its storage on another host name, as the real one.

- `GET /api/models/{repo}` lists the files with sizes and hashes.
- `HEAD` and `GET /{repo}/resolve/{revision}/{file}` answer for LFS files with a redirect to the storage and the
  headers `X-Linked-Etag`, `X-Linked-Size` and `X-Repo-Commit`; for others with the file.
- `GET /storage/{digest}` knows `Range`. It answers only on the name of the storage, and only without a token.

What the real one does not do on demand: it holds or cuts an answer after so many bytes, damages a file, ignores
`Range`.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.engines import eventually

TOKEN = "hf_secretsecretsecret"
_CHUNK_BYTES = 16 * 1024
_LFS_BYTES = 1024


@dataclass
class Repo:
    """A repository: `files` by their paths; `private` and `gated` ones need the token."""

    files: dict[str, bytes]
    private: bool = False
    gated: bool = False

    @property
    def commit(self) -> str:
        """The newest version."""
        return hashlib.sha1(repr(sorted((k, digest(v)) for k, v in self.files.items())).encode()).hexdigest()


def digest(content: bytes) -> str:
    """A file's hash as the Hub names it: SHA-256 if it is in LFS, else that of a Git blob."""
    if len(content) >= _LFS_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@dataclass
class Hub:
    """The server, and what it was asked.

    Attributes:
        repos: by `user/repo`.
        cut_after_bytes: each answer with a file ends after so many bytes; None for none.
        hold_after_bytes: an answer with a file sends no more than so many bytes until `release` is called.
        ignores_range: whether a file is always sent whole.
        damage: changes the bytes of files before they are sent.
        status: instead of an answer with a file, this status.
        requests: method, path and headers of all requests, in order.
    """

    port: int
    repos: dict[str, Repo] = field(default_factory=dict)
    cut_after_bytes: int | None = None
    hold_after_bytes: int | None = None
    ignores_range: bool = False
    damage: Callable[[bytes], bytes] | None = None
    status: int | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent_bytes: int = 0
    _released: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://localhost:{self.port}"

    def release(self) -> None:
        """Send what was held."""
        self._released.set()

    def ranges(self) -> list[str]:
        """The ranges of all requests to the storage."""
        return [headers.get("range", "") for _, path, headers in self.requests if path.startswith("/storage/")]

    # --- answers ------------------------------------------------------------------------------------

    def app(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                Route("/api/models/{user}/{name}", self._info),
                Route("/api/models/{user}/{name}/revision/{revision}", self._info),
                Route("/{user}/{name}/resolve/{revision}/{file:path}", self._resolve, methods=["GET", "HEAD"]),
                Route("/storage/{digest}", self._storage),
            ]
        )

    def _note(self, request: Request) -> None:
        self.requests.append((request.method, request.url.path, dict(request.headers)))

    def _refusal(self, request: Request, *, of_file: bool) -> Response | None:
        repo = self.repos.get(f"{request.path_params['user']}/{request.path_params['name']}")
        has_token = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not has_token):
            code = 404 if has_token else 401
            return _error(code, "RepoNotFound" if has_token else "", "Invalid username or password.")
        if repo.gated and of_file and not has_token:
            return _error(401, "GatedRepo", "Access to this model is restricted.")
        return None

    async def _info(self, request: Request) -> Response:
        self._note(request)
        refusal = self._refusal(request, of_file=False)
        if refusal is not None:
            return refusal
        name = f"{request.path_params['user']}/{request.path_params['name']}"
        repo = self.repos[name]
        siblings: list[dict[str, Any]] = []
        for path, content in repo.files.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in request.query_params:
                sibling |= {"size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                if len(content) >= _LFS_BYTES:
                    sibling["lfs"] = {"sha256": digest(content), "size": len(content), "pointerSize": 135}
                else:
                    sibling["blobId"] = digest(content)
            siblings.append(sibling)
        return JSONResponse({"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "tags": []})

    async def _resolve(self, request: Request) -> Response:
        self._note(request)
        refusal = self._refusal(request, of_file=True)
        if refusal is not None:
            return refusal
        repo = self.repos[f"{request.path_params['user']}/{request.path_params['name']}"]
        if request.path_params["revision"] not in ("main", repo.commit):
            return _error(404, "RevisionNotFound", "Invalid rev id")
        content = repo.files.get(request.path_params["file"])
        if content is None:
            return _error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if len(content) < _LFS_BYTES:
            return Response(content, headers={**headers, "ETag": f'"{digest(content)}"'})
        return RedirectResponse(
            f"http://127.0.0.1:{self.port}/storage/{digest(content)}?Signature=signed-secret",
            status_code=302,
            headers={**headers, "X-Linked-Etag": f'"{digest(content)}"', "X-Linked-Size": str(len(content))},
        )

    async def _storage(self, request: Request) -> Response:
        self._note(request)
        if "authorization" in request.headers or request.url.hostname != "127.0.0.1":
            return Response("only one kind of authorization", 400)
        if self.status is not None:
            return Response(status_code=self.status)
        files = [content for repo in self.repos.values() for content in repo.files.values()]
        content = next(each for each in files if digest(each) == request.path_params["digest"])
        begin, end = 0, len(content)
        span = request.headers.get("range", "").removeprefix("bytes=")
        is_part = bool(span) and not self.ignores_range
        if is_part:
            first, _, last = span.partition("-")
            begin, end = int(first), min(int(last) + 1 if last else end, end)
        if self.damage is not None:
            content = self.damage(content)
        headers = {"Content-Length": str(end - begin), "ETag": f'"{request.path_params["digest"]}"'}
        if is_part:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        return StreamingResponse(self._pieces(content[begin:end]), 206 if is_part else 200, headers)

    def _pieces(self, content: bytes) -> Iterator[bytes]:
        sent = 0
        while sent < len(content):
            if self.cut_after_bytes is not None and sent >= self.cut_after_bytes:
                raise ConnectionResetError("cut for a test")
            if self.hold_after_bytes is not None and sent >= self.hold_after_bytes:
                self._released.wait()
            piece = content[sent : sent + _CHUNK_BYTES]
            sent += len(piece)
            self.sent_bytes += len(piece)
            yield piece


def _error(status: int, code: str, message: str) -> Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return JSONResponse({"error": message}, status, headers)


@contextmanager
def running_hub(**repos: dict[str, bytes] | Repo) -> Iterator[Hub]:
    """A server of these repositories of `user`: the names with `_` for `-`, and files or a repository each."""
    listening = socket.create_server(("127.0.0.1", 0))
    hub = Hub(listening.getsockname()[1])
    for name, repo in repos.items():
        hub.repos[f"user/{name.replace('_', '-')}"] = repo if isinstance(repo, Repo) else Repo(repo)
    server = uvicorn.Server(uvicorn.Config(hub.app(), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started, "the hub's server listens")
        yield hub
    finally:
        hub.release()
        server.should_exit = server.force_exit = True
        thread.join()
