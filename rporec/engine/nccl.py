"""The learner's end of vLLM's NCCL weight transfer.

The engine's end is vLLM's own back end (see `rporec.engine.host_transfer`). Of vLLM's trainer side
only `trainer_init` is used: what it does has stayed the same since 0.24, though it has moved, while
the object around it came and changed, and serves one engine that is always there. Both ends speak
the plain protocol, one broadcast for each tensor, for packing is agreed on differently in every release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rporec.engine.types import Version
from rporec.engine.weights import Described


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A version as it was published, copied on the learner's device: the next step may change the originals."""

    version: Version
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    copied: Any  # a CUDA event, after which the copies are whole; None on CPU

    @classmethod
    def of(cls, version: Version, named: Iterable[tuple[str, torch.Tensor]]) -> Snapshot:
        # In C order, for NCCL sends memory as it lies.
        pairs = [(name, tensor.detach().clone(memory_format=torch.contiguous_format)) for name, tensor in named]
        names, tensors = zip(*pairs, strict=True)
        return cls(version, names, tensors, _event() if tensors[0].is_cuda else None)

    @property
    def described(self) -> list[Described]:
        """What the engine is to be told before the tensors come."""
        return [
            (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in zip(self.names, self.tensors, strict=True)
        ]


class Channel:
    """A group of the learner's rank 0 and one engine. Construction blocks until the engine has joined."""

    def __init__(self, address: str, port: int, world: int, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # this thread's; vLLM asks for it
            self._stream = torch.cuda.Stream(device)  # beside the training's
        self._group = _trainer_init()({"master_address": address, "master_port": port, "world_size": world})

    def send(self, snapshot: Snapshot) -> None:
        """Begin to broadcast; it is over when the engine says so. Keep the snapshot until then."""
        if self._stream is not None:
            self._stream.wait_event(snapshot.copied)
        for tensor in snapshot.tensors:
            self._group.broadcast(tensor, src=0, stream=self._stream)

    def close(self) -> None:
        """Leave the group, also in the middle of a broadcast that the other end will never take."""
        if hasattr(self._group, "destroy"):  # not in the oldest vLLM
            self._group.destroy()


def _trainer_init() -> Callable[[dict[str, Any]], Any]:
    """Where this vLLM has it."""
    try:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
    except ModuleNotFoundError:  # 0.24
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        return NCCLWeightTransferEngine.trainer_init
    return trainer_init


def _event() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event
