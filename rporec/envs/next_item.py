"""`rporec/NextItem-v0`: which item does this user take next?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np

from rporec.envs.opening import Action, open_task
from rporec.envs.task import Outcome, Task


class NextItemEnv(gymnasium.Env):
    """A sample is drawn from the split, one action answers it, and the episode is over.

    Observation, a dict:
        prompt         int32 [P], token ids as the LLM reads them, padded on the right
        prompt_length  how many of them count
        history        int32 [W], the newest items by index, oldest first, padded on the right with -1
    The observation after a step has the true item in its history, at the end of an episode too.

    Action, by the argument `action`:
        "tokens"  T token ids that end at the first eos or padding token; `Task.encode` makes one of a text
        "scores"  float [N], higher is better; only their order counts. The space is unbounded, which
                  `check_env` allows with a warning.

    Info: user_id; sample (that was answered, or that `reset` drew); next_sample (that the observation
    asks, -1 at the end: what a recommender that reads the data set needs). After a step also target,
    rank (from 1, ties cost half a place) and reward_parts (floats, unweighted, before the format gate).
    The reward is NaN where it could not be computed.

    `reset(options={"sample": i})` asks sample i of the split.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(
        self,
        data: Path | str | None = None,
        run: Path | str | None = None,
        action: Action = "tokens",
        *,
        split: Literal["train", "valid", "test"] = "train",
        exclude_history: bool | None = None,
        task: Task | None = None,
    ) -> None:
        """Arguments as in `open_task`; task: one that is open already, then the others do not count."""
        self.task = task or open_task(data, run, action, split=split, exclude_history=exclude_history)
        self.horizon = 1
        self.observation_space = self.task.observation_space()
        self.action_space = self.task.action_space()
        self.sample: int | None = None  # that the next action answers; None: reset first
        self._answered = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a sample, uniformly. Raises ConfigError for a sample that the split does not hold."""
        super().reset(seed=seed)
        chosen = (options or {}).get("sample")
        if chosen is None:
            chosen = self.task.samples[self.np_random.integers(len(self.task.samples))]
        sample = self.sample = self.task.check(int(chosen))
        self._answered = 0
        return self.task.observation(sample), self._info(sample)

    def step(self, action: np.ndarray | Outcome) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Answer the sample; an Outcome is an action that was scored already, in a batch with others."""
        sample = self.sample
        if sample is None:
            raise gymnasium.error.ResetNeeded("the episode is over; call reset")
        outcome = action if isinstance(action, Outcome) else self.task.score([sample], [action])[0]
        self._answered += 1
        self.sample = self.task.following(sample) if self._answered < self.horizon else None
        info = self._info(sample) | {
            "target": int(self.task.dataset.targets([sample])[0]),
            "rank": outcome.rank,
            "reward_parts": dict(outcome.parts),
        }
        return self.task.observation(sample, taken=True), outcome.reward, self.sample is None, False, info

    def _info(self, sample: int) -> dict[str, Any]:
        dataset = self.task.dataset
        return {
            "sample": sample,
            "next_sample": -1 if self.sample is None else self.sample,
            "user_id": dataset.user_ids[dataset.sample_user[sample]],
        }
