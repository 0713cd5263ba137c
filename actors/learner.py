"""The learner group under Ray Train: warm-up, and the consuming end of stage 2.

Ray Train starts and restarts the group; it does not own checkpoints. The ranks write theirs into
`step_N.tmp`, rank 0 commits it by rename, or in stage 2 the controller, which adds what it knows; and a
train function that starts anew loads the newest committed one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from actors.cluster import Cluster, last_words, probable_cause
from rporec.config import Config, ConfigError
from rporec.data import DataError
from rporec.engine.types import Version
from rporec.files import append_line, cut_lines
from rporec.run import Run, RunError

if TYPE_CHECKING:
    from rporec.rl.learner import Clock

CONTROLLER_PATIENCE = 120  # seconds
# For one collective. Ranks wait in it while rank 0 works alone: it searches a head's scalars, fits a reranker, writes a
# model. Ray's half an hour is too little for that, and a rank that died is noticed without it.
COLLECTIVE_TIMEOUT = 24 * 3600  # seconds


def fit(
    loop: Callable[[dict[str, Any]], None],
    spec: dict[str, Any],
    *,
    name: str,
    run: Run,
    cluster: Cluster,
    workers: int,
    watch: Callable[[], None],
    env: dict[str, str],
    gpu_share: float = 1.0,
    restarts: int = 0,
    interrupted: Callable[[], None] | None = None,
) -> None:
    """Run `loop(spec)` on `workers` ranks; `watch` is called twice a second meanwhile. On CUDA each rank has
    `gpu_share` of a GPU.

    Raises what the loop raised, or RunError when a rank's process died, after `restarts` restarts of the whole group
    (-1: any number). Ctrl-C calls `interrupted`, waits for the loop to come to its end, and goes on as
    KeyboardInterrupt; a second one does not wait.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    resources: dict[str, float] = {"learner": 1, "CPU": 0}
    if cluster.cuda:
        resources["GPU"] = gpu_share
    trainer = TorchTrainer(
        loop,
        train_loop_config=spec,
        torch_config=TorchConfig(backend="nccl" if cluster.cuda else "gloo", timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cluster.cuda, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str((run.folder / "ray").absolute()),
            failure_config=FailureConfig(max_failures=restarts),
            worker_runtime_env={"env_vars": env},
        ),
    )
    failure: list[BaseException] = []
    finished = threading.Event()

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)
        finally:
            finished.set()

    threading.Thread(target=work, name=f"fit-{name}", daemon=True).start()

    def wait() -> None:
        # Not by `Thread.join`: Python 3.11 takes a thread for dead when Ctrl-C interrupts a join.
        while not finished.wait(0.5):
            watch()
        watch()

    try:
        wait()
    except KeyboardInterrupt:
        if interrupted is not None:
            interrupted()
            wait()
        raise
    if failure:
        raise _cause(name, failure[0])


def _cause(name: str, error: BaseException) -> BaseException:
    """What the user can mend, or which rank died, if a rank failed of that; else the error as Ray Train reports it."""
    failures = {rank: list(_chain(one)) for rank, one in getattr(error, "worker_failures", {}).items()}
    for chain in failures.values():
        for one in chain:
            if isinstance(one, ConfigError | DataError | RunError):
                return one
    for rank, chain in failures.items():  # the others fail only because it is gone
        for one in chain:
            if isinstance(one, RayActorError):
                return RunError(
                    f"{name}: learner rank {rank} died: {last_words(one)}; {probable_cause(last_words(one))}; "
                    "what is finished is kept, --resume goes on from there"
                )
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it wraps."""
    yield error
    for attribute in ("cause", "__cause__", "health_check_failure"):
        if isinstance(inner := getattr(error, attribute, None), BaseException):
            yield from _chain(inner)


def warmup_loop(spec: dict[str, Any]) -> None:
    """Supervised warm-up on the recipe's pairs: cross entropy over the completion tokens; from its newest checkpoint."""
    run, config = spec["run"], spec["config"]
    run.require_here()
    import torch
    import torch.distributed as dist

    from actors import checkpoints
    from rporec.models.policy import token_logprobs
    from rporec.models.trainable import Trainable, all_sum
    from rporec.recipes import load_recipe
    from rporec.rl.packing import GroupTokens, by_length, plain

    recipe = load_recipe(run, config)
    warmup = config.warmup
    pairs = recipe.pairs()
    rank, world = dist.get_rank(), dist.get_world_size()
    share = math.ceil(warmup.batch_size / world)
    accumulation = math.ceil(share / warmup.micro_batch_size)
    steps = spec["steps"] or max(1, math.ceil(warmup.epochs * len(pairs) / warmup.batch_size))
    torch.manual_seed(config.seed)
    policy = Trainable(
        run.backbone,
        config,
        lr=warmup.lr,
        accumulation=accumulation,
        micro_batch=warmup.micro_batch_size,
        schedule=lambda step: min(1.0, (step + 1) / max(1, steps // 50)) * (1 - step / steps),
    )
    pad = recipe.writer.tokenizer.pad_token_id
    order = Shuffled(len(pairs), config.seed)
    kept = spec["folder"] / "checkpoints"
    first = checkpoints.resume(kept, policy)
    order.take(first * warmup.batch_size)
    before = (cut_lines(spec["log"], first) if rank == 0 else [])[-1:]
    began, cpu = time.monotonic(), time.process_time()
    for step in range(first, steps):
        rows = order.take(warmup.batch_size)
        mine = [pairs[row] for row in rows[rank::world]]
        groups = [GroupTokens(pair.prompt_ids, [np.asarray(pair.completion_ids)]) for pair in mine]
        tokens = all_sum(torch.tensor([sum(len(pair.completion_ids) for pair in mine)])).item()
        total = torch.zeros(1)
        parts = by_length(groups, warmup.micro_batch_size)
        for part in range(accumulation):
            chosen = parts[part] if part < len(parts) else parts[-1][:1]
            logprobs, _ = token_logprobs(policy.engine, plain([groups[i] for i in chosen], pad))
            # A rank with fewer micro-batches joins the others with a part that weighs nothing.
            loss = -logprobs.sum() / tokens if part < len(parts) else 0.0 * logprobs.sum()
            policy.backward(loss)
            total += loss.detach().cpu()
        loss = all_sum(total).item()
        if rank == 0:
            spent = {"seconds": time.monotonic() - began, "cpu_seconds": (time.process_time() - cpu) * world}
            spent = {key: value + sum(record[key] for record in before) for key, value in spent.items()}
            record = {"step": step, "steps": steps, "loss": loss, "lr": policy.lr, "tokens": tokens, **spent}
            append_line(spec["log"], record)
        if (step + 1) % warmup.checkpoint_every == 0 and step + 1 < steps:
            checkpoints.save(kept, step + 1, policy)
    policy.save_model(recipe.writer.tokenizer, spec["folder"] / "model")


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
    from rporec.rl.learner import Learner
    from rporec.rl.rollout_schema import write_groups

    store = ray.get(controller.weight_store.remote())
    rank, world = dist.get_rank(), dist.get_world_size()
    learner = Learner(run.warm_model, config, world=world)
    probes = load_recipe(run, config).probes
    ray.get(controller.start.remote())  # every rank waits for the workers here, none of them in a collective
    if rank == 0:
        ray.get(controller.learner_starts.remote())
    step = checkpoints.resume(run.checkpoints, learner)
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
        checkpoints.save(run.checkpoints, number, learner, lambda: ray.get(controller.commit.remote(number, attempt)))

    def publish(number: int) -> Version:
        """Copy the weights out; the next step waits neither for the store nor for the workers."""
        version = Version(attempt, number)
        weights = learner.named_weights()
        flat = flatten(weights if sender is None else sender.hold(version, weights))
        if rank == 0:
            ray.get(stored)  # one version on its way at a time; raises what kept it
            stored[:] = [store.put.remote(version, flat)]
        return version

    publish(step)
    probed = learner.probe(probes)
    if rank == 0:
        ray.get(stored)
        ray.get(controller.attached.remote(Version(attempt, step), probed))
    started_at = time.process_time()
    committed = step
    clock = learner.start_step()
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
        clock = learner.start_step()  # what follows is the next step's time
        if rank == 0:
            ray.get(controller.finished_step.remote(step, version, record, probed, stored))
        step += 1
        if step % config.checkpoint_every == 0 or step == config.steps:
            checkpoint_at(step)
            committed = step
        clock.lap("other")
    if committed < step:  # told to stop between two checkpoints
        checkpoint_at(step)


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


def head_loop(spec: dict[str, Any]) -> None:
    """Train RecHeads on what the LLM of `stage` wrote for `slices`, with its text or on history alone, data-parallel."""
    import torch.distributed as dist

    from rporec.recipes import load_recipe
    from rporec.recipes.head_stage import CountedExperts, head_data, history_data, train_stage_head

    run: Run = spec["run"]
    run.require_here()
    recipe: Any = load_recipe(run, spec["config"])
    rank, world = dist.get_rank(), dist.get_world_size()
    texts = "text" in spec["heads"].values()
    data = head_data(recipe, run, spec["stage"], spec["slices"]) if texts else history_data(recipe)

    def progress(record: dict[str, Any]) -> None:
        if rank == 0:
            append_line(spec["log"], record)

    experts = CountedExperts(recipe)
    for name, reads in spec["heads"].items():
        inputs = data if reads == "text" else data.blank()
        train_stage_head(name, recipe, inputs, run, experts, rank=rank, world=world, progress=progress)


class Shuffled:
    """Endless passes over `size` rows, each pass in a new order that follows from the seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng = size, np.random.default_rng([seed, 4])
        self.rest = np.empty(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        while len(self.rest) < count:
            self.rest = np.concatenate([self.rest, self.rng.permutation(self.size)])
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken
