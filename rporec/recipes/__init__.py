"""Recipes: what differs between methods. One file each, on one engine, ledger and learner.

A recipe says how a prompt is written, how completions are sampled and how they are rewarded. Its
objects are cheap to make in every actor; what is heavy (heads, tokenizers) is loaded where first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from rporec.config import Config
from rporec.engine.types import SamplingSpec
from rporec.rl.rollout_schema import GroupMeta
from rporec.run import Run


class Judge(Protocol):
    """Scores what was written, a whole batch of groups at a time."""

    def load(self) -> None:
        """Load what is otherwise loaded where first used, so that no deadline includes it."""

    def score(self, batches: list[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], list[GroupMeta]]: ...

    def validate(self, samples: np.ndarray, texts: list[str]) -> dict[str, float]: ...


class Recipe(Protocol):
    model: str  # folder of the starting LLM

    @property
    def context(self) -> int:
        """Tokens of prompt and completion together."""

    def draw(self, number: int) -> tuple[int, int]:
        """(sample, seed) of the group that is admitted as the `number`-th; the same in every attempt."""

    def prompts(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids of each sample's prompt."""

    def rollout_spec(self, seed: int) -> SamplingSpec: ...

    @property
    def validation(self) -> tuple[np.ndarray, list[np.ndarray], SamplingSpec]:
        """Fixed samples, their prompts and how they are decoded while training."""

    @property
    def probes(self) -> list[np.ndarray]:
        """A few fixed prompts that engine and learner both score at every publication."""

    def judge(self) -> Judge: ...


def load_recipe(run: Run, config: Config) -> Recipe:
    """The recipe that the config names, on the run's data."""
    from rporec.recipes.rporec import RPORec

    return {"rporec": RPORec}[config.recipe](run, config)
