"""What the RecHead reads about a batch of samples: the user's past, and what the LLM wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rporec.text.completion import parse

if TYPE_CHECKING:
    from rporec.data import Dataset


@dataclass(frozen=True)
class HeadInputs:
    """B samples. The head applies its own window to `seen`; nothing here holds the target."""

    seen: list[np.ndarray]  # per sample all the user's earlier item indices, oldest first
    time: np.ndarray  # int64 [B], seconds
    cot: list[str]
    answer: list[str]
    format: np.ndarray  # float32 [B], 1 where the completion matched the whole pattern

    def __post_init__(self) -> None:
        sizes = {len(self.seen), len(self.time), len(self.cot), len(self.answer), len(self.format)}
        if len(sizes) != 1:
            raise ValueError(f"HeadInputs: fields of different lengths {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.seen)

    @classmethod
    def of(
        cls, dataset: Dataset, samples: Sequence[int] | np.ndarray, texts: Sequence[str] | None = None
    ) -> HeadInputs:
        """The histories of `samples` [B], and one completion text for each (None: blank)."""
        samples = np.asarray(samples, np.int64)
        seen, time = dataset.seen_of(samples), dataset.times(samples)
        return cls.without_text(seen, time) if texts is None else cls.with_text(seen, time, texts)

    @classmethod
    def with_text(cls, seen: list[np.ndarray], time: np.ndarray, texts: Sequence[str]) -> HeadInputs:
        """Histories and what was written for each."""
        written = [parse(text) for text in texts]
        return cls(
            seen,
            np.asarray(time, np.int64),
            [one.cot for one in written],
            [one.answer for one in written],
            np.array([one.format for one in written], np.float32),
        )

    @classmethod
    def without_text(cls, seen: list[np.ndarray], time: np.ndarray) -> HeadInputs:
        """Histories alone; the same as `blank()` of any inputs with these histories."""
        size = len(seen)
        return cls(seen, np.asarray(time, np.int64), [""] * size, [""] * size, np.zeros(size, np.float32))

    def blank(self) -> HeadInputs:
        """The same histories with an empty CoT and answer and format 0."""
        return HeadInputs.without_text(self.seen, self.time)

    def shuffled(self, users: np.ndarray, rng: np.random.Generator) -> HeadInputs:
        """CoT, answer and format dealt out anew together, between users [B].

        No row gets text of its own user unless one user has more than half of the rows.
        """
        _, codes, counts = np.unique(users, return_inverse=True, return_counts=True)
        # Users in a random order, one block each: further on by the largest block is another user's.
        order = np.lexsort((rng.random(len(self)), rng.permutation(len(counts))[codes]))
        source = np.empty_like(order)
        source[order] = np.roll(order, counts.max(initial=0))
        text = self.take(source)
        return replace(self, cot=text.cot, answer=text.answer, format=text.format)

    def take(self, index: Sequence[int] | np.ndarray) -> HeadInputs:
        """The rows `index`, in that order; repeats are fine."""
        rows = np.asarray(index, dtype=np.int64)
        return HeadInputs(
            [self.seen[row] for row in rows],
            self.time[rows],
            [self.cot[row] for row in rows],
            [self.answer[row] for row in rows],
            self.format[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[HeadInputs]) -> HeadInputs:
        return cls(
            [items for part in parts for items in part.seen],
            np.concatenate([part.time for part in parts]),
            [text for part in parts for text in part.cot],
            [text for part in parts for text in part.answer],
            np.concatenate([part.format for part in parts]),
        )
