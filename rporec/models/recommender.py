"""The k best items for a history and a text: a frozen RecHead over a catalogue of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rporec.config import ConfigError
from rporec.models.head_inputs import HeadInputs
from rporec.models.item_index import EXACT_BELOW, ExactIndex, Found, ItemIndex, item_index, permitted, top_k

if TYPE_CHECKING:
    from rporec.data import Catalog
    from rporec.models.rechead import RecHead

CANDIDATES = 200  # at least, of the networks and of the history's experts each
POPULAR = 1000  # candidates


class Recommender:
    """Ranks a small catalogue by `head.scores`, and candidates out of a large one by the same scores.

    In a large one the networks are one inner product, so an ItemIndex finds what they like; rules, text
    neighbours and popularity bring their own favourites. What none of the three has near its top is
    missed, even if the sum would be high.
    """

    def __init__(self, head: RecHead, *, exact_below: int = EXACT_BELOW, index: ItemIndex | None = None) -> None:
        """head: frozen, on the CPU. index: over its item vectors; None: made here, of the kind that suits their number."""
        self.head = head
        self.vectors = head.item_vectors().matrix.numpy()
        self.index = item_index(self.vectors, exact_below) if index is None else index

    @property
    def catalog(self) -> Catalog:
        return self.head.catalog

    def recommend(
        self,
        inputs: HeadInputs,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allowed: Sequence[np.ndarray | None],
    ) -> list[Found]:
        """For each row (item indices int64, scores float32), best first, of equal scores the lower index.

        k: items wanted per row; fewer only where fewer are permitted. exclude: item indices that must
        not appear. allowed: bool [N] of the items that may, or None for all.
        """
        masks = [permitted(len(self.catalog), *pair) for pair in zip(allowed, exclude, strict=True)]
        if isinstance(self.index, ExactIndex):
            return [
                _best(scores, count, mask)
                for scores, count, mask in zip(self.head.scores(inputs).numpy(), k, masks, strict=True)
            ]
        queries = self.head.query_vectors(inputs).numpy()
        experts = self.head.experts.weigh(inputs, self.head.weights) if self.head.experts else None
        popular = [top_k(table, POPULAR) for table in experts.shared] if experts else []
        result = []
        for row, (count, mask) in enumerate(zip(k, masks, strict=True)):
            if experts is None:
                result.append(self.index.search(queries[row], count, mask))
                continue
            own, table = experts.own(row), experts.shared[experts.which[row]]
            items = self._candidates(queries[row], own, popular[experts.which[row]], count, mask)
            scores = self.vectors[items] @ queries[row] + table[items] + _look_up(items, *own)
            best = top_k(scores, count)
            result.append((items[best], scores[best]))
        return result

    def _candidates(
        self,
        query: np.ndarray,
        own: tuple[np.ndarray, np.ndarray],
        popular: np.ndarray,
        k: int,
        mask: np.ndarray | None,
    ) -> np.ndarray:
        """Permitted items that networks, the history's experts or popularity rank high; int64, ascending."""
        wanted = max(CANDIDATES, 2 * k)
        liked, _ = self.index.search(query, wanted, mask)
        items, values = own if mask is None else (part[mask[own[0]]] for part in own)
        followed = items[top_k(values, wanted)]
        return np.unique(np.concatenate([liked, followed, popular if mask is None else popular[mask[popular]]]))

    def grown(self, catalog: Catalog) -> Recommender:
        """The same model over a catalogue with all its items at the same places and new ones behind them.

        The index stays of its kind and is not built anew. Raises ConfigError when an item has moved.
        """
        if not catalog.begins_with(self.catalog):
            raise ConfigError("Recommender: the new catalogue does not begin with all the items of the old one")
        head = self.head.with_catalog(catalog)
        return Recommender(head, index=self.index.grown(head.item_vectors().matrix.numpy()))


def _look_up(items: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values[i] where item is keys[i] (ascending), else 0; float32 like `items`."""
    if not len(keys):
        return np.zeros(len(items), np.float32)
    place = np.minimum(np.searchsorted(keys, items), len(keys) - 1)
    return np.where(keys[place] == items, values[place], np.float32(0))


def _best(scores: np.ndarray, k: int, mask: np.ndarray | None) -> Found:
    items = top_k(scores if mask is None else np.where(mask, scores, -np.inf), k)
    return items, scores[items]
