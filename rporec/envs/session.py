"""`rporec/Session-v0`: a user's next items in a row."""

from __future__ import annotations

from typing import Any

from rporec.config import ConfigError
from rporec.envs.next_item import NextItemEnv


class SessionEnv(NextItemEnv):
    """`horizon` consecutive samples of one user, each answered and paid like in `NextItemEnv`.

    The first is drawn uniformly from the split; whatever the answer, the history goes on with the true
    item. Terminated after `horizon` items, at the end of the user's log, or where it leaves the split.
    """

    def __init__(self, *arguments: Any, horizon: int = 5, **named: Any) -> None:
        """horizon: most items of an episode; the rest as in `NextItemEnv`."""
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ConfigError(f"horizon: {horizon!r} is no number of items; use 1 or more")
        super().__init__(*arguments, **named)
        self.horizon = horizon
