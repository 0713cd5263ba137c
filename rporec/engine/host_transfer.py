"""The vLLM side of a weight update: a weight-transfer back end that takes host tensors.

vLLM's own back ends (nccl, ipc, …) are CUDA only. This one goes through the same official calls
(`start_weight_update`, `update_weights`, `finish_weight_update`) with tensors that already lie in
host memory, as views of an object store for instance, on CPU and on CUDA. An engine has one back
end for its life and always needs this one, for versions that no learner holds any more; so vLLM's
NCCL back end works inside it, once a group with the learner has been made. Workers import this
module through `worker_extension_cls` before they load the model, which registers the back end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import vllm._custom_ops as custom_ops
import vllm.model_executor.layers.utils as cpu_layers
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

BACKEND = "rporec_host"
_IN_PLACE = current_platform.is_cpu()

if _IN_PLACE:
    # Prepacked copies (oneDNN, AMX) would go on serving the old weights after an update; without
    # them every layer reads its parameter. `_require_live_parameters` catches a renamed switch.
    custom_ops._supports_onednn = False
    cpu_layers.check_cpu_sgl_kernel = lambda *_: False


class RegisterHostTransfer:
    """Empty: naming it as the worker extension makes the worker import this module."""


@dataclass
class HostInit(WeightTransferInitInfo):
    """`group`: the init info of vLLM's NCCL back end, to enter a group that the learner opens."""

    group: dict[str, Any] | None = None


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """`tensors` that are here, or the update info of vLLM's NCCL back end for what is about to be broadcast."""

    tensors: Iterable[tuple[str, Any]] = field(default_factory=tuple)
    broadcast: dict[str, Any] | None = None


class HostWeightTransfer(WeightTransferEngine[HostInit, HostUpdate]):
    """On CPU parameters are overwritten in place; elsewhere layers are reloaded and processed anew.

    vLLM 0.24 does the latter in its worker, and so calls neither `start_weight_update` nor `finish_weight_update` here.
    """

    init_info_cls = HostInit
    update_info_cls = HostUpdate

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._arguments = arguments
        self._nccl: WeightTransferEngine | None = None

    def init_transfer_engine(self, init_info: HostInit) -> None:
        if _IN_PLACE:
            self._require_live_parameters()
        if init_info.group is not None:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

            self.shutdown()
            self._nccl = NCCLWeightTransferEngine(*self._arguments)
            self._nccl.init_transfer_engine(self._nccl.parse_init_info(init_info.group))

    def start_weight_update(self) -> None:
        if not _IN_PLACE:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdate, **loader: Any) -> None:
        """`loader`: the model's `load_weights`, which vLLM 0.24 hands to every back end, and later ones to none."""
        if update_info.broadcast is None:
            self.model.load_weights(update_info.tensors)
        elif self._nccl is None:
            raise RuntimeError("a broadcast without a group: join one first")
        else:
            self._nccl.receive_weights(self._nccl.parse_update_info(update_info.broadcast), **loader)

    def finish_weight_update(self) -> None:
        if not _IN_PLACE:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        if self._nccl is not None:
            self._nccl.shutdown()
            self._nccl = None

    @staticmethod
    def trainer_send_weights(*_: Any) -> None:
        """Abstract in vLLM up to 0.26, which asks for a learner's end here; ours is `rporec.engine.nccl.Channel`."""
        raise NotImplementedError("this back end sends nothing: rporec.engine.nccl.Channel does")

    def _require_live_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.numel() == 0:
                raise RuntimeError(f"{name} was prepacked by vLLM's CPU kernels, so its weights cannot be updated")


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransfer)
