"""A small W&B server for the tests: what wandb-core 0.31 asks for, recorded from it, and no more.

History is kept as a W&B server keeps it: lines at the offsets that the client names, so a client
that begins at the wrong offset overwrites rows (`overwritten`) or leaves a hole (`None` in
`history`). A run that exists is told to the client when it resumes, with its number of lines and
its last one. It is ours: what it proves of wandb's client holds for any server that keeps lines by
offset, and nothing here was compared with W&B's own server.
"""

import gzip
import http.server
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "output.log": "log"}


@dataclass
class ServerRun:
    """What the server holds of one run."""

    name: str
    number: int
    group: str = ""
    job_type: str = ""
    display_name: str = ""
    tags: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    history: list[Json | None] = field(default_factory=list)
    events: list[Json | None] = field(default_factory=list)
    log: list[str | None] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[Json] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # artifacts, NAME:vN
    logged: list[str] = field(default_factory=list)
    exit_code: int | None = None
    overwritten: int = 0  # lines that came twice

    def rows(self, metric: str, by: str = "train/step") -> list[tuple[float, float]]:
        """(x, value) of every row with both, in the order of their lines."""
        return [
            (row[by], row[metric]) for row in self.history if row and metric in row and by in row
        ]

    def resume_status(self) -> Json:
        """What `RunResumeStatus` asks for."""
        config = {name: {"value": value} for name, value in self.config.items()}
        return {
            "id": f"run{self.number}",
            "name": self.name,
            "displayName": self.display_name,
            "tags": self.tags,
            "notes": None,
            "config": json.dumps(config),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history),
            "eventsLineCount": len(self.events),
            "logLineCount": len(self.log),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in self.events[-1:]]),
        }


@dataclass
class ServerArtifact:
    """One version of an artifact."""

    number: int
    name: str
    type: str
    version: int
    digest: str
    metadata: Json
    maker: str  # the run that named it first
    manifest: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "PENDING"

    @property
    def full_name(self) -> str:
        return f"{self.name}:v{self.version}"


class WandbServer:
    """The server, on a free port of 127.0.0.1.

    `stop` and `start` may be called again: the port stays its own.
    """

    def __init__(self) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.artifacts: list[ServerArtifact] = []
        self.received: list[bytes] = []  # every path, header and body
        self.unknown: list[str] = []  # GraphQL that there is no answer for
        self.calls: Counter[str] = Counter()
        self.hangs = False  # accept and never answer
        self._port = 0
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "WandbServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> "WandbServer":
        self._server = _Listener(
            ("127.0.0.1", self._port), type("Bound", (_Handler,), {"wandb": self})
        )
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that a client sends."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "the server has waited for a minute"
            time.sleep(0.02)

    def graphql(self, query: str, values: Json) -> Json | None:
        """The data of one answer; None for a call that is not known."""
        call = query.split("(", 1)[0].split("{", 1)[0].split()[-1]
        self.calls[call] += 1
        answer = getattr(self, f"_{call}", None)
        if answer is None:
            self.unknown.append(query)
            return None
        with self._lock:
            return answer(values)

    def _Viewer(self, _: Json) -> Json:  # noqa: N802 - GraphQL's names
        viewer = {
            "id": "user",
            "entity": "tester",
            "username": "tester",
            "email": "",
            "flags": "{}",
        }
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, _: Json) -> Json:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:  # noqa: N802
        return {"entity": {"organization": {"coreWeaveOrganizationId": ""}}}

    def _RunResumeStatus(self, values: Json) -> Json:  # noqa: N802
        run = self.runs.get(values["name"])
        entity = {"id": "entity", "name": "tester"}
        project = {"id": "project", "name": values["project"], "entity": entity}
        return {"model": {**project, "bucket": run.resume_status() if run else None}}

    def _UpsertBucket(self, values: Json) -> Json:  # noqa: N802
        name, inserted = values["name"], values["name"] not in self.runs
        run = self.runs.setdefault(name, ServerRun(name, len(self.runs)))
        run.group, run.job_type = (
            values["groupName"] or run.group,
            values["jobType"] or run.job_type,
        )
        run.display_name, run.tags = (
            values["displayName"] or run.display_name,
            values["tags"] or run.tags,
        )
        if values["config"]:
            run.config = {
                key: entry["value"] for key, entry in json.loads(values["config"]).items()
            }
        if values["summaryMetrics"]:
            run.summary = json.loads(values["summaryMetrics"])
        project = {
            "id": "project",
            "name": values["project"],
            "entity": {"id": "entity", "name": "tester"},
        }
        config = {key: {"value": value} for key, value in run.config.items()}
        bucket = {
            "id": f"run{run.number}",
            "name": name,
            "displayName": run.display_name,
            "description": None,
            "config": json.dumps(config),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, values: Json) -> Json:  # noqa: N802
        urls = [
            {"name": file, "uploadUrl": f"{self.url}/put/run/{values['run']}/{file}"}
            for file in values["files"]
        ]
        return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": urls}}

    def _NotifyScriptableRunAlert(self, values: Json) -> Json:  # noqa: N802
        self.runs[values["runName"]].alerts.append(
            {"title": values["title"], "text": values["text"]}
        )
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, values: Json) -> Json:  # noqa: N802
        found = self._find(values["name"])
        return {"project": {"artifact": found and {"artifactType": {"name": found.type}}}}

    def _find(self, name: str) -> ServerArtifact | None:
        """By `NAME:vN` or `NAME:latest`."""
        named = [one for one in self.artifacts if name in (one.full_name, f"{one.name}:latest")]
        return named[-1] if named else None

    def _CreateArtifact(self, values: Json) -> Json:  # noqa: N802
        asked = values["input"]
        name, kind, digest = (
            asked["artifactCollectionName"],
            asked["artifactTypeName"],
            asked["digest"],
        )
        same = [one for one in self.artifacts if one.name == name]
        found = next((one for one in same if one.digest == digest), None)
        if found is None:
            metadata = json.loads(asked["metadata"] or "{}")
            found = ServerArtifact(
                len(self.artifacts), name, kind, len(same), digest, metadata, asked["runName"]
            )
            self.artifacts.append(found)
        self.runs[asked["runName"]].logged.append(found.full_name)
        sequence = {"latestArtifact": {"id": f"artifact{same[-1].number}"} if same else None}
        return {
            "createArtifact": {
                "artifact": {
                    "id": f"artifact{found.number}",
                    "state": found.state,
                    "artifactSequence": sequence,
                }
            }
        }

    def _CreateArtifactManifest(self, values: Json) -> Json:  # noqa: N802
        number = values["artifactID"].removeprefix("artifact")
        file = {
            "id": f"manifest{number}",
            "uploadUrl": f"{self.url}/put/manifest/{number}/m",
            "uploadHeaders": [],
        }
        return {
            "createArtifactManifest": {
                "artifactManifest": {"id": f"manifest{number}", "file": file}
            }
        }

    def _CreateArtifactFiles(self, values: Json) -> Json:  # noqa: N802
        nodes = []
        for file in values["input"]["artifactFiles"]:
            number = file["artifactID"].removeprefix("artifact")
            url = f"{self.url}/put/artifact/{number}/{file['name']}"
            stored = {
                "id": f"{number}/{file['name']}",
                "name": file["name"],
                "displayName": file["name"],
            }
            place = {
                "uploadUrl": url,
                "uploadHeaders": [],
                "storagePath": "x",
                "uploadMultipartUrls": None,
            }
            nodes.append({"node": {**stored, **place, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, values: Json) -> Json:  # noqa: N802
        found = self.artifacts[int(values["artifactID"].removeprefix("artifact"))]
        found.state = "COMMITTED"
        return {
            "commitArtifact": {"artifact": {"id": values["artifactID"], "digest": found.digest}}
        }

    def _UseArtifact(self, values: Json) -> Json:  # noqa: N802
        found = self.artifacts[int(values["input"]["artifactID"].removeprefix("artifact"))]
        self.runs[values["input"]["runName"]].used.append(found.full_name)
        return {"useArtifact": {"artifact": {"id": values["input"]["artifactID"]}}}

    def file_stream(self, run: ServerRun, body: Json) -> Json:
        """Lines at their offsets."""
        with self._lock:
            for file, chunk in body.get("files", {}).items():
                if file == "wandb-summary.json":
                    run.summary = json.loads(chunk["content"][0])
                if file in STREAMS:
                    lines = (
                        chunk["content"]
                        if file == "output.log"
                        else [json.loads(line) for line in chunk["content"]]
                    )
                    self._place(run, getattr(run, STREAMS[file]), chunk["offset"], lines, file)
            if body.get("complete"):
                run.exit_code = body["exitcode"]
        return {"exitcode": None, "limits": {}}

    def _place(
        self, run: ServerRun, kept: list[Any], offset: int, lines: list[Any], file: str
    ) -> None:
        kept += [None] * (offset + len(lines) - len(kept))
        if file == "wandb-history.jsonl":
            run.overwritten += sum(row is not None for row in kept[offset : offset + len(lines)])
        kept[offset : offset + len(lines)] = lines


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[Any] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, address)

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that was killed in the middle is what the tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb: WandbServer

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        body = self._body()
        kind, name, file = self.path.removeprefix("/put/").split("/", 2)
        if kind == "run":
            self.wandb.runs[name].files[file] = body
        elif kind == "manifest":
            self.wandb.artifacts[int(name)].manifest = json.loads(body)
        else:
            self.wandb.artifacts[int(name)].files[file] = body
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self._body())
        if self.path.endswith("/file_stream"):
            self._answer(self.wandb.file_stream(self.wandb.runs[self.path.split("/")[-2]], body))
            return
        data = self.wandb.graphql(body["query"], body.get("variables") or {})
        self._answer(
            {"data": data}
            if data is not None
            else {"data": None, "errors": [{"message": "not known here"}]}
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        # the key belongs into this header, by which a server knows its user, and nowhere else
        shown = [
            f"{name}: {value}" for name, value in self.headers.items() if name != "Authorization"
        ]
        self.wandb.received.append("\n".join([self.path, *shown]).encode() + b"\n" + body)
        return body

    def _answer(self, answer: Json) -> None:
        while self.wandb.hangs:
            time.sleep(0.05)
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
