"""What `rporec serve` does about its cluster and its deployments, without either."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from rporec import cli
from rporec.config import parse_config
from rporec.run import Run, RunError
from serve import launch
from serve.served import Served


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


# As Serve has it: what a replica died of stands below two tracebacks.
DEATH = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor. Error:
ray::ServeReplica:rporec:Reasoner.initialize_and_get_metadata() (pid=7, ip=10.0.0.2)
  File "replica.py", line 1, in initialize_and_get_metadata
RuntimeError: Traceback (most recent call last):
  File "reasoner.py", line 65, in __init__
rporec.engine.types.EngineError: reasoner engine 0 did not start on /m: not enough memory on the cpu
"""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The statuses of an application whose deployment fails, by name of deployment."""
    deployments: dict[str, Any] = {"Retriever": SimpleNamespace(status="HEALTHY", message="")}

    def run(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying application rporec failed: Failed to update the deployments ['Reasoner'].")

    status = SimpleNamespace(applications={launch.APPLICATION: SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "status", lambda: status)
    return deployments


def deploy(folder: Path) -> None:
    config = parse_config({})
    launch.deploy(
        Served(Run.create(folder / "run", config, resume=False), config), "127.0.0.1", 1, guarded=False, cuda=False
    )


def test_a_deployment_that_does_not_start_is_one_line_with_its_reason(failing: dict[str, Any], tmp_path: Path) -> None:
    failing["Reasoner"] = SimpleNamespace(status="DEPLOY_FAILED", message=DEATH)
    with pytest.raises(RunError) as error:
        deploy(tmp_path)
    said = cli._mendable(error.value)
    assert said is not None
    assert said.startswith(f"{tmp_path / 'run'}: Reasoner did not start: reasoner engine 0 did not start on /m: not")
    assert "Retriever" not in said
    assert "\n" not in said


def test_a_failure_without_a_reason_is_told_in_serves_words(failing: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Failed to update the deployments \['Reasoner'\]\.; its log is in"):
        deploy(tmp_path)
