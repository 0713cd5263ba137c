"""What the environments ask and what they pay: samples, how they are shown, and one batched `score`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from rporec.config import ConfigError
from rporec.data import SPLITS, Dataset
from rporec.evaluation.ranking import ndcg, ranks
from rporec.rl.rewards import Scored
from rporec.text.completion import Completion, parse
from rporec.text.prompt import PromptWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[np.ndarray, Sequence[Completion]], Scored]  # samples [B], completions [B]


@dataclass(frozen=True)
class Outcome:
    """An action after it was scored."""

    reward: float  # NaN where scoring failed
    rank: float  # of the target, counted from 1
    parts: dict[str, float]  # the terms of the reward, unweighted and before the format gate


@dataclass(frozen=True, eq=False)
class Task:
    """Samples of one split and the price of an answer; holds no state, so environments share it.

    With a `judge` an action is token ids, without one it is a score of every item.
    """

    dataset: Dataset
    split: str
    writer: PromptWriter
    judge: Judge | None
    exclude_history: bool  # of the ranking that scores stand for; a judge has its own

    # --- samples -----------------------------------------------------------------------------
    @cached_property
    def samples(self) -> np.ndarray:
        """int64 sample numbers of the split, in time order."""
        return self.dataset.split(self.split)  # type: ignore[arg-type]

    def check(self, sample: int) -> int:
        """The sample, if it is one of this split; else ConfigError."""
        count = len(self.dataset.sample_split)
        if not 0 <= sample < count:
            raise ConfigError(f"options: there is no sample {sample}; they are numbered 0 to {count - 1}")
        split = SPLITS[self.dataset.sample_split[sample]]
        if split != self.split:
            raise ConfigError(f"options: sample {sample} is in split {split!r}, this environment shows {self.split!r}")
        return int(sample)

    def following(self, sample: int) -> int | None:
        """The user's next sample; None at the end of the log, or of this split in it."""
        dataset = self.dataset
        row = int(dataset.sample_row[sample]) + 1
        if row >= dataset.offsets[dataset.sample_user[sample] + 1]:
            return None
        following = int(self._sample_of_row[row])
        return following if SPLITS[dataset.sample_split[following]] == self.split else None

    @cached_property
    def _sample_of_row(self) -> np.ndarray:
        numbers = np.full(len(self.dataset.items), -1, np.int64)
        numbers[self.dataset.sample_row] = np.arange(len(self.dataset.sample_row))
        return numbers

    # --- what is shown -----------------------------------------------------------------------
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.writer.tokenizer

    def observation_space(self) -> spaces.Dict:
        longest, window = self.writer.budget, self.dataset.window
        return spaces.Dict(
            {
                "prompt": spaces.Box(0, len(self.tokenizer) - 1, (longest,), np.int32),
                "prompt_length": spaces.Discrete(longest + 1),
                "history": spaces.Box(-1, len(self.dataset.catalog) - 1, (window,), np.int32),
            }
        )

    def observation(self, sample: int, *, taken: bool = False) -> dict[str, Any]:
        """The user's past before the sample's target was taken, or with it; in the observation space."""
        dataset = self.dataset
        row = int(dataset.sample_row[sample]) + taken
        history = dataset.items[max(int(dataset.offsets[dataset.sample_user[sample]]), row - dataset.window) : row]
        ids = self.writer.prompt_ids(history)
        return {
            "prompt": _padded(ids, self.writer.budget, self._pad),
            "prompt_length": np.int64(len(ids)),
            "history": _padded(history, dataset.window, -1),
        }

    # --- what is answered --------------------------------------------------------------------
    def action_space(self) -> spaces.MultiDiscrete | spaces.Box:
        if self.judge is not None:
            return spaces.MultiDiscrete(np.full(self.writer.reserve, len(self.tokenizer)))
        return spaces.Box(-np.inf, np.inf, (len(self.dataset.catalog),), np.float32)

    def encode(self, text: str) -> np.ndarray:
        """A completion's text as an action: int64 token ids, cut or padded to the length of the action space."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)[: self.writer.reserve]
        return _padded(ids, self.writer.reserve, self._pad).astype(np.int64)

    def score(self, samples: Sequence[int], actions: Sequence[np.ndarray]) -> list[Outcome]:
        """What B actions are worth as answers to B samples; one call of the head at most.

        Raises ValueError for actions of another shape than the space's, and for values outside it.
        """
        asked = np.asarray(samples, np.int64)
        if self.judge is not None:
            scored = self.judge(asked, [parse(self._text(ids)) for ids in actions])
        else:
            seen = self.dataset.seen_of(asked) if self.exclude_history else None
            rank = ranks(self._scores(actions), self.dataset.targets(asked), seen)
            gain = ndcg(rank).astype(np.float32)
            scored = Scored(rank, {"ndcg": gain}, gain, np.zeros(len(asked), bool))
        paid = np.where(scored.masked, np.nan, scored.reward_without_entropy)
        return [
            Outcome(float(paid[row]), float(scored.rank[row]), {k: float(v[row]) for k, v in scored.parts.items()})
            for row in range(len(asked))
        ]

    def _scores(self, actions: Sequence[np.ndarray]) -> np.ndarray:
        items = len(self.dataset.catalog)
        rows = [np.asarray(action) for action in actions]
        for row in rows:
            if row.shape != (items,):
                raise ValueError(f"action: shape {row.shape}, a score of every item is ({items},)")
        return np.stack(rows)

    def _text(self, action: np.ndarray) -> str:
        """The text up to the first end or padding token."""
        ids = np.asarray(action)
        if ids.ndim != 1 or len(ids) > self.writer.reserve or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"action: {ids.dtype} of shape {ids.shape}, wants up to {self.writer.reserve} token ids")
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self.tokenizer)):
            raise ValueError(f"action: token ids {ids.min()} … {ids.max()}, the vocabulary has {len(self.tokenizer)}")
        ends = np.flatnonzero(np.isin(ids, (self._pad, self.tokenizer.eos_token_id)))
        kept = ids[: ends[0]] if len(ends) else ids
        return self.tokenizer.decode(kept.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)


def _padded(values: Sequence[int] | np.ndarray, length: int, fill: int) -> np.ndarray:
    result = np.full(length, fill, np.int32)
    result[: len(values)] = values
    return result
