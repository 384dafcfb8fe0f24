"""A fake W&B server on a loopback port: stores data from runs and `wandb sync`, and fails on demand."""

import contextlib
import http.server
import json
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, unquote

API_KEY = "0123456789" * 4
HISTORY, SUMMARY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log"

Fault = Literal["none", "500", "500 for rows", "401", "key unknown", "no answer", "answer lost", "slow", "closed port"]
"""`no answer` drops the connection and stores nothing, `answer lost` stores the request first."""

_FORBIDDEN = {"data": None, "errors": [{"message": "permission denied", "extensions": {"code": "PERMISSION_ERROR"}}]}


@dataclass
class StoredRun:
    """The data stored for one run."""

    variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the UpsertBucket requests, later ones win: project, groupName, jobType, tags, …"""
    lines: dict[str, list[str]] = field(default_factory=dict)
    """Streamed files, written by offset as on the real server: a line sent twice is stored once."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Uploaded files."""
    exit_code: int | None = None
    complete: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """All logged rows, in the server's order."""
        return [json.loads(line) for line in self.lines.get(HISTORY, [])]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads(self.lines.get(SUMMARY, ["{}"])[-1]))

    @property
    def config(self) -> dict[str, Any]:
        config = json.loads(self.variables.get("config") or "{}")
        return {key: item["value"] for key, item in config.items()}

    def write_lines(self, name: str, offset: int, content: list[str]) -> None:
        lines = self.lines.setdefault(name, [])
        assert offset <= len(lines), f"{name}: {offset} leaves a gap after {len(lines)} lines"
        lines[offset : offset + len(content)] = content


class WandbServer:
    """The server; listens from construction on, and keeps its port and data across `stop` and `start`."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.operations: list[str] = []
        """Names of the GraphQL requests in order, including failed ones."""
        self.received: list[bytes] = []
        """The bodies of all requests."""
        self.fault: Fault = "none"
        self.delay = 0.0
        """Response delay in seconds for the fault `slow`."""
        self._port = 0
        self._lock = threading.Lock()
        self._listener: http.server.ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._listener = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._port = self._listener.server_port
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port, so that connections are refused."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def fail(self, fault: Fault) -> None:
        """Apply `fault` to every further request."""
        self.fault = fault
        if fault == "closed port":
            self.stop()

    def recover(self) -> None:
        self.fault = "none"
        if self._listener is None:
            self.start()

    def only_run(self) -> StoredRun:
        (run,) = self.runs.values()
        return run

    def handle(self, method: str, path: str, body: bytes) -> Any:
        """Store a request's data and return the JSON response."""
        with self._lock:
            if path.startswith("/graphql"):
                request = json.loads(body)
                if self.fault == "key unknown":
                    return {"data": {"viewer": None}} if _name(request) == "Viewer" else _FORBIDDEN
                return {"data": self._query(_name(request), request.get("variables") or {})}
            if path.endswith("/file_stream"):
                return self._stream(path.split("/")[-2], json.loads(body))
            if method == "PUT" and path.startswith("/upload/"):
                run_id, name = path.removeprefix("/upload/").split("/")
                self.runs[run_id].files[unquote(name)] = body
            return {}

    def _stream(self, run_id: str, request: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        for name, part in request.get("files", {}).items():
            if name == SUMMARY:
                run.lines[SUMMARY] = part["content"]
            else:
                run.write_lines(name, part["offset"], part["content"])
        if request.get("complete") is not None:
            run.complete, run.exit_code = request["complete"], request.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def _query(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "Viewer":
                viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
                return {"viewer": viewer}
            case "UpsertBucket":
                run_id = variables["name"]
                inserted = run_id not in self.runs
                given = {key: value for key, value in variables.items() if value is not None}
                self.runs.setdefault(run_id, StoredRun()).variables |= given
                return {"upsertBucket": {"bucket": self._bucket(run_id), "inserted": inserted}}
            case "RunResumeStatus":
                run_id = variables["name"]
                return {"model": {"bucket": self._resumable(run_id) if run_id in self.runs else None}}
            case "CreateRunFiles":
                run_id, names = variables["run"], variables["files"]
                files = [{"name": name, "uploadUrl": self._upload_url(run_id, name)} for name in names]
                return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
            case "CreateArtifact":  # an artifact the server already has: nothing to upload
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case _:
                return {}

    def _upload_url(self, run_id: str, name: str) -> str:
        return f"{self.url}/upload/{run_id}/{quote(name, safe='')}"

    def _bucket(self, run_id: str) -> dict[str, Any]:
        variables = self.runs[run_id].variables
        project = {"name": variables.get("project", "uncategorized"), "entity": {"name": "me"}}
        names = {"id": f"id-{run_id}", "name": run_id, "displayName": variables.get("displayName", run_id)}
        return {**names, "config": variables.get("config"), "sweepName": None, "project": project}

    def _resumable(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]

        def count(name: str) -> int:
            return len(run.lines.get(name, []))

        return {
            **self._bucket(run_id),
            "historyLineCount": count(HISTORY),
            "eventsLineCount": count(EVENTS),
            "logLineCount": count(OUTPUT),
            "historyTail": json.dumps(run.lines.get(HISTORY, [])[-1:]),
            "eventsTail": json.dumps(run.lines.get(EVENTS, [])[-1:]),
            "summaryMetrics": json.dumps(run.summary),
            "tags": run.variables.get("tags", []),
            "wandbConfig": json.dumps({"t": run.config.get("_wandb", {}).get("t")}),
        }


def _name(request: dict[str, Any]) -> str:
    """Return the name of a GraphQL request; requests of W&B's public API have it only in the query."""
    given = request.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
    return given if isinstance(given, str) else given[1] if given else ""


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: WandbServer

    def do_POST(self) -> None:
        self._serve()

    do_PUT = do_GET = do_POST

    def _serve(self) -> None:
        server, path = self.owner, self.path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.received.append(body)
        if path.startswith("/graphql"):
            server.operations.append(_name(json.loads(body)))
        fault = server.fault
        if fault == "slow":
            time.sleep(server.delay)
        if fault == "no answer":
            self.close_connection = True
            return
        if fault == "401" or (fault == "key unknown" and not path.startswith("/graphql")):
            self._answer(401, {"error": "user is not logged in"})
        elif fault == "500" or (fault == "500 for rows" and path.endswith("/file_stream")):
            self._answer(500, {"error": "internal error"})
        else:
            answer = server.handle(self.command, path, body)
            if fault == "answer lost":
                self.close_connection = True
            else:
                self._answer(200, answer)

    def _answer(self, status: int, value: Any) -> None:
        payload = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client may have timed out
            self.wfile.write(payload)

    def log_message(self, *args: object) -> None: ...
