"""The vector form: n environments share one task, and one call of it scores all their actions."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate

from rporec.config import ConfigError
from rporec.envs.next_item import NextItemEnv
from rporec.envs.session import SessionEnv
from rporec.envs.task import Outcome


class NextItemVectorEnv(SyncVectorEnv):
    """Steps like a `SyncVectorEnv` of the same environments, with one pass of the head instead of n.

    autoreset_mode: NEXT_STEP (Gymnasium's default): the step after an episode's last one resets that
        row, without reward. SAME_STEP: the last step returns the next episode's observation and keeps
        its own in `infos["final_obs"]` and `infos["final_info"]`, so that no step is lost; with
        episodes of one step that is half of them. DISABLED: `reset(options={"reset_mask": ...})`.
    """

    environment: ClassVar[type[NextItemEnv]] = NextItemEnv

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP, **arguments: Any
    ) -> None:
        """arguments: of the single environment."""
        if num_envs < 1:
            raise ConfigError(f"num_envs: {num_envs} is no number of environments; use 1 or more")
        self.task = self.environment(**arguments).task
        make = partial(self.environment, **{**arguments, "task": self.task})
        super().__init__([make] * num_envs, autoreset_mode=autoreset_mode)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Actions [num_envs, ...]; those of rows that are about to be reset are not looked at."""
        answers = list(iterate(self.action_space, actions))
        if len(answers) != self.num_envs:
            raise ValueError(f"actions: {len(answers)} for {self.num_envs} environments")
        acting = [row for row, env in enumerate(self.envs) if env.sample is not None]
        outcomes: list[Outcome | None] = [None] * self.num_envs
        if acting:
            scored = self.task.score([self.envs[row].sample for row in acting], [answers[row] for row in acting])
            for row, outcome in zip(acting, scored, strict=True):
                outcomes[row] = outcome
        return super().step(outcomes)


class SessionVectorEnv(NextItemVectorEnv):
    environment = SessionEnv
