"""What stands for an NCCL group where there is no CUDA: the same rendezvous, tensors through its key-value store."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.utils import StatelessProcessGroup


class HostGroup:
    def __init__(self, address: str, port: int, rank: int, world: int) -> None:
        self._rank = rank
        self._group = StatelessProcessGroup.create(address, port, rank, world)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        sent = self._group.broadcast(tensor, src)
        if self._rank != src:
            tensor.copy_(sent)

    def destroy(self) -> None:
        """vLLM leaves a group with this."""


def learner_end(where: dict[str, Any]) -> HostGroup:
    """In place of vLLM's `trainer_init`."""
    return HostGroup(where["master_address"], where["master_port"], 0, where["world_size"])


def engine_end(where: Any, parallel: Any) -> HostGroup:
    """In place of vLLM's `worker_init_process_group`."""
    return HostGroup(where.master_address, where.master_port, where.rank_offset + parallel.rank, where.world_size)
