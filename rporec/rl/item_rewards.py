"""What generated items are worth, one group at a time (ReRe, arXiv 2510.12211), and which of them a group keeps.

    reward = w_rule * rule + w_ranking * ranking + w_semantic * semantic + w_collaborative * collaborative

Shapes: `items` int64 [G], the group's items in the order of their beams (best first); `target` one item.
All terms are float32 [G].
"""

from __future__ import annotations

import numpy as np

from rporec.config import ReReConfig

TERMS = ("rule", "ranking", "semantic", "collaborative")


def rule(items: np.ndarray, target: int) -> np.ndarray:
    """1 for the target, 0 for any other."""
    return (np.asarray(items) == target).astype(np.float32)


def ranking(items: np.ndarray, target: int) -> np.ndarray:
    """In a group with the target the miss at place i (from 0) gets `-(1 / log2(i + 2)) / sum_j (1 / log2(j + 2))`.

    The sum is over all G places: the higher a miss stood, the more it costs. 0 for the hit, and for
    all of a group without the target.
    """
    hit = np.asarray(items) == target
    discount = 1 / np.log2(np.arange(len(hit)) + 2)
    return np.where(hit | ~hit.any(), 0.0, -discount / discount.sum()).astype(np.float32)


def semantic(items: np.ndarray, target: int, vectors: np.ndarray) -> np.ndarray:
    """Cosine of each item with the target; `vectors` [N, D] of the catalogue, 0 where one has norm 0."""
    own, other = vectors[items].astype(np.float64), vectors[target].astype(np.float64)
    norm = np.linalg.norm(own, axis=1) * np.linalg.norm(other)
    return np.divide(own @ other, norm, out=np.zeros(len(own)), where=norm > 0).astype(np.float32)


def collaborative(items: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Each item's score by a recommender that knows the history; `scores` [N], as they are."""
    return np.asarray(scores)[items].astype(np.float32)


def item_rewards(
    items: np.ndarray,
    target: int,
    weights: ReReConfig,
    vectors: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(reward, its terms before their weights) of one group; `vectors` and `scores` as far as their terms weigh."""
    parts = {"rule": rule(items, target), "ranking": ranking(items, target)}
    if vectors is not None:
        parts["semantic"] = semantic(items, target, vectors)
    if scores is not None:
        parts["collaborative"] = collaborative(items, scores)
    total = sum(getattr(weights, name) * part for name, part in parts.items())
    return np.asarray(total, np.float32), parts


def most_diverse(items: np.ndarray, target: int, score: np.ndarray, keep: int) -> np.ndarray:
    """Dynamic sampling: which `keep` of the drawn items stay, best score first, int64 [min(keep, len(items))].

    Hits stay, of more than `keep` the first drawn. Of the misses those stay of which the fewest copies were drawn
    before them, so every item once before any item twice. score: log-probabilities of the draws, [G'].
    """
    items = np.asarray(items)
    copies = np.array([(items[:at] == one).sum() for at, one in enumerate(items)])
    stays = np.lexsort((copies, items != target))[:keep]
    return stays[np.argsort(-np.asarray(score)[stays], kind="stable")]
