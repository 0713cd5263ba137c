"""How weights reach the engines, decided before anything starts: by the object store, or GPU to GPU by NCCL.

The store has every version either way: for engines that join late, for validation under a pinned
version, for the best model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rporec.config import Config, EngineConfig


@dataclass(frozen=True)
class Transfer:
    """What `Config.weight_transfer` comes to on a cluster, and a line for who started the run ("": nothing to say)."""

    kind: Literal["store", "nccl"]
    line: str = ""


def choose_transfer(config: Config, *, cuda: bool, gpus: float) -> Transfer:
    """`cuda`: whether the roles run on GPUs; `gpus`: how many the cluster has."""
    if config.weight_transfer == "store":
        return Transfer("store")
    obstacle = _obstacle(config, cuda, gpus)
    if obstacle is None:
        return Transfer("nccl", "weights go from the learner's GPU to the rollout workers' by NCCL")
    if config.weight_transfer == "nccl":
        return Transfer("store", f"weight_transfer: nccl is not possible, {obstacle}; weights go by the object store")
    # On CPU nobody expects anything else.
    return Transfer("store", f"weights go by the object store: {obstacle}" if cuda else "")


def engine_gpus(config: EngineConfig) -> float:
    """What a rollout worker reserves: as many GPUs as its engine spreads over, or its share of one."""
    return engine_ranks(config) * config.gpu_share


def engine_ranks(config: EngineConfig) -> int:
    """How many GPUs one engine spreads over."""
    return config.args.get("tensor_parallel_size", 1) * config.args.get("pipeline_parallel_size", 1)


def _obstacle(config: Config, cuda: bool, gpus: float) -> str | None:
    if config.engine.kind != "vllm":
        return f"engine.kind: {config.engine.kind} takes host memory only"
    if not cuda:
        return "for this cluster has no CUDA"
    if config.engine.gpu_share < 1 or config.deepspeed.gpu_share < 1:
        return "for learners and rollout workers share GPUs (gpu_share), and NCCL takes no two ranks on one"
    workers = config.rollout_workers.min
    if gpus < config.learners + workers * engine_gpus(config.engine):
        return (
            f"for learners: {config.learners} and rollout_workers: {workers} share {gpus:g} GPU(s), "
            "and NCCL takes no two ranks on one"
        )
    return None
