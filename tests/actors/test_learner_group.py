"""How long the ranks of a learner group wait for each other, and for what."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray.train.torch

from actors import checkpoints, learner, learner_group
from actors.cluster import Cluster
from rporec.config import parse_config
from rporec.run import Run


class Reached(Exception): ...


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_waits_for_the_workers_before_any_collective_that_rank_0_joins_late(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    """They may take longer than a collective does: a spot node comes when it comes."""

    def resume(folder: Path, learner: Any) -> int:
        raise Reached

    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("rporec.rl.learner.Learner", MagicMock())
    monkeypatch.setattr("rporec.recipes.load_recipe", MagicMock())
    monkeypatch.setattr(checkpoints, "resume", resume)
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    controller = MagicMock()
    with pytest.raises(Reached):
        learner._rl_loop(Run(tmp_path), parse_config({}), controller)
    calls = [name for name, _, _ in controller.mock_calls]
    assert calls == ["learner_starts.remote", "weight_store.remote", "start.remote"][rank == 1 :]


def test_a_group_that_dies_while_it_loads_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("rporec.rl.learner.Learner", MagicMock(side_effect=MemoryError))
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    controller = MagicMock()
    with pytest.raises(MemoryError):
        learner._rl_loop(Run(tmp_path), parse_config({}), controller)
    controller.learner_starts.remote.assert_called_once_with()


def test_ranks_wait_for_one_that_works_alone_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    def trainer(loop: Any, *, torch_config: Any, **rest: Any) -> Any:
        made.append(torch_config)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    cluster = Cluster("", "", local=True, cuda=False)
    learner_group.fit(print, {}, name="head", run=Run(tmp_path), cluster=cluster, workers=2, watch=lambda: None, env={})
    assert [one.timeout_s for one in made] == [learner_group.ALONE]
    assert learner_group.ALONE >= 12 * 3600


@pytest.mark.parametrize("cuda", [True, False])
def test_ranks_see_gpus_only_where_they_have_their_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool
) -> None:
    made: list[Any] = []

    def trainer(loop: Any, *, run_config: Any, **rest: Any) -> Any:
        made.append(run_config.worker_runtime_env["env_vars"])
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    learner_group.fit(
        print,
        {},
        name="stage2",
        run=Run(tmp_path),
        cluster=Cluster("", "", local=True, cuda=cuda),
        workers=1,
        watch=lambda: None,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert made == [{"OMP_NUM_THREADS": "2"} | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})]
