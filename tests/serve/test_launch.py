"""What `rporec serve` does about its cluster and its deployments, without either."""

from __future__ import annotations

from pathlib import Path

import pytest

from rporec.run import Run, RunError
from serve import launch


def looks_until_gone(monkeypatch: pytest.MonkeyPatch, answers: list[bool]) -> int:
    """How many looks it took until the cluster counted as gone."""
    looks = iter(answers)
    taken = 0

    def check_address(_: str) -> None:
        nonlocal taken
        taken += 1
        if not next(looks):
            raise ConnectionError("timed out")

    monkeypatch.setattr(launch, "check_address", check_address)
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    with pytest.raises(RunError, match="the cluster that served it has ended"):
        launch._until_gone("127.0.0.1:1", Run(Path("run")))
    return taken


def test_a_service_outlives_connections_that_fail_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    nearly = [True] + [False] * (launch.SILENT - 1)
    assert looks_until_gone(monkeypatch, [*nearly, *nearly, True] + [False] * launch.SILENT) == 3 * launch.SILENT + 1
    assert 20 <= launch.SILENT * launch.LOOK_EVERY <= 60  # seconds
