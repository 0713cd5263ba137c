"""Which learner ranks are there, as the controller is told of them."""

from __future__ import annotations

from unittest.mock import MagicMock

from actors.ranks import Ranks


def test_a_rank_that_fails_leaves_its_namesakes_in_pid_alive() -> None:
    """Pids coincide across containers, and a rank's last words may come after the next one of its name."""
    ranks = Ranks(MagicMock())
    for rank in range(3):
        ranks.attach(rank, 17, f"node-{rank}")
    ranks.failed(1, 17, "node-1", RuntimeError("over"))
    assert [one["state"] for one in ranks.describe()] == ["ALIVE", "DEAD", "ALIVE"]
    ranks.attach(1, 17, "node-3")
    ranks.failed(1, 17, "node-1", RuntimeError("late"))
    assert {one["state"] for one in ranks.describe()} == {"ALIVE"}
