"""The vLLM side of a weight update: a weight-transfer back end that takes host tensors.

vLLM's own back ends (nccl, ipc, …) are CUDA only. This one goes through the same official calls
(`start_weight_update`, `update_weights`, `finish_weight_update`) with tensors that already lie in
host memory, as views of an object store for instance, on CPU and on CUDA. Workers import this
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
    pass


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    tensors: Iterable[tuple[str, Any]] = field(default_factory=tuple)


class HostWeightTransfer(WeightTransferEngine[HostInit, HostUpdate]):
    """On CPU parameters are overwritten in place; elsewhere layers are reloaded and processed anew."""

    init_info_cls = HostInit
    update_info_cls = HostUpdate

    def init_transfer_engine(self, init_info: HostInit) -> None:
        if _IN_PLACE:
            self._require_live_parameters()

    def start_weight_update(self) -> None:
        if not _IN_PLACE:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdate) -> None:
        self.model.load_weights(update_info.tensors)

    def finish_weight_update(self) -> None:
        if not _IN_PLACE:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass

    def _require_live_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.numel() == 0:
                raise RuntimeError(f"{name} was prepacked by vLLM's CPU kernels, so its weights cannot be updated")


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransfer)
