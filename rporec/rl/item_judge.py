"""The judge of ReRe: rewards of generated items, and the ranking that beams amount to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from rporec.config import Config
from rporec.data import Dataset
from rporec.evaluation.ranking import hit, list_scores, ndcg, ranks
from rporec.rl.item_rewards import item_rewards, most_diverse
from rporec.rl.rewards import Scored
from rporec.rl.rollout_schema import GroupMeta, group_meta, ragged, with_rewards

ItemScores = Callable[[np.ndarray], np.ndarray]  # sample numbers [B] -> scores [B, N] by any recommender


class ItemJudge:
    """`scores` is the recommender of the collaborative term, None without that term."""

    def __init__(self, config: Config, dataset: Dataset, scores: ItemScores | None = None) -> None:
        self.config, self.dataset, self.scores = config, dataset, scores

    def load(self) -> None:
        _ = self._vectors

    def score(self, batches: list[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], list[GroupMeta]]:
        """Fill the reward columns of unscored groups; of dynamic sampling the groups come back selected."""
        samples = np.array([batch.column("sample")[0].as_py() for batch in batches])
        scores = [None] * len(batches) if self.scores is None else self.scores(samples)
        targets = self.dataset.targets(samples)
        scored = [self._scored(*one) for one in zip(batches, targets.tolist(), scores, strict=True)]
        return scored, [group_meta(group, self._habits(group)) for group in scored]

    def validate(self, samples: np.ndarray, written: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
        """NDCG and hit rate at 10 of the beams of each sample, best first; the config's headline was minded by them."""
        beams = [[one["item"] for one in row] for row in written]
        places = ranks(list_scores(beams, len(self.dataset.catalog)), self.dataset.targets(samples))
        return {"ndcg@10": float(ndcg(places, 10).mean()), "hr@10": float(hit(places, 10).mean())}

    def _scored(self, batch: pa.RecordBatch, target: int, scores: np.ndarray | None) -> pa.RecordBatch:
        items = batch.column("item").to_numpy()
        if self.config.rere.sampling == "dynamic":
            logprobs, offsets = ragged(batch, "logprobs")
            total = np.add.reduceat(logprobs.astype(np.float64), offsets[:-1])
            batch = batch.take(pa.array(most_diverse(items, target, total, self.config.group_size)))
            items = batch.column("item").to_numpy()
        reward, parts = item_rewards(items, target, self.config.rere, self._vectors, scores)
        found = np.flatnonzero(items == target)
        rank = np.full(len(items), found[0] + 1.0 if len(found) else np.nan)
        return with_rewards(batch, Scored(rank, parts, reward, np.zeros(len(items), bool)))

    def _habits(self, group: pa.RecordBatch) -> dict[str, float]:
        """Share of items that the user had before, and how many different ones there are."""
        items = group.column("item").to_numpy()
        seen = self.dataset.seen(group.column("sample")[0].as_py())
        return {"seen_answers": float(np.isin(items, seen).mean()), "distinct_answers": float(len(np.unique(items)))}

    @cached_property
    def _vectors(self) -> np.ndarray | None:
        """Of all items' texts, for the semantic term: by `reward.embedder`, or by their words."""
        if not self.config.rere.semantic:
            return None
        texts, embedder = self.dataset.catalog.texts(), self.config.reward.embedder
        if embedder is not None:
            from rporec.rl.frozen import TextEmbedder

            return TextEmbedder(embedder)(texts)
        from rporec.models.semantic_ids import item_vectors

        return item_vectors(texts, self.config.seed)
