"""A hub on this machine: enough of its protocol for `snapshot_download`."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class _Hub(ThreadingHTTPServer):
    def __init__(self, models: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.sent = models, set[str]()


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """`/api/models/ORG/NAME/revision/main`, `/api/.../tree/...` and `/ORG/NAME/resolve/...`."""
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            files = self.server.models["/".join(path[2:4])]
            listed: object = {"id": "/".join(path[2:4]), "sha": COMMIT, "private": False,
                              "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
            if path[4] == "tree":
                listed = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                          for name, content in files.items()]  # fmt: skip
            self._answer(json.dumps(listed).encode(), "application/json")
            return
        name = "/".join(path[4:])
        content = self.server.models["/".join(path[:2])].get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.command == "GET":
            self.server.sent.add(name)
        self._answer(content, "application/octet-stream")

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub(models: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, set[str]]]:
    """The address of a hub with these files by model, and the names of the files that it sent."""
    server = _Hub(models)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
