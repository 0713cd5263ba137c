"""The weight-transfer back end under the interfaces that vLLM had from 0.24 on."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine

from rporec.engine import nccl
from rporec.engine.host_transfer import HostUpdate, HostWeightTransfer

pytestmark = pytest.mark.engine


class UpTo026(ABC):
    """What its base class asked for besides."""

    @staticmethod
    @abstractmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None: ...


class Older(HostWeightTransfer, UpTo026):
    pass


class Model:
    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, tensors: Any) -> None:
        self.loaded |= dict(tensors)


class Group:
    """vLLM's NCCL back end, once it is in a group."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def parse_update_info(self, info: dict[str, Any]) -> dict[str, Any]:
        return info

    def receive_weights(self, info: dict[str, Any], **more: Any) -> None:
        self.calls.append((info, more))


@pytest.fixture
def transfer() -> HostWeightTransfer:
    return Older(None, SimpleNamespace(parallel_config=None, model_config=None), torch.device("cpu"), Model())


def test_it_has_all_that_older_interfaces_ask_for_and_sends_nothing(transfer: HostWeightTransfer) -> None:
    with pytest.raises(NotImplementedError, match="Channel"):
        transfer.trainer_send_weights(iter([]), {})


@pytest.mark.parametrize("loader", [{}, {"load_weights": print}], ids=["0.25", "0.24"])
def test_a_loader_that_comes_along_goes_to_the_nccl_back_end_alone(
    transfer: HostWeightTransfer, loader: dict[str, Any]
) -> None:
    weight = torch.ones(2)
    transfer.receive_weights(HostUpdate(tensors=[("w", weight)]), **loader)
    assert transfer.model.loaded == {"w": weight}
    transfer._nccl = group = Group()  # type: ignore[assignment]
    transfer.receive_weights(HostUpdate(broadcast={"names": ["w"]}), **loader)
    assert group.calls == [({"names": ["w"]}, loader)]


def test_the_learners_end_is_found_where_vllm_had_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(info: dict[str, Any]) -> str:
        return f"{info['master_address']}:{info['master_port']}"

    first = ModuleType(nccl_engine.__name__)
    first.NCCLWeightTransferEngine = SimpleNamespace(trainer_init=opened)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, nccl_engine.__name__, first)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_common", None)
    assert nccl.Channel("head", 1, 2, torch.device("cpu"))._group == "head:1"
