"""The HTTP contract: what a client sends and gets. Pydantic only, so that docs and page rest on it alone.

A server-sent stream of `/v1/recommend` with `stream: true` has these events, each with one JSON object:

    token    {"text": …}         the completion as it is written, to be appended
    result   RecommendResponse   the end
    error    Problem             the end, when the reasoner was lost after the stream had begun
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_K = 1000  # items of one answer
MAX_HISTORY = 20_000  # items of one request; the head reads the newest of its window
MAX_BATCH = 64  # requests of one `recommend:batch`

LATEST = 10**11 - 1  # seconds: a larger number is in milliseconds, and not meant

Id = Annotated[str, Field(max_length=256, pattern=r"\S")]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Event(Message):
    """One raw event of a history; events are put in the order of their timestamps."""

    item_id: Id
    timestamp: int | None = Field(None, ge=0, le=LATEST, description="seconds since 1970")


class RecommendRequest(Message):
    """For a user by a history, oldest first, or by the id of a user whom the data set or the feedback log knows."""

    history: Annotated[list[Id | Event], Field(max_length=MAX_HISTORY)] | None = None
    user_id: Id | None = None
    k: int = Field(10, ge=1, le=MAX_K)
    reason: bool = Field(True, description="let the language model reason first; else the history alone decides")
    exclude: list[Id] = Field([], max_length=MAX_HISTORY, description="items that must not appear")
    exclude_history: bool = Field(True, description="leave out what the history holds")
    filters: dict[Id, list[Annotated[str, Field(max_length=256)]]] = Field(
        {}, max_length=16, description="per catalogue column the values of which an item must have one"
    )
    timeout_ms: int | None = Field(
        None, ge=1, le=600_000, description="past it the history alone decides; null: what the server is set to"
    )
    stream: bool = Field(False, description="server-sent events: the reasoning as it is written, then the items")


class BatchRequest(Message):
    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_BATCH)


class Item(Message):
    """`attributes`: the catalogue's other text columns that are not blank."""

    item_id: str
    title: str
    attributes: dict[str, str]


class ScoredItem(Item):
    score: float


class RecommendResponse(Message):
    """`version`: the one model that wrote and ranked this answer."""

    items: list[ScoredItem]
    cot: str | None = Field(description="the chain of thought; null where nothing was reasoned")
    answer: str | None
    version: str
    fallback: Literal["timeout", "reasoner_unavailable", "no_history"] | None = Field(
        description="why the answer is a lesser one than was asked for; no_history: the popular items"
    )
    warnings: list[str]
    timings_ms: dict[str, float] = Field(description="reason, retrieve, total")


class BatchResponse(Message):
    responses: list[RecommendResponse]


class ItemList(Message):
    items: list[Item]


class NewItem(Message):
    """Attributes of columns that the catalogue lacks are refused."""

    item_id: Id
    title: str = Field("", max_length=2_000)
    attributes: dict[str, Annotated[str, Field(max_length=10_000)]] = Field({}, max_length=64)


class User(Message):
    user_id: str
    history: list[Item] = Field(description="the newest last")


class UserList(Message):
    users: list[User]


class Feedback(Message):
    user_id: Id
    item_id: Id
    event: str = Field("click", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="like, dislike, click, purchase, …")
    timestamp: int | None = Field(None, ge=0, le=LATEST, description="seconds since 1970; null: now")


class Accepted(Message):
    accepted: int


TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Problem(BaseModel):
    """RFC 9457, `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = None  # of 422: where and what

    @classmethod
    def of(cls, status: int, detail: str, **more: Any) -> Problem:
        return cls(title=TITLES.get(status, "Error"), status=status, detail=detail, **more)


class Health(Message):
    status: Literal["ok"]


class Readiness(Message):
    status: Literal["ready"]
    version: str
    items: int
