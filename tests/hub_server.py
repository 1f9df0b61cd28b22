"""A hub on this machine: what the real client asks for, with commits, and with the faults of a real one.

with hub() as server:
    commit = server.push("model", "org/base", {"config.json": b"{}"}, tags=["v1"])
    processes.run_python("-m", "cpt_merge", "fetch", recipe, env=server.environment(cache))
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import parse_qs, unquote

Kind = Literal["model", "dataset"]


@dataclass
class Repository:
    """The files of each commit, and the commits that branches and tags name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request for a file. `start` is the first byte that was asked for."""

    method: str
    file: str
    start: int


class HubServer(ThreadingHTTPServer):
    """The hub; its attributes say how it behaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.renamed: dict[str, str] = {}  # old name -> name
        self.gated: dict[str, int] = {}  # name -> 401 or 403
        self.sizes: dict[str, int] = {}  # name -> what the list of its files says of each
        self.status: int | None = None  # the answer to everything
        self.silent = False  # connections are taken and never answered
        # file -> for each of its next downloads, after how many bytes the connection is cut
        self.cuts: dict[str, list[int]] = {}
        self.holds: dict[str, int] = {}  # file -> after how many bytes it waits for `release`
        self.held, self.release = threading.Event(), threading.Event()
        self.blobs: dict[str, bytes] = {}  # uploaded large files by their sha256
        self.private: dict[str, bool] = {}  # of repositories that an upload made
        self.asked = 0  # requests of any kind
        self.requests: list[Request] = []

    def push(
        self, kind: Kind, name: str, files: Mapping[str, bytes], tags: Sequence[str] = ()
    ) -> str:
        """A new commit of the main branch, with exactly these files; returns its id."""
        repository = self.repositories.setdefault((kind, name), Repository())
        commit = hashlib.sha1(f"{name}{len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs |= dict.fromkeys(["main", *tags], commit)
        return commit

    def push_folder(self, kind: Kind, name: str, folder: Path, tags: Sequence[str] = ()) -> str:
        """`push` the files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return self.push(kind, name, files, tags)

    def downloads(self) -> list[str]:
        """The names of the files that were asked for with GET, one for each time."""
        return [request.file for request in self.requests if request.method == "GET"]

    def environment(self, home: Path) -> dict[str, str]:
        """The variables with which a process uses this hub, and a cache below `home`."""
        return {
            "HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_POST(self) -> None:
        """`/api/KINDs/NAME/paths-info/REVISION`, and what an upload asks for."""
        uploads = {
            "/api/repos/create": self._create,
            "/preupload/main": self._preupload,
            ".git/info/lfs/objects/batch": self._batch,
            "/commit/main": self._commit,
            "/api/validate-yaml": lambda _: self._send_json({"errors": [], "warnings": []}),
        }
        path = self.path.partition("?")[0]
        answer = next((one for end, one in uploads.items() if path.endswith(end)), None)
        if answer is None:
            self.do_GET()
        elif not self.headers.get("Authorization"):
            self._fail(401, "")
        else:
            answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def do_PUT(self) -> None:
        """The content of a large file; the server cuts the connection as `cuts` of `PUT` says."""
        size = int(self.headers["Content-Length"])
        cuts = self.server.cuts.get("PUT")
        if cuts:
            self.rfile.read(min(size, cuts.pop(0)))
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(size)
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._send_json({})

    def _create(self, body: str) -> None:
        asked = json.loads(body)
        name = (
            f"{asked['organization']}/{asked['name']}"
            if asked.get("organization")
            else asked["name"]
        )
        if ("model", name) in self.server.repositories:
            self._send_json({"error": "it exists", "url": f"{self.server.address}/{name}"}, 409)
            return
        self.server.push("model", name, {".gitattributes": b""})
        self.server.private[name] = (
            asked.get("visibility") == "private" or asked.get("private") is True
        )
        self._send_json({"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def _preupload(self, body: str) -> None:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        self._send_json({"files": files})

    def _batch(self, body: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.address}/blob/{one['oid']}"}
            known = one["oid"] in self.server.blobs
            objects.append({**one, **({} if known else {"actions": {"upload": upload}})})
        self._send_json({"transfer": "basic", "objects": objects})

    def _commit(self, body: str) -> None:
        name = "/".join(self.path.split("/")[3:5])
        repository = self.server.repositories["model", name]
        files = dict(repository.commits[repository.refs["main"]])
        for line in filter(None, body.splitlines()):
            value, kind = json.loads(line)["value"], json.loads(line)["key"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = self.server.push("model", name, files)
        url = f"{self.server.address}/{name}/commit/{commit}"
        self._send_json({"commitOid": commit, "commitUrl": url, "success": True})

    def do_GET(self) -> None:
        """`/api/KINDs/NAME[/revision/REVISION]`, `/api/KINDs/NAME/tree/REVISION` and
        `[/datasets]/NAME/resolve/REVISION/FILE`.
        """
        self.server.asked += 1
        if self.server.silent:
            self.server.release.wait()
            return
        if self.server.status is not None:
            self._fail(self.server.status, "")
            return
        path = self.path.partition("?")[0]
        found = re.fullmatch(
            r"/(api/models/|api/datasets/|datasets/|)([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+))?(?:/(.+))?",
            path,
        )
        if found is None:
            self._fail(404, "RepoNotFound")
            return
        prefix, name, verb, revision, file = found.groups()
        if name in self.server.renamed:
            self.send_response(307)
            self.send_header("Location", self.path.replace(name, self.server.renamed[name], 1))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kind = "dataset" if "datasets" in prefix else "model"
        self._answer(kind, name, verb, unquote(revision or "main"), unquote(file or ""))

    def _answer(self, kind: str, name: str, verb: str | None, revision: str, file: str) -> None:
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            self._fail(401, "RepoNotFound")  # what the hub says to everybody who is not logged in
            return
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._fail(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if verb == "tree":
            self._send_json(self._tree(name, files, file, "recursive=true" in self.path.lower()))
        elif verb == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            listed = self._tree(name, files, "", recursive=True)
            self._send_json([one for one in listed if one["path"] in asked])
        elif verb == "resolve":
            self._resolve(name, commit, files, file)
        else:
            siblings = [{"rfilename": name} for name in files]
            private = self.server.private.get(name, False)
            self._send_json({"id": name, "sha": commit, "private": private, "siblings": siblings})

    def _tree(
        self, name: str, files: dict[str, bytes], folder: str, recursive: bool
    ) -> list[dict[str, object]]:
        """The files and folders below a folder."""
        start = f"{folder}/" if folder else ""
        below = sorted(path for path in files if path.startswith(start))
        folders = {parent for path in below for parent in map(str, PurePosixPath(path).parents)}
        folders = {one for one in folders if one.startswith(start) and one != "."}
        listed: list[dict[str, object]] = [
            {"type": "directory", "path": path, "oid": _digest(path.encode())}
            for path in sorted(folders)
        ]
        for path in below:
            size = self.server.sizes.get(name, len(files[path]))
            listed.append({"type": "file", "path": path, "size": size, "oid": _digest(files[path])})
        depth = start.count("/")
        return [one for one in listed if recursive or str(one["path"]).count("/") == depth]

    def _resolve(self, name: str, commit: str, files: dict[str, bytes], file: str) -> None:
        if name in self.server.gated:
            self._fail(self.server.gated[name], "GatedRepo")
            return
        if file not in files:
            self._fail(404, "EntryNotFound", commit)
            return
        content = files[file]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        part = content[start : int(span[2]) + 1 if span and span[2] else None]
        self.server.requests.append(Request(self.command, file, start))
        self.send_response(206 if span else 200)
        if span:
            last = start + len(part) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{_digest(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self._send(file, part)

    def _send(self, file: str, part: bytes) -> None:
        cuts = self.server.cuts.get(file)
        if cuts:
            self.wfile.write(part[: cuts.pop(0)])
            self.close_connection = True
            return
        hold = self.server.holds.get(file)
        if hold is not None:
            self.wfile.write(part[:hold])
            self.server.held.set()
            self.server.release.wait()
            part = part[hold:]
        self.wfile.write(part)

    def _send_json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub() -> Iterator[HubServer]:
    """A hub without repositories, which ends with the block or with `shutdown`."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
