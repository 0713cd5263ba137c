"""Deadlines and catalogues that grow meanwhile, where the deployments behind are the seam."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rporec.config import SyntheticConfig
from rporec.data import Catalog, Dataset, build
from rporec.data.added_items import GrowingCatalog
from rporec.data.feedback import FeedbackLog
from rporec.data.synthetic import write_synthetic
from serve.messages import Query, Ranked
from serve.retriever import _allowed
from serve.schema import RecommendRequest, RecommendResponse
from serve.service import Service


class Thought:
    text, version = "<think> quiet </think><answer> a film </answer>", "0.1"


class Backend:
    """Writes two pieces and a thought, and ranks the first items."""

    async def stream(self, history: np.ndarray, items: int) -> AsyncIterator[Any]:
        for piece in ("one ", "two", Thought()):
            yield piece

    async def rank(self, query: Query) -> Ranked:
        return Ranked(list(range(query.k)), [0.0] * query.k, query.version or "0.0")


class Hanging(Backend):
    stopped = False

    async def stream(self, history: np.ndarray, items: int) -> AsyncIterator[Any]:
        try:
            yield "one "
            await asyncio.sleep(60)
        finally:
            self.stopped = True

    async def rank(self, query: Query) -> Ranked:
        assert self.stopped, "ranks while the reasoner still writes"
        return await super().rank(query)


class Wordless(Backend):
    async def stream(self, history: np.ndarray, items: int) -> AsyncIterator[Any]:
        yield "one "


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("service")
    world = SyntheticConfig(users=30, series=8, volumes=3, genres=4, studios=4, length=5)
    write_synthetic(folder / "raw", world, 0)
    build(folder / "raw/interactions.parquet", folder / "raw/items.parquet", folder / "data", split="time", window=6)
    return Dataset.load(folder / "data")


async def streamed(dataset: Dataset, backend: Any, folder: Path, reading: float) -> tuple[list[str], RecommendResponse]:
    """The pieces and the response of one request with 200 ms, each piece read for so many seconds."""
    growing = GrowingCatalog(dataset.catalog, folder / "items")
    service = Service(dataset, growing, FeedbackLog(folder / "feedback"), backend, timeout_ms=200)
    request = RecommendRequest(history=dataset.catalog.ids[:3], k=2, reason=True)
    got = []
    async for piece in service.stream(request):
        got.append(piece)
        await asyncio.sleep(reading)
    *pieces, response = got
    return pieces, response


@pytest.mark.parametrize("reading", [0.0, 0.3])
async def test_who_reads_slowly_gets_the_same_answer(dataset, tmp_path, reading):
    """The deadline is the reasoner's."""
    pieces, response = await streamed(dataset, Backend(), tmp_path, reading)
    assert (pieces, response.fallback) == (["one ", "two"], None)
    assert (response.cot, response.answer, response.version) == ("quiet", "a film", "0.1")


@pytest.mark.parametrize(("backend", "fallback"), [(Hanging(), "timeout"), (Wordless(), None)])
async def test_a_stream_that_hangs_or_ends_early_is_answered_by_the_history(dataset, tmp_path, backend, fallback):
    pieces, response = await streamed(dataset, backend, tmp_path, reading=0.0)
    assert (pieces, response.fallback, response.cot) == (["one "], fallback, None)


def test_items_that_came_after_the_question_are_no_answer_to_it():
    catalog = Catalog(pa.table({"item_id": list("abcd"), "genre": ["x", "y", "x", "x"]}))
    nobody = np.zeros(0, np.int64)

    def allowed(items: int, **filters: list[str]) -> list[int] | None:
        mask = _allowed(catalog, Query(nobody, 0, 1, nobody, filters, items))
        return None if mask is None else np.flatnonzero(mask).tolist()

    assert allowed(4) is None
    assert allowed(3) == [0, 1, 2]
    assert allowed(4, genre=["x"]) == [0, 2, 3]
    assert allowed(3, genre=["x"]) == [0, 2]
