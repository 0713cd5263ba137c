"""What a learner rank runs in stage 2: it consumes groups and publishes weights."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from rporec.config import Config
from rporec.engine.types import Version
from rporec.run import Run

if TYPE_CHECKING:
    from rporec.rl.learner import Clock

CONTROLLER_PATIENCE = 120  # seconds


def rl_loop(spec: dict[str, Any]) -> None:
    """Consume groups as they come, publish new weights after every step."""
    run: Run = spec["run"]
    run.require_here()
    config: Config = spec["config"]
    if spec["cores"] is not None:
        # This thread computes, and the threads that torch starts from it inherit its mask.
        os.sched_setaffinity(0, spec["cores"])
    import torch.distributed as dist

    controller = _controller()
    rank, node = dist.get_rank(), ray.get_runtime_context().get_node_id()
    try:
        _rl_loop(run, config, controller)
    except RayActorError:
        raise  # the controller's end is not this rank's
    except Exception as error:
        ray.get(controller.learner_failed.remote(rank, os.getpid(), node, error))
        raise


def _controller() -> Any:
    """The controller, as soon as it answers: it may be restarting just now."""
    for _ in range(CONTROLLER_PATIENCE):
        with contextlib.suppress(RayActorError, ValueError):
            controller = ray.get_actor("controller")
            ray.get(controller.weight_store.remote())
            return controller
        time.sleep(1.0)
    raise RuntimeError(f"no controller within {CONTROLLER_PATIENCE} s")


def _rl_loop(run: Run, config: Config, controller: Any) -> None:
    import torch.distributed as dist

    from actors import checkpoints
    from actors.broadcast import Sender
    from rporec.engine.transfer import engine_ranks
    from rporec.engine.weights import flatten
    from rporec.models.trainable import from_rank_0
    from rporec.recipes import load_recipe
    from rporec.rl.learner import Clock, Learner
    from rporec.rl.rollout_schema import write_groups

    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        ray.get(controller.learner_starts.remote())  # first of all: a group that dies of what follows is counted too
    store = ray.get(controller.weight_store.remote())
    learner = Learner(run.warm_model, config, world=world)
    probes = load_recipe(run, config).probes
    ray.get(controller.start.remote())  # every rank waits for the workers here, none of them in a collective
    step = checkpoints.resume(run.checkpoints, learner.policy)
    me = rank, os.getpid(), ray.get_runtime_context().get_node_id()
    attempt = from_rank_0(ray.get(controller.attach.remote(*me, step)) if rank == 0 else None)
    if rank > 0:  # after rank 0 has rolled the ledger back
        ray.get(controller.attach.remote(*me, step))

    stored: list[ray.ObjectRef] = []  # the store's answer to the version that is on its way
    sends = rank == 0 and config.weight_transfer == "nccl"
    sender = Sender(controller, attempt, 1 + engine_ranks(config.engine)) if sends else None

    def checkpoint_at(number: int) -> None:
        """The controller adds its own part and commits."""
        ray.get(stored)  # a committed version is one that can be validated
        checkpoints.save(
            run.checkpoints, number, learner.policy, lambda: ray.get(controller.commit.remote(number, attempt))
        )

    def publish(number: int) -> Version:
        """Copy the weights out; the next step waits neither for the store nor for the workers."""
        version = Version(attempt, number)
        weights = learner.policy.named_weights()
        if rank == 0:
            flat = flatten(weights if sender is None else sender.hold(version, weights))
            ray.get(stored)  # one version on its way at a time; raises what kept it
            stored[:] = [store.put.remote(version, flat)]
        else:
            take_part(weights)
        return version

    publish(step)
    probed = learner.probe(probes)
    if rank == 0:
        ray.get(stored)
        ray.get(controller.attached.remote(Version(attempt, step), probed))
    started_at = time.process_time()
    committed = step
    clock = Clock()
    while True:
        batch = ray.get(controller.next_batch.remote(step, attempt))
        if batch is None:
            break
        groups = ray.get(list(batch.payloads[rank::world]))  # every rank gets old groups and new ones
        clock.lap("wait")
        if config.save_rollouts and rank == 0:
            write_groups(run.rollouts(step), ray.get(list(batch.payloads)))
        metrics = learner.step(groups, batch.version, clock)
        probed = learner.probe(probes)
        clock.lap("other")
        version = publish(step + 1)
        clock.lap("publish")
        record = step_record(step, batch.version, metrics, clock, started_at)
        clock = Clock()  # what follows is the next step's time
        if rank == 0:
            ray.get(controller.finished_step.remote(step, version, record, probed, stored))
        step += 1
        if step % config.checkpoint_every == 0 or step == config.steps:
            checkpoint_at(step)
            committed = step
        clock.lap("other")
    if committed < step:  # told to stop between two checkpoints
        checkpoint_at(step)


def take_part(weights: Iterable[Any]) -> None:
    """Keep none of the weights: rank 0 publishes them, and under ZeRO-3 they are gathered while every rank iterates."""
    deque(weights, maxlen=0)


def step_record(
    step: int, version: Version, metrics: dict[str, Any], clock: Clock, started_at: float
) -> dict[str, Any]:
    """A line of steps.jsonl as far as rank 0 knows it; started_at: CPU seconds of its process before the first step."""
    return {
        "attempt": version.attempt,
        "step": step,
        "version": version.number,
        **metrics,
        "seconds": clock.seconds(),
        "cpu_seconds": round(time.process_time() - started_at, 3),
    }
