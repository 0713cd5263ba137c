"""Recipes: what differs between methods. One file each, on one engine, ledger and learner.

A recipe says how a prompt is written, how completions are sampled (`SamplingSpec`: free text, `ItemSpec`:
items of the catalogue) and how they are rewarded; and for the stages around RL, what the LLM is warmed up
on, what is written for evaluation and which heads are trained. Advantages and loss follow from `rl.*`.
Its objects are cheap to make in every actor; what is heavy (heads, tokenizers) is loaded where first used.

    base        the data and its slices, in which order prompts are drawn
    rporec      thoughts and answers, rewarded by a RecHead
    rere        items themselves, rewarded by rule and rank
    preference  items themselves, chosen ones against others, offline
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rporec.config import Config
from rporec.data import Dataset
from rporec.data.slices import TrainSlices
from rporec.engine.types import Spec
from rporec.rl.rollout_schema import GroupMeta
from rporec.run import Run
from rporec.text.completion_store import Part
from rporec.text.prompt import PromptWriter
from rporec.text.sft import Pair


class Judge(Protocol):
    """Scores what was written, a whole batch of groups at a time."""

    def load(self) -> None:
        """Load what is otherwise loaded where first used, so that no deadline includes it."""

    def score(self, batches: list[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], list[GroupMeta]]: ...

    def validate(self, samples: np.ndarray, written: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
        """Metrics of what `RolloutWorker.generate_many` wrote for each sample."""


class Recipe(Protocol):
    """What the loop of stage 2 asks for."""

    model: str  # folder of the starting LLM

    @property
    def context(self) -> int:
        """Tokens of prompt and completion together."""

    def draw(self, number: int) -> tuple[int, int]:
        """(sample, seed) of the group that is admitted as the `number`-th; the same in every attempt."""

    def prompts(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids of each sample's prompt."""

    def rollout_spec(self, seed: int) -> Spec: ...

    @property
    def validation(self) -> tuple[np.ndarray, list[np.ndarray], Sequence[Spec]]:
        """Fixed samples, the prompt of each and how it is decoded while training."""

    @property
    def probes(self) -> list[np.ndarray]:
        """A few fixed prompts that engine and learner both score at every publication."""

    def judge(self) -> Judge: ...


class StagedRecipe(Recipe, Protocol):
    """And what the stages before and after it ask for."""

    config: Config
    dataset: Dataset

    @property
    def slices(self) -> TrainSlices: ...

    def evaluated(self, split: str) -> np.ndarray:
        """Samples of `valid` or `test`."""

    @property
    def writer(self) -> PromptWriter: ...

    def make_backbone(self) -> None:
        """The LLM before warm-up, into RUN/backbone, unless it is there."""

    def pairs(self) -> list[Pair]:
        """What it is warmed up on."""

    def parts(self, stage: str) -> list[Part]:
        """What the LLM of `stage` is to write, in the end for evaluation."""

    @property
    def heads(self) -> dict[str, str]:
        """Heads that stage 1 trains, by folder: on what was written ("text") or on history alone ("blank")."""


def load_recipe(run: Run, config: Config) -> StagedRecipe:
    """The recipe that the config names, on the run's data."""
    from rporec.recipes.preference import Preference
    from rporec.recipes.rere import ReRe
    from rporec.recipes.rporec import RPORec

    recipes: dict[str, type[RPORec | ReRe]] = {"rporec": RPORec, "rere": ReRe, "preference": Preference}
    return recipes[config.recipe](run, config)
