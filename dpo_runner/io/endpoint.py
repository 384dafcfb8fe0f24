"""A client of OpenAI-compatible endpoints, with retries, a rate limit and several requests at a time."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from dpo_runner.errors import RunError
from dpo_runner.io.masking import MASK, mask_secrets

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each retry if an endpoint is busy, failing, slow or unreachable."""
_LONGEST_WAIT = 60.0
_LARGEST_REPLY = 2**22

Result = TypeVar("Result")


class RequestFailed(RunError):
    """A request failed for good; others to the same endpoint may succeed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Blocks redirects: urllib would forward the API key to their targets."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """An OpenAI-compatible endpoint.

    Args:
        section: the configuration's section that describes it, such as `judge`, for messages.
        base_url: its URL, which ends with `/v1`.
        api_key_env: the environment variable with the API key. It is read at each request, and the key is redacted
            from everything that is returned or raised.
        timeout: seconds to wait for a reply.
        requests_per_minute: limit on the rate of requests, retries included; None: no limit.
        kept: what of the work so far is kept, for the message after the last retry.
    """

    def __init__(
        self,
        section: str,
        base_url: str,
        api_key_env: str,
        timeout: float,
        requests_per_minute: float | None = None,
        kept: str = "what is done is kept",
    ) -> None:
        self._section, self._url, self._key_env, self._timeout = section, base_url, api_key_env, timeout
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._turn = 0.0, threading.Lock()
        self._kept, self._stopped = kept, threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.failure: RunError | None = None  # because of which no request would be answered

    def chat(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Ask for chat completions, and return the reply's `choices`, at least one.

        Each has a `message` with a text as `content`, which is empty if the model wrote none.

        Raises:
            RequestFailed: the endpoint refuses this request, fails several times, or replies with something else.
            RunError: it would refuse any request, or cannot be reached.
        """
        reply = self._post(json.dumps(body).encode())
        try:
            choices = list(json.loads(reply)["choices"])
            for choice in choices:
                content = choice["message"].get("content")
                if not isinstance(content, str | None):
                    raise TypeError
                choice["message"]["content"] = self._hide_key(content or "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            choices = []
        if choices:
            return choices
        raise self._error("its reply has no choices[0].message.content; is it an OpenAI-compatible API?", RequestFailed)

    def stop(self) -> None:
        """Make no more requests, and end the waits between retries; requests under way are not aborted."""
        self._stopped.set()

    def _post(self, body: bytes) -> bytes:
        for wait in (*WAITS, None):
            self._await_turn()
            kind: type[RunError] = RequestFailed
            try:
                return self._post_once(body)
            except urllib.error.HTTPError as error:
                if error.code not in (408, 429) and error.code < 500:
                    raise self._refusal(error) from None
                asked = error.headers.get("Retry-After", "")
                reason, least = f"HTTP {error.code} {error.reason}", float(asked) if asked.isdigit() else 0.0
                error.close()
            except TimeoutError:
                reason, least = f"no reply within {self._timeout:g} s", 0.0
            except (OSError, http.client.HTTPException) as error:  # also URLError: no request would arrive
                reason, least = self._redact(str(getattr(error, "reason", error)) or type(error).__name__), 0.0
                kind = RunError
            if wait is not None and self._stopped.wait(min(max(wait, least), _LONGEST_WAIT)):
                raise self._error(f"{reason}; not tried again", kind)
        raise self._error(
            f"{reason}, {len(WAITS) + 1} times; {self._kept}, and the same command goes on from there", kind
        )

    def _await_turn(self) -> None:
        """Wait until the rate limit allows a request.

        Raises:
            RequestFailed: no more requests are wanted.
        """
        with self._turn:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval
        if self._stopped.wait(start - now):
            raise self._error("no more requests are made", RequestFailed)

    def _post_once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._url.rstrip('/')}/chat/completions", body, headers, method="POST")
        with self._opener.open(request, timeout=self._timeout) as response:
            return bytes(response.read(_LARGEST_REPLY))

    def _refusal(self, error: urllib.error.HTTPError) -> RunError:
        with error:
            said = " ".join(error.read(300).decode("utf-8", "replace").split())
        what = f"HTTP {error.code} {error.reason}"
        if error.code in (401, 403):
            state = "holds a key that is not accepted" if self._key() else "is not set"
            return self._error(
                f"{what}; the environment variable {self._key_env} ({self._section}.api_key_env) {state}"
            )
        if error.code == 404:
            return self._error(f"{what}; is the address right (it mostly ends with /v1), and the model's name there?")
        kind = RequestFailed if error.code in (400, 413, 422) else RunError
        return self._error(f"{what}: {self._redact(said)}", kind)

    def _error(self, text: str, kind: type[RunError] = RunError) -> RunError:
        error = kind(f"`{self._section}.base_url={mask_secrets(self._url)}`: {text}")
        if not isinstance(error, RequestFailed):  # other threads make no more requests either
            self.failure = self.failure or error
            self.stop()
        return error

    def _key(self) -> str:
        return os.environ.get(self._key_env, "")

    def _hide_key(self, text: str) -> str:
        key = self._key()
        return text.replace(key, MASK) if key else text

    def _redact(self, text: str) -> str:
        return str(mask_secrets(self._hide_key(text)))


def call_all(
    endpoint: Endpoint, calls: Sequence[Callable[[], Result]], concurrency: int
) -> Iterator[tuple[int, Result | RequestFailed]]:
    """Make calls to an endpoint, some at a time, and yield the number and the result of each as it ends.

    A caller that stops early, or the first error other than RequestFailed, cancels the calls that have not begun and
    waits for those under way.

    Raises:
        RunError: a call raised it.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        pending = {pool.submit(call): number for number, call in enumerate(calls)}
        try:
            for future in as_completed(pending):
                error = future.exception()
                if endpoint.failure is not None:
                    raise endpoint.failure
                if isinstance(error, RequestFailed):
                    yield pending[future], error
                else:
                    yield pending[future], future.result()
        except BaseException:
            endpoint.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
