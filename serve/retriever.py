"""The retriever: the RecHead over the catalogue behind Ray Serve, many requests in one pass."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray import serve

from rporec.data import Catalog
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.models.recommender import Recommender
from rporec.promotion import Promoted
from serve.messages import Query, Ranked
from serve.served import Served, still

SWITCH = (
    0.0005  # seconds after which Serve's own thread gets the interpreter from a ranking; Python's 0.005 delay answers
)
HEADS = 3  # versions in memory: requests that began with an earlier one are still under way
BATCH = 32


@serve.deployment
class Retriever:
    """A head of each version that may be asked for, over one catalogue that grows."""

    async def __init__(self, served: Served) -> None:  # type: ignore[misc]  # Serve awaits it
        sys.setswitchinterval(SWITCH)
        self._served = served
        self._dataset = served.dataset()
        self._catalog = served.growing(self._dataset)
        self._heads: dict[str, Recommender] = {}
        self._version = ""
        self._changing = asyncio.Lock()  # of the heads and the catalogue
        await self._take(served.promoted())
        self._following = asyncio.create_task(served.follow(lambda: self._version, self._take))

    async def rank(self, query: Query) -> Ranked:
        """The best `k` items, by the head of the version that wrote the text."""
        version = query.version or self._version
        if version not in self._heads:  # a reasoner was quicker to take it, or it is an old one
            await self._load(Promoted.of(self._served.run, version))
        await self._catch_up(version, query.items)
        return await self._ranked(replace(query, version=version))

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
    async def _ranked(self, queries: list[Query]) -> list[Ranked]:
        """A batch is what has come in while the last one was ranked.

        Computed on the event loop: a thread of its own would have to win the interpreter from it each time.
        """
        ranked: list[Ranked | None] = [None] * len(queries)
        for version in {str(query.version) for query in queries}:
            rows = [row for row, query in enumerate(queries) if query.version == version]
            answers = self._rank(self._heads[version], [queries[row] for row in rows])
            for row, (items, scores) in zip(rows, answers, strict=True):
                ranked[row] = Ranked(items.tolist(), scores.tolist(), version)
        return ranked  # type: ignore[return-value]

    def _rank(self, head: Recommender, queries: list[Query]) -> list[tuple[np.ndarray, np.ndarray]]:
        inputs = HeadInputs.with_text(
            [query.history for query in queries],
            np.array([query.time for query in queries]),
            [query.text or "" for query in queries],
        )
        allowed = [_allowed(head.catalog, query) for query in queries]
        return head.recommend(inputs, [query.k for query in queries], [query.excluded for query in queries], allowed)

    async def _load(self, version: Promoted) -> None:
        """Have its head; the one in use and the newest others stay."""
        async with self._changing:
            if version.version not in self._heads:
                self._heads[version.version] = await asyncio.to_thread(self._recommender, version)
            others = [name for name in self._heads if name not in (self._version, version.version)]
            for oldest in others[: max(0, len(self._heads) - HEADS)]:
                del self._heads[oldest]

    def _recommender(self, version: Promoted) -> Recommender:
        head = RecHead.load(version.head, self._dataset.catalog).freeze()
        recommender = Recommender(head, exact_below=self._served.config.serve.exact_below)
        if len(self._catalog.catalog) > len(self._dataset.catalog):
            recommender = recommender.grown(self._catalog.catalog)
        return recommender

    async def _catch_up(self, version: str, items: int) -> None:
        """Have a head over as many items as the query knows; asked of the head, which grows after the catalogue."""
        if items <= len(self._heads[version].catalog):
            return
        async with self._changing:
            self._catalog.refresh()
            grown = self._catalog.catalog
            for name, head in list(self._heads.items()):
                if len(head.catalog) < len(grown):
                    self._heads[name] = await asyncio.to_thread(head.grown, grown)
            _having.cache_clear()  # else its masks keep the smaller catalogue alive

    async def _take(self, version: Promoted) -> None:
        await self._load(version)
        self._version = version.version

    async def check_health(self) -> None:
        """Raises when nobody looks for versions any more: Serve then replaces this replica."""
        still(self._following)

    async def state(self) -> dict[str, Any]:
        return {"version": self._version, "versions": list(self._heads), "items": len(self._catalog.catalog)}


def _allowed(catalog: Catalog, query: Query) -> np.ndarray | None:
    """bool [N]: items that pass every filter and that the asker knows; None for all.

    Another request may have made the catalogue grow meanwhile. KeyError for a column that is not there.
    """
    masks = [_having(catalog, column, tuple(sorted(values))) for column, values in sorted(query.filters.items())]
    if query.items < len(catalog):
        masks.append(np.arange(len(catalog)) < query.items)
    return np.logical_and.reduce(masks) if masks else None


@lru_cache(maxsize=64)
def _having(catalog: Catalog, column: str, values: tuple[str, ...]) -> np.ndarray:
    """bool [N]: items whose column is one of the values, or lists one, as "a" in "a|b"."""
    texts = pc.utf8_trim_whitespace(catalog.table.column(column).cast(pa.string()).combine_chunks())
    parts = pc.split_pattern(texts, "|")
    owner = pc.list_parent_indices(parts).to_numpy()
    found = pc.is_in(pc.utf8_trim_whitespace(pc.list_flatten(parts)), value_set=pa.array(values)).to_numpy(False)
    mask = pc.is_in(texts, value_set=pa.array(values)).to_numpy(False)
    mask[owner[found]] = True
    return mask
