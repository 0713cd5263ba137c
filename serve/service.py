"""What the service does, apart from HTTP: histories, deadlines, fallbacks, retries. One object in each ingress."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rporec.data import Catalog, DataError, Dataset
from rporec.data.added_items import GrowingCatalog
from rporec.data.feedback import NO_CHOICE, FeedbackLog, Reaction
from rporec.text.completion import TAGS, parse
from serve.messages import Query, Ranked, Thought
from serve.schema import Event, Feedback, Item, NewItem, RecommendRequest, RecommendResponse, ScoredItem, User

TRIES = 4  # of one call, each on another replica when the last one died
RANKING = 30.0  # seconds within which the retriever must answer
WRITE_EVERY = 0.02  # seconds: feedback that comes within them shares one file


class Refused(Exception):
    """A request that cannot be answered; `status` is HTTP's."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Unavailable(Exception):
    """A deployment that did not answer: full, or its replicas died."""


class Backend(Protocol):
    """A deployment's methods, retried where that is safe; each raises Unavailable."""

    def reason(self, history: np.ndarray, items: int) -> Awaitable[Thought]: ...
    def stream(self, history: np.ndarray, items: int) -> AsyncGenerator[str | Thought, None]: ...
    def rank(self, query: Query) -> Awaitable[Ranked]: ...


@dataclass
class Asked:
    """A request with its history found and its time counted."""

    request: RecommendRequest
    history: np.ndarray  # int64 item indices, oldest first
    excluded: np.ndarray
    warnings: list[str]
    began: float
    deadline: float  # of the event loop's clock

    def left(self) -> float:
        return self.deadline - time.monotonic()


class Service:
    def __init__(
        self, dataset: Dataset, catalog: GrowingCatalog, log: FeedbackLog, backend: Backend, *, timeout_ms: int
    ) -> None:
        self._users = Users(dataset, log)
        self._growing, self._log = catalog, log
        self._backend, self._timeout_ms = backend, timeout_ms
        self._unwritten: list[tuple[Reaction, asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task] = set()

    @property
    def catalog(self) -> Catalog:
        self._growing.refresh()
        return self._growing.catalog

    # --- recommendations -------------------------------------------------------------------------
    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        asked = self._asked(request)
        if not request.reason or not len(asked.history):
            return await self._answer(asked)
        try:
            thought = await asyncio.wait_for(self._backend.reason(asked.history, len(self.catalog)), asked.left())
        except TimeoutError:
            return await self._answer(asked, fallback="timeout")
        except Unavailable:
            return await self._answer(asked, fallback="reasoner_unavailable")
        return await self._answer(asked, thought=thought)

    async def stream(self, request: RecommendRequest) -> AsyncIterator[str | RecommendResponse]:
        """Pieces of the completion as they are written, then the response. Raises Unavailable when one was begun
        and lost."""
        asked = self._asked(request)
        if not request.reason or not len(asked.history):
            yield await self._answer(asked)
            return
        written, thought, fallback = False, None, None
        pieces = self._backend.stream(asked.history, len(self.catalog))
        try:
            async with contextlib.aclosing(pieces):  # what nobody waits for any more is taken out of the engine
                while True:
                    # Around each piece: a deadline around the `yield` would cut off whoever reads slowly.
                    async with asyncio.timeout(asked.left()):
                        piece = await anext(pieces, None)
                    if not isinstance(piece, str):
                        thought = piece
                        break
                    written = True
                    yield piece
        except TimeoutError:
            fallback = "timeout"
        except Unavailable:
            if written:
                raise
            fallback = "reasoner_unavailable"
        yield await self._answer(asked, thought=thought, fallback=fallback)

    def check(self, request: RecommendRequest) -> None:
        """Raises Refused for a request that `stream` would refuse."""
        self._asked(request)

    def _asked(self, request: RecommendRequest) -> Asked:
        began = time.monotonic()
        timeout = (request.timeout_ms or self._timeout_ms) / 1e3
        warnings: list[str] = []
        catalog = self.catalog
        history = self._history(request, catalog, warnings)
        excluded = _indices(request.exclude, catalog, "exclude", warnings)
        if request.exclude_history:
            excluded = np.union1d(excluded, history)
        for column in request.filters:
            if column not in catalog.text_columns:
                known = ", ".join(catalog.text_columns) or "none"
                raise Refused(422, f"filters: the catalogue has no text column {column[:80]!r}; it has {known}")
        return Asked(request, history, excluded, warnings, began, began + timeout)

    def _history(self, request: RecommendRequest, catalog: Catalog, warnings: list[str]) -> np.ndarray:
        if request.history is None:
            if request.user_id is None:
                raise Refused(422, "give a history or a user_id")
            history = self._users.history(request.user_id, catalog)
            if history is None:
                warnings.append("user_id: unknown")
                return np.zeros(0, np.int64)
            return history
        events = [one if isinstance(one, Event) else Event(item_id=one) for one in request.history]
        if events and all(event.timestamp is not None for event in events):
            events.sort(key=lambda event: event.timestamp or 0)
        elif any(event.timestamp is not None for event in events):
            warnings.append("history: some events have no timestamp; taken in the order given")
        history = _indices([event.item_id for event in events], catalog, "history", warnings)
        if events and not len(history):
            raise Refused(422, "history: none of its items is in the catalogue")
        return history

    async def _answer(
        self, asked: Asked, thought: Thought | None = None, fallback: str | None = None
    ) -> RecommendResponse:
        """Rank with what there is; the retriever answers with the version that wrote the thought."""
        request, catalog = asked.request, self.catalog
        if not len(asked.history):
            fallback = "no_history"
            asked.warnings.append("no history to go by: these are the popular items")
        query = Query(
            history=asked.history,
            time=int(time.time()),
            k=request.k,
            excluded=asked.excluded,
            filters=request.filters,
            items=len(catalog),
            text=thought.text if thought else None,
            version=thought.version if thought else None,
        )
        ranking = time.monotonic()
        try:
            ranked = await asyncio.wait_for(self._backend.rank(query), RANKING)
        except TimeoutError:
            raise Unavailable("the retriever does not answer; ask again later") from None
        done = time.monotonic()
        if len(ranked.items) < request.k:
            asked.warnings.append(f"k: only {len(ranked.items)} items are left to recommend")
        cot, answer = readable(thought.text, asked.warnings) if thought else (None, None)
        timings = {"retrieve": done - ranking, "total": done - asked.began} | (
            {"reason": ranking - asked.began} if thought or fallback in ("timeout", "reasoner_unavailable") else {}
        )
        return RecommendResponse(
            items=[
                ScoredItem(**described(catalog, item).model_dump(), score=score)
                for item, score in zip(ranked.items, ranked.scores, strict=True)
            ],
            cot=cot,
            answer=answer,
            version=ranked.version,
            fallback=fallback,  # type: ignore[arg-type]
            warnings=asked.warnings,
            timings_ms={name: round(seconds * 1e3, 2) for name, seconds in timings.items()},
        )

    # --- items, users, feedback ------------------------------------------------------------------
    def items(self, text: str, limit: int) -> list[Item]:
        """Items whose title or id has `text` in it, in the catalogue's order; those that begin with it first."""
        catalog, wanted = self.catalog, text.casefold()
        titles = [catalog.title(item).casefold() for item in range(len(catalog))]
        found = [item for item, title in enumerate(titles) if wanted in title or wanted in catalog.ids[item].casefold()]
        found.sort(key=lambda item: not titles[item].startswith(wanted))
        return [described(catalog, item) for item in found[:limit]]

    def add(self, new: NewItem) -> Item:
        if new.item_id in self.catalog.index:
            raise Refused(409, f"item_id: {new.item_id!r} is in the catalogue already")
        try:
            item = self._growing.add(new.item_id, new.attributes | ({"title": new.title} if new.title else {}))
        except DataError as error:
            raise Refused(409 if "already" in str(error) else 422, str(error)) from None
        return described(self._growing.catalog, item)

    def users(self, text: str, limit: int) -> list[User]:
        catalog = self.catalog
        found = self._users.find(text, limit)
        histories = {user: self._users.history(user, catalog) for user in found}
        return [
            User(user_id=user, history=[described(catalog, int(item)) for item in history[-20:]])
            for user, history in histories.items()
            if history is not None
        ]

    async def feedback(self, reaction: Feedback) -> None:
        """Returns when the event is on the disk."""
        if reaction.item_id not in self.catalog.index:
            raise Refused(422, f"item_id: {reaction.item_id[:80]!r} is not in the catalogue")
        when = int(time.time()) if reaction.timestamp is None else reaction.timestamp
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unwritten.append((Reaction(reaction.user_id, reaction.item_id, when, reaction.event), written))
        if len(self._unwritten) == 1:
            task = asyncio.create_task(self._write())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await written

    async def _write(self) -> None:
        await asyncio.sleep(WRITE_EVERY)
        batch, self._unwritten = self._unwritten, []
        try:
            await asyncio.to_thread(self._log.append, [reaction for reaction, _ in batch])
        except Exception as error:
            failure: Exception | None = error
        else:
            failure = None
        for _, written in batch:
            if written.done():  # its client has gone
                continue
            if failure is None:
                written.set_result(None)
            else:
                written.set_exception(failure)


class Users:
    """Histories of the data set's users, with what the feedback log has added to them."""

    def __init__(self, dataset: Dataset, log: FeedbackLog) -> None:
        self._dataset, self._log = dataset, log
        self._row = {user: row for row, user in enumerate(dataset.user_ids)}
        self._since: dict[str, list[str]] = {}
        self._reading = threading.Lock()  # the event loop and the thread of a search

    def history(self, user: str, catalog: Catalog) -> np.ndarray | None:
        """int64 item indices, oldest first; None for a user that nobody knows."""
        self._refresh()
        row, since = self._row.get(user), self._since.get(user)
        if row is None and since is None:
            return None
        start, end = (0, 0) if row is None else self._dataset.offsets[row : row + 2]
        new = [catalog.index[item] for item in since or () if item in catalog.index]
        return np.concatenate([self._dataset.items[start:end].astype(np.int64), np.array(new, np.int64)])

    def find(self, text: str, limit: int) -> list[str]:
        self._refresh()
        known = [*self._dataset.user_ids, *(user for user in list(self._since) if user not in self._row)]
        return [user for user in known if text in user][:limit]

    def _refresh(self) -> None:
        with self._reading:
            for reaction in self._log.news():
                if reaction.event not in NO_CHOICE:
                    self._since.setdefault(reaction.user_id, []).append(reaction.item_id)


def readable(text: str, warnings: list[str]) -> tuple[str, str | None]:
    """(thought, answer) for people; of a malformed completion the whole text without its tags, and no answer."""
    written = parse(text)
    if written.format:
        return written.cot.strip(), written.answer.strip()
    warnings.append("reasoning: malformed, so it counted for little or nothing")
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text.strip(), None


def described(catalog: Catalog, item: int) -> Item:
    others = {name: catalog.value(name, item) for name in catalog.text_columns if name != "title"}
    attributes = {name: text for name, text in others.items() if text}
    return Item(item_id=catalog.ids[item], title=catalog.title(item), attributes=attributes)


def _indices(ids: list[str], catalog: Catalog, field: str, warnings: list[str]) -> np.ndarray:
    """int64 indices of the ids that the catalogue has; the others become a warning."""
    found = [catalog.index[one] for one in ids if one in catalog.index]
    if unknown := len(ids) - len(found):
        first = next(one for one in ids if one not in catalog.index)
        warnings.append(f"{field}: {unknown} of {len(ids)} items are not in the catalogue, such as {first[:80]!r}")
    return np.array(found, np.int64)
