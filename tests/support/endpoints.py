"""An OpenAI-compatible endpoint on loopback, with faults."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dpo_runner.io import endpoint as module

KEY = "sk-loopback-0123456789abcdefghij"


class Endpoint:
    """A server of chat completions.

    Attributes:
        reply: returns the texts of the choices for a request's body; a text may end with `<cut>`, which makes its
            finish_reason `length`.
        faults: what the next requests get instead, one each: a status, `drop`, `hang`, or the text of a reply.
        refuse: returns a status with which a request is refused, or None.
        delay: seconds that each reply takes.
        requests, headers: what was received.
        replied: the bodies of the requests whose replies were sent.
        most_at_once: the largest number of requests under way.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.replied: list[dict[str, Any]] = []
        self.faults: list[int | str] = []
        self.times: list[float] = []
        self.reply: Callable[[dict[str, Any]], list[str]] = lambda body: ["text"] * body.get("n", 1)
        self.refuse: Callable[[dict[str, Any]], int | None] = lambda body: None
        self.delay, self.under_way, self.most_at_once = 0.0, 0, 0
        self._lock = threading.Lock()
        endpoint, hung = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.requests.append({"path": self.path, **body})
                    endpoint.headers.append(dict(self.headers))
                    endpoint.times.append(time.monotonic())
                    endpoint.under_way += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.under_way)
                    fault = endpoint.faults.pop(0) if endpoint.faults else endpoint.refuse(body)
                try:
                    self.answer(body, fault)
                finally:
                    with endpoint._lock:
                        endpoint.under_way -= 1

            def answer(self, body: dict[str, Any], fault: int | str | None) -> None:
                if fault == "drop":
                    self.connection.close()
                elif fault == "hang":
                    hung.wait(5)
                elif isinstance(fault, int):
                    key = self.headers.get("Authorization", "")
                    self.send(fault, f"no: {key}".encode())
                elif fault is not None:
                    self.send(200, fault.encode())
                else:
                    hung.wait(endpoint.delay)
                    self.send(200, json.dumps({"choices": list(map(choice, endpoint.reply(body)))}).encode())
                    with endpoint._lock:
                        endpoint.replied.append(body)

            def send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.release = hung.set
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def choice(text: str) -> dict[str, Any]:
    whole = text.removesuffix("<cut>")
    return {"message": {"role": "assistant", "content": whole}, "finish_reason": "stop" if whole == text else "length"}


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, kind: type[Endpoint] = Endpoint) -> Iterator[Any]:
    """Start an endpoint, with its key in JUDGE_KEY and retries without long waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(module, "WAITS", (0.01, 0.02))
    endpoint = kind()
    yield endpoint
    endpoint.release()
    endpoint.server.shutdown()
    endpoint.server.server_close()
