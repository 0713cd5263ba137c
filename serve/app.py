"""HTTP: the routes, the page, errors as RFC 9457 problem documents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from rporec import __version__
from rporec.config import ServeConfig
from serve.guard import LOGGER, UNEXPECTED, Guard, Metrics
from serve.schema import (
    TITLES,
    Accepted,
    BatchRequest,
    BatchResponse,
    Feedback,
    Health,
    Item,
    ItemList,
    NewItem,
    Problem,
    Readiness,
    RecommendRequest,
    RecommendResponse,
    UserList,
)
from serve.service import Refused, Service, Unavailable

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Text = Annotated[str, Query(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=100)]


def build_app(
    service: Service, ready: Callable[[], Awaitable[Readiness]], config: ServeConfig, token: str | None
) -> Any:
    """The ASGI app. `ready` raises Unavailable while a deployment does not answer."""
    metrics = Metrics()
    app = FastAPI(
        title="rporec",
        version=__version__,
        description="Recommendations with their reasoning.",
        docs_url=None,
        redoc_url=None,
        responses=_problems(400, 401, 413, 429),
    )
    _problem_documents(app)

    @app.post("/v1/recommend", responses=_problems(422, 503) | {200: _STREAM})
    async def recommend(request: RecommendRequest) -> RecommendResponse:
        if request.stream:
            return _streamed(service, request, metrics)  # type: ignore[return-value]
        return _counted(metrics, await service.recommend(request))

    @app.post("/v1/recommend:batch", responses=_problems(422, 503))
    async def recommend_batch(batch: BatchRequest) -> BatchResponse:
        """All or none: one request that is refused refuses the batch. `stream` is of no effect here."""
        for request in batch.requests:
            service.check(request)  # before any work is done for its neighbours
        answers = await asyncio.gather(*(service.recommend(request) for request in batch.requests))
        return BatchResponse(responses=[_counted(metrics, answer) for answer in answers])

    @app.get("/v1/items", responses=_problems(422))
    async def items(q: Text = "", limit: Limit = 20) -> ItemList:
        return ItemList(items=await asyncio.to_thread(service.items, q, limit))

    @app.post("/v1/items", status_code=201, responses=_problems(409, 422))
    async def add_item(item: NewItem) -> Item:
        """Recommendable from the response on."""
        return await asyncio.to_thread(service.add, item)

    @app.get("/v1/users", responses=_problems(422))
    async def users(q: Text = "", limit: Limit = 20) -> UserList:
        return UserList(users=await asyncio.to_thread(service.users, q, limit))

    @app.post("/v1/feedback", status_code=201, responses=_problems(422))
    async def feedback(reaction: Feedback) -> Accepted:
        """Stored from the response on."""
        await service.feedback(reaction)
        return Accepted(accepted=1)

    @app.get("/healthz")
    async def healthz() -> Health:
        return Health(status="ok")

    @app.get("/readyz", responses=_problems(503))
    async def readyz() -> Readiness:
        return await ready()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html", headers=HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return Guard(app, config, token, metrics)


def _counted(metrics: Metrics, response: RecommendResponse) -> RecommendResponse:
    if response.fallback:
        metrics.fallback(response.fallback)
    return response


# --- server-sent events --------------------------------------------------------------------------
_STREAM_EVENT = {  # `data` is JSON as `serve.schema` says
    "type": "object",
    "properties": {"event": {"enum": ["token", "result", "error"]}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
_STREAM = {
    "content": {"text/event-stream": {"schema": _STREAM_EVENT}},
    "description": "The response, or with `stream` its events: token, then result or error.",
}


class _Events(StreamingResponse):
    media_type = "text/event-stream"


def _streamed(service: Service, request: RecommendRequest, metrics: Metrics) -> _Events:
    service.check(request)  # what is refused is refused with a status, before the stream begins

    async def events() -> AsyncIterator[str]:
        try:
            async for piece in service.stream(request):
                if isinstance(piece, str):
                    yield _event("token", {"text": piece})
                else:
                    yield _event("result", _counted(metrics, piece).model_dump())
        except Exception as error:
            if isinstance(error, Unavailable):
                problem = Problem.of(503, str(error))
            else:
                LOGGER.exception("a stream failed")
                problem = Problem.of(500, UNEXPECTED)
            yield _event("error", problem.model_dump(exclude_none=True))

    return _Events(events(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def _event(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


# --- errors --------------------------------------------------------------------------------------
def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's errors."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": TITLES[status], "content": content} for status in statuses}


def _problem(status: int, detail: str, **more: Any) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    body = Problem.of(status, detail, **more).model_dump(exclude_none=True)
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


def _problem_documents(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _problem(error.status, error.detail)

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Unavailable) -> JSONResponse:
        return _problem(503, str(error))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        return _problem(500, UNEXPECTED)  # what it was goes to the log, in `Guard`

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        answer = _problem(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})  # such as Allow
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input that was sent: it may be long, or somebody's.
        faults = [{"where": ".".join(map(str, one["loc"])), "what": one["msg"]} for one in error.errors()[:20]]
        first = faults[0]
        return _problem(422, f"{first['where']}: {first['what']}", errors=faults)
