"""Items as token sequences in a trie, and how a language model finds its favourites among them.

A search is a generator: it yields what it needs to know of the model (`Question`), is sent the answers
and returns what it found. So it knows no engine, and every engine runs the same search. All scores are
sums of log-probabilities over the whole vocabulary, never renormalised to the trie nor by length: they
are the policy's own, which the learner computes again.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rporec.engine.types import ItemSpec
from rporec.files import replacing

NODES = 1 << 16  # whose children are remembered: searches of many prompts walk the same upper levels


class Question(NamedTuple):
    """Which log-probabilities have the tokens `tokens` behind the prompt and `path`?"""

    path: np.ndarray  # int32 [depth]
    tokens: np.ndarray  # int32 [C], distinct


class Found(NamedTuple):
    """An item that a search came to, with the log-probability of each of its tokens."""

    item: int
    token_ids: np.ndarray  # int32 [T], to the last token of the item
    logprobs: np.ndarray  # float32 [T]


# Answers are float32 [C] each, in the order of the questions.
Search = Generator[list[Question], list[np.ndarray], list[Found]]


class Trie:
    """N items in the order of their sequences: a node is a range of rows that begin alike, its children cut it.

    sequences: the tokens of items 0 … N - 1; each ends with a token that it holds nowhere else, so that
    none begins with another. Raises ValueError when one is empty, or begins with another.
    """

    def __init__(self, sequences: Sequence[np.ndarray] | Sequence[Sequence[int]]) -> None:
        lengths = np.array([len(sequence) for sequence in sequences])
        if not len(lengths) or not lengths.min():
            raise ValueError("trie: every item needs a token")
        padded = np.full((len(lengths), lengths.max()), -1, np.int32)
        padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate([np.asarray(s) for s in sequences])
        self.items = np.lexsort(padded.T[::-1])  # row -> item
        self.tokens, self.lengths = padded[self.items], lengths[self.items]
        self._row = np.argsort(self.items)
        self._check()
        self._children = lru_cache(maxsize=NODES)(self._cut)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def depth(self) -> int:
        """Tokens of the longest item."""
        return self.tokens.shape[1]

    def rows(self, items: Iterable[int]) -> np.ndarray:
        """The rows of some items, sorted."""
        return np.unique(self._row[np.fromiter(items, np.int64)])

    def children(self, start: int, end: int, depth: int, without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(token int32 [C], rows int64 [C, 2]) of the children of a node with something left but `without`."""
        tokens, bounds = self._children(start, end, depth)
        if len(without):
            gone = np.searchsorted(without, bounds)
            left = (bounds[:, 1] - bounds[:, 0]) > (gone[:, 1] - gone[:, 0])
            tokens, bounds = tokens[left], bounds[left]
        return tokens, bounds

    def _cut(self, start: int, end: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
        column = self.tokens[start:end, depth]
        first = np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1])
        return column[first], start + np.stack([first, np.append(first[1:], len(column))], axis=1)

    def _check(self) -> None:
        upper, lower = self.tokens[:-1], self.tokens[1:]
        inside = np.arange(self.depth) < self.lengths[:-1, None]
        if (bad := np.flatnonzero(((upper == lower) | ~inside).all(axis=1))).size:
            one, other = self.items[bad[0] : bad[0] + 2]
            raise ValueError(f"trie: the tokens of item {other} begin with all those of item {one}")


def write_sequences(path: Path, sequences: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> None:
    """The tokens of items 0 … N - 1 for `load_trie`, and what they spell."""
    spelt = pa.nulls(len(sequences), pa.string()) if texts is None else pa.array(texts, pa.string())
    with replacing(path) as temporary:
        pq.write_table(pa.table({"text": spelt, "tokens": pa.array(sequences, pa.list_(pa.int32()))}), temporary)


@lru_cache(maxsize=4)
def load_trie(path: str) -> Trie:
    """The trie of a file of `write_sequences`, built once in each process."""
    return Trie(pq.read_table(path, columns=["tokens"])["tokens"].to_pylist())


def check_room(prompt_ids: Sequence[int], depth: int, context: int) -> None:
    """ValueError when the longest item does not fit behind the prompt."""
    if not 0 < len(prompt_ids) <= context - depth:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens and items of up to {depth} in a context of {context}")


def search(trie: Trie, spec: ItemSpec) -> Search:
    """What `spec` asks for, on its trie."""
    if spec.kind == "sampled":
        return sample_items(trie, spec.n, spec.seed, spec.exclude)
    return beam_search(trie, spec.n, spec.exclude)


def beam_search(trie: Trie, beams: int, exclude: Iterable[int] = ()) -> Search:
    """The `beams` best items that beam search finds, best first; fewer when there are no more.

    `beams` unfinished sequences are kept at every level, beside the best finished ones. With as many
    beams as the widest level has nodes this is exact.
    """
    without = trie.rows(exclude)
    live = _Paths.root(trie, without)
    done: list[tuple[float, Found]] = []
    while len(live.score):
        grown = yield from live.grow(trie, without)
        last = trie.lengths[grown.rows[:, 0]] == grown.tokens.shape[1]
        done += [(float(score), found) for score, found in zip(grown.score[last], grown.found(trie, last), strict=True)]
        done = sorted(done, key=lambda one: -one[0])[:beams]
        going = np.flatnonzero(~last)
        if len(done) == beams:  # scores only fall
            going = going[grown.score[going] > done[-1][0]]
        live = grown.take(going[np.argsort(-grown.score[going], kind="stable")[:beams]])
    return [found for _, found in done]


def sample_items(trie: Trie, n: int, seed: int, exclude: Iterable[int] = ()) -> Search:
    """`n` items drawn one by one, repeats and all: at each node a child by its share among the children.

    Their log-probabilities are those of the whole vocabulary nevertheless. Draws follow from `seed`.
    """
    without = trie.rows(exclude)
    rng = np.random.default_rng(seed)
    live, walks = _Paths.root(trie, without), np.zeros(n, np.int64)  # the path of each walk
    ended: list[Found | None] = [None] * n
    walking = np.arange(n if len(live.score) else 0)
    while len(walking):
        grown = yield from live.grow(trie, without)
        chosen = np.empty(len(walking), np.int64)
        for at, walk in enumerate(walking):
            children = np.flatnonzero(grown.parent == walks[walk])
            noise = rng.gumbel(size=len(children))
            chosen[at] = children[np.argmax(grown.logprobs[children, -1] + noise)]
        last = trie.lengths[grown.rows[chosen, 0]] == grown.tokens.shape[1]
        for walk, found in zip(walking[last], grown.found(trie, chosen[last]), strict=True):
            ended[walk] = found
        walking = walking[~last]
        kept, walks[walking] = np.unique(chosen[~last], return_inverse=True)
        live = grown.take(kept)
    return [found for found in ended if found is not None]


class _Paths(NamedTuple):
    """P sequences of equal length on their way down: nodes, and how they came there."""

    rows: np.ndarray  # int64 [P, 2]
    tokens: np.ndarray  # int32 [P, depth]
    logprobs: np.ndarray  # float32 [P, depth]
    score: np.ndarray  # float64 [P], the sum of logprobs
    parent: np.ndarray  # int64 [P], the path one token shorter

    @classmethod
    def root(cls, trie: Trie, without: np.ndarray) -> _Paths:
        """The empty sequence; none at all when nothing can come of it."""
        size = int(len(without) < len(trie))
        rows = np.array([[0, len(trie)]])[:size]
        tokens, logprobs = np.zeros((size, 0), np.int32), np.zeros((size, 0), np.float32)
        return cls(rows, tokens, logprobs, np.zeros(size), np.zeros(size, np.int64))

    def grow(self, trie: Trie, without: np.ndarray) -> Generator[list[Question], list[np.ndarray], _Paths]:
        """All children of all paths."""
        depth = self.tokens.shape[1]
        cut = [trie.children(int(start), int(end), depth, without) for start, end in self.rows]
        answers = yield [Question(path, tokens) for path, (tokens, _) in zip(self.tokens, cut, strict=True)]
        parent = np.repeat(np.arange(len(cut)), [len(tokens) for tokens, _ in cut])
        logprob = np.concatenate(answers).astype(np.float32)
        return _Paths(
            np.concatenate([rows for _, rows in cut]),
            np.hstack([self.tokens[parent], np.concatenate([tokens for tokens, _ in cut])[:, None]]),
            np.hstack([self.logprobs[parent], logprob[:, None]]),
            self.score[parent] + logprob,
            parent,
        )

    def take(self, index: np.ndarray) -> _Paths:
        return _Paths(*(values[index] for values in self))

    def found(self, trie: Trie, which: np.ndarray) -> list[Found]:
        items = trie.items[self.rows[which, 0]]
        return [Found(int(i), t, p) for i, t, p in zip(items, self.tokens[which], self.logprobs[which], strict=True)]
