"""How weights travel is decided from the config and the GPUs, and said in one line where it may surprise."""

from __future__ import annotations

from typing import Any

import pytest

from rporec.config import ConfigError, parse_config
from rporec.engine.transfer import Transfer, choose_transfer


def choice(cuda: bool, gpus: float, **config: Any) -> tuple[str, str]:
    transfer = choose_transfer(parse_config({"weight_transfer": "auto", **config}), cuda=cuda, gpus=gpus)
    assert "\n" not in transfer.line
    return transfer.kind, transfer.line


def test_between_gpus_auto_is_nccl() -> None:
    kind, line = choice(True, 2)
    assert kind == "nccl"
    assert "NCCL" in line


def test_on_cpu_auto_is_the_store_without_a_word() -> None:
    assert choice(False, 0) == ("store", "")


@pytest.mark.parametrize("wanted", ["auto", "nccl"])
def test_one_gpu_for_both_is_the_store_and_said(wanted: str) -> None:
    kind, line = choice(True, 1, weight_transfer=wanted)
    assert kind == "store"
    assert "share 1 GPU" in line


@pytest.mark.parametrize("role", ["engine", "deepspeed"])
def test_shares_of_gpus_are_the_store_however_many_there_are(role: str) -> None:
    kind, line = choice(True, 8, **{role: {"gpu_share": 0.5}})
    assert kind == "store"
    assert "share GPUs" in line


def test_every_gpu_of_the_ranks_and_engines_counts() -> None:
    roles = {"learners": 2, "groups_per_step": 8, "rollout_workers": {"min": 3, "max": 9}}
    spread = {"engine": {"args": {"tensor_parallel_size": 2}}}
    assert choice(True, 7, **roles, **spread)[0] == "store"
    assert choice(True, 8, **roles, **spread)[0] == "nccl"


def test_nccl_without_cuda_falls_back_with_a_word() -> None:
    kind, line = choice(False, 0, weight_transfer="nccl")
    assert kind == "store"
    assert line == "weight_transfer: nccl is not possible, for this cluster has no CUDA; weights go by the object store"


def test_the_reference_engine_takes_no_broadcast() -> None:
    kind, line = choice(True, 8, weight_transfer="nccl", engine={"kind": "transformers"})
    assert kind == "store"
    assert "engine.kind: transformers" in line


def test_the_store_is_what_a_config_without_a_word_gets() -> None:
    assert choose_transfer(parse_config({}), cuda=True, gpus=8) == Transfer("store")


def test_no_other_transfer_is_known() -> None:
    with pytest.raises(ConfigError, match="weight_transfer"):
        parse_config({"weight_transfer": "rdma"})
