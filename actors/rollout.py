"""One rollout worker: an engine in an actor of its own.

The engine steps in its thread; the actor's event loop only hands requests in and completions out,
so any number of calls may be open at a time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.cluster import NO_GPU
from rporec.config import EngineConfig
from rporec.engine.reference import ReferenceEngine
from rporec.engine.transfer import engine_gpus
from rporec.engine.types import EngineError, Generated, GenerationAborted, Spec, Version
from rporec.engine.vllm import VllmEngine
from rporec.engine.vllm_start import engine_environment
from rporec.engine.weights import Described, FlatWeights, unflatten
from rporec.rl.rollout_schema import GroupMeta, Lease, group_meta, rollout_batch

CONCURRENT_CALLS = 4096


def rollout_options(config: EngineConfig, cuda: bool = False) -> dict[str, Any]:
    """Options for `RolloutWorker.options`: where it may run and the environment it needs.

    Placement goes by the logical resource `rollout`, not by CPUs. On CUDA a worker has as many GPUs
    as its engine spreads over. Ray never restarts it: its replacement is the controller's decision.
    """
    environment = engine_environment(config, "cuda" if cuda else "cpu") | ({} if cuda else NO_GPU)
    return {
        "resources": {"rollout": 1},
        "num_cpus": 0,
        "num_gpus": engine_gpus(config) if cuda else 0,
        "max_concurrency": CONCURRENT_CALLS,
        "max_restarts": 0,
        "runtime_env": {"env_vars": environment | {"PYTHONWARNINGS": "ignore"}},
    }


class StaleWeights(ValueError):
    """Weights of an undone attempt."""


@ray.remote
class RolloutWorker:
    """Generates with the weights it was last given; every token says which.

    `cpu_core` pins the process to one core, or leaves it to the system when None.
    Raises EngineError if the engine does not start.
    """

    def __init__(
        self,
        name: str,
        model: str,
        engine: EngineConfig,
        context: int,
        seed: int,
        cpu_core: int | None = None,
    ) -> None:
        if cpu_core is not None:
            # Before torch is imported: its threads inherit the mask of the thread that starts them.
            os.sched_setaffinity(0, {cpu_core})
        self._name = name
        self._node = ray.get_runtime_context().get_node_id()
        self._engine = _engine(engine, model, context, seed, f"rollout worker {name}")
        self._updating = asyncio.Lock()

    @ray.method(num_returns=2)
    async def generate(self, lease: Lease, spec: Spec) -> tuple[pa.RecordBatch, GroupMeta]:
        """One group, sampled from the lease's seed: its rows of ROLLOUT_SCHEMA and what they amount to.

        Raises ValueError for a prompt that does not fit, GenerationAborted after `abort_all`,
        EngineError when the engine has died.
        """
        return self._rows(lease, await asyncio.wrap_future(self._submit(lease, spec)))

    async def generate_together(self, leases: Sequence[Lease], spec: Spec) -> tuple[Any, ...]:
        """Groups that start as one batch, in this order, whatever the network did: what the engine computes follows
        from the leases alone. Ray keeps no order among the calls of an actor such as this.

        Returns one value for each group, its rows or None, and last a list with what each amounts to, or the
        exception that `generate` would have raised. Raises EngineError when the engine has died.
        """
        self._engine.pause()
        try:
            futures = [asyncio.wrap_future(self._submit(lease, spec)) for lease in leases]
        finally:
            self._engine.resume()
        batches: list[pa.RecordBatch | None] = []
        metas: list[GroupMeta | BaseException] = []
        for lease, done in zip(leases, await asyncio.gather(*futures, return_exceptions=True), strict=True):
            if isinstance(done, EngineError) and not isinstance(done, GenerationAborted):
                raise done
            batch, meta = (None, done) if isinstance(done, BaseException) else self._rows(lease, done)
            batches.append(batch)
            metas.append(meta)
        return (*batches, metas)

    def _submit(self, lease: Lease, spec: Spec) -> Future[list[Generated]]:
        return self._engine.submit(lease.prompt_ids.tolist(), replace(spec, seed=lease.seed))

    def _rows(self, lease: Lease, generated: list[Generated]) -> tuple[pa.RecordBatch, GroupMeta]:
        from rporec.text.tokenizer import token_pieces

        tokenizer = self._engine.decoder.tokenizer
        batch = rollout_batch(lease, generated, [token_pieces(tokenizer, one.token_ids.tolist()) for one in generated])
        return batch, group_meta(batch)

    async def generate_many(
        self, prompts: Sequence[Sequence[int]], specs: Sequence[Spec]
    ) -> list[list[dict[str, Any]]]:
        """Per prompt the completions that its spec asks for, {"text", "item", "token_ids", "finish_reason"}."""
        futures = [
            asyncio.wrap_future(self._engine.submit(prompt, spec)) for prompt, spec in zip(prompts, specs, strict=True)
        ]
        return [
            [
                {
                    "text": one.text,
                    "item": one.item,
                    "token_ids": one.token_ids,
                    "finish_reason": one.finish_reason,
                }
                for one in completions
            ]
            for completions in await asyncio.gather(*futures)
        ]

    async def update_weights(self, version: Version, flat: FlatWeights) -> float:
        """Take other weights between two decode steps; returns seconds. To validate, a worker may go back a version.

        Raises StaleWeights for a version of an earlier attempt; WeightsError, with nothing changed, for weights
        that are damaged or of another model.
        """
        return await self._take(version, lambda: self._engine.update_weights(version, unflatten(flat)))

    async def join(self, address: str, port: int, world: int) -> None:
        """Enter the NCCL group of `world` ranks that the learner opens for this worker."""
        assert isinstance(self._engine, VllmEngine)  # `choose_transfer` sees to it
        await asyncio.wrap_future(self._engine.join(address, port, world))

    async def receive_weights(self, version: Version, described: Sequence[Described]) -> float:
        """As `update_weights`, from the group that was joined. An EngineError, and the engine's end, when it breaks."""
        engine = self._engine
        assert isinstance(engine, VllmEngine)
        return await self._take(version, lambda: engine.receive_weights(version, described))

    async def _take(self, version: Version, update: Callable[[], Future]) -> float:
        began = time.perf_counter()
        async with self._updating:  # so that two updates cannot both pass the check and then swap
            if version.attempt < self._engine.version.attempt:
                raise StaleWeights(
                    f"rollout worker {self._name} has weights {self._engine.version}; {version} was undone"
                )
            await asyncio.wrap_future(update())
        return time.perf_counter() - began

    async def score_prompts(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Teacher-forced log-probabilities, float32 [len - 1] per sequence, under the current weights."""
        return await asyncio.wrap_future(self._engine.score(sequences))

    async def abort_all(self) -> int:
        """Stop every generation; returns how many requests there were."""
        return await asyncio.wrap_future(self._engine.abort())

    async def status(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "pid": os.getpid(),
            "cpu_seconds": time.process_time(),
            "node": self._node,
            "version": self._engine.version,
            **self._engine.stats(),
        }


def _engine(config: EngineConfig, model: str, context: int, seed: int, name: str) -> VllmEngine | ReferenceEngine:
    if not Path(model).is_dir():
        raise EngineError(f"{name}: {model} is not on this node; put --run on storage that all nodes see")
    kind = VllmEngine if config.kind == "vllm" else ReferenceEngine
    return kind(model, config, context=context, seed=seed, name=name)
