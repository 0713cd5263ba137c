"""Before a request reaches the service: token, rate, size; after it: the access log and the metrics.

Plain ASGI, so that streams pass through piece by piece.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException

from rporec.config import ConfigError, ServeConfig
from serve.schema import Problem

TOKEN_VARIABLE = "RPOREC_SERVE_TOKEN"
OPEN_PATHS = ("/", "/healthz", "/readyz", "/docs")  # and the page's files: what holds nobody's data
UNEXPECTED = "a fault of the service; its log has the reason"
LOGGER = logging.getLogger("ray.serve")


def read_token(config: ServeConfig) -> str | None:
    """The bearer token of the file that the config names, else of the environment. ConfigError when the file has none."""
    if config.token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = Path(config.token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"serve.token_file: {config.token_file}: {error.strerror}") from None
    if not token:
        raise ConfigError(f"serve.token_file: {config.token_file} is empty; write one line with the token")
    return token


class Rates:
    """A token bucket for each client: `per_minute` requests a minute, as many at once."""

    MOST = 10_000  # clients remembered; beyond them the one that was idle longest is forgotten

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}  # client -> (requests left, when)

    def wait(self, client: str, now: float) -> float:
        """Seconds until the client may send this request; 0.0: it may, and it is counted."""
        left, when = self._left.pop(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - when) * self._per_minute / 60)
        allowed = left >= 1
        self._left[client] = (left - allowed, now)
        if len(self._left) > self.MOST:
            del self._left[next(iter(self._left))]
        return 0.0 if allowed else (1 - left) * 60 / self._per_minute


class Metrics:
    """Of one ingress replica, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        self._requests = Counter("rporec_requests", "HTTP requests", labels, registry=self.registry)
        self._seconds = Histogram("rporec_request_seconds", "Until the last byte", ("path",), registry=self.registry)
        self._fallbacks = Counter("rporec_fallbacks", "Lesser answers", ("reason",), registry=self.registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def fallback(self, reason: str) -> None:
        self._fallbacks.labels(reason).inc()


class Guard:
    """Wraps an ASGI app. `token` None: no authentication, for a service that only this machine reaches."""

    def __init__(self, app: Any, config: ServeConfig, token: str | None, metrics: Metrics) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._token = None if token is None else token.encode()
        self._rates = Rates(config.requests_per_minute) if config.requests_per_minute else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # until it is known: the client has gone
        received = 0

        async def measured() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._config.max_body_bytes:
                raise HTTPException(413, f"at most {self._config.max_body_bytes} bytes")  # passes through FastAPI
            return message

        started = False

        async def watched(message: Any) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _send(watched, *refusal)
            else:
                await self._app(scope, measured, watched)
        except Exception:
            LOGGER.exception("%s %s failed", scope["method"], _template(scope))
            if not started:
                await _send(watched, Problem.of(500, UNEXPECTED), {})
            elif status != 500:
                raise  # a response that was cut off must not look whole
        finally:
            seconds = time.perf_counter() - began
            self._metrics.request(_template(scope), status, seconds)
            LOGGER.info("%s %s %d %.1fms", scope["method"], _template(scope), status, seconds * 1e3)

    def _refusal(self, scope: Any) -> tuple[Problem, dict[str, str]] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"")
        open_path = scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/")
        if self._token is not None and not open_path:
            scheme, _, token = given.partition(b" ")
            known = hmac.compare_digest(token.strip(), self._token)  # takes as long wherever the first difference is
            if scheme.lower() != b"bearer" or not known:
                detail = "send the header Authorization: Bearer TOKEN"
                return Problem.of(401, detail), {"WWW-Authenticate": "Bearer"}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            return Problem.of(413, f"at most {self._config.max_body_bytes} bytes"), {}
        if self._rates is not None and not open_path:
            client = "token" if self._token is not None else str((scope.get("client") or ("",))[0])
            if wait := self._rates.wait(client, time.monotonic()):
                detail = f"at most {self._config.requests_per_minute} requests a minute"
                return Problem.of(429, detail), {"Retry-After": str(int(wait) + 1)}
        return None


async def _send(send: Any, problem: Problem, headers: dict[str, str]) -> None:
    body = json.dumps(problem.model_dump(exclude_none=True)).encode()
    fields = {"Content-Type": "application/problem+json", "Content-Length": str(len(body)), **headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _template(scope: Any) -> str:
    """The route's path as it is declared: what a client put into the path never reaches log or metrics."""
    route = scope.get("route")
    return getattr(route, "path", "unmatched")
