"""The learner group under Ray Train, as the launcher starts and watches it.

Ray Train starts and restarts the group; it does not own checkpoints. The ranks write theirs into
`step_N.tmp`, rank 0 commits it by rename, or in stage 2 the controller, which adds what it knows; and a
train function that starts anew loads the newest committed one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ray.exceptions import RayActorError

from actors.cluster import NO_GPU, Cluster, last_words, probable_cause
from rporec.config import ConfigError
from rporec.data import DataError
from rporec.run import Run, RunError

# Of one collective where ranks wait while rank 0 works alone: it searches a head's scalars, fits a reranker, writes a
# model. A rank that died is noticed without it.
ALONE = 24 * 3600  # seconds


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
    timeout: int = ALONE,
    interrupted: Callable[[], None] | None = None,
) -> None:
    """Run `loop(spec)` on `workers` ranks; `watch` is called twice a second meanwhile. On CUDA each rank has
    `gpu_share` of a GPU. A collective that takes longer than `timeout` seconds fails.

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
        torch_config=TorchConfig(backend="nccl" if cluster.cuda else "gloo", timeout_s=timeout),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cluster.cuda, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str((run.folder / "ray").absolute()),
            failure_config=FailureConfig(max_failures=restarts),
            worker_runtime_env={"env_vars": env if cluster.cuda else env | NO_GPU},
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
    error_of_rank: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in error_of_rank.values():
        for one in _chain(failure):
            if isinstance(one, ConfigError | DataError | RunError):
                return one
    for rank, failure in error_of_rank.items():  # the others fail only because it is gone
        death = getattr(failure, "health_check_failure", failure)
        if isinstance(death, RayActorError):
            return RunError(
                f"{name}: learner rank {rank} died: {last_words(death)}; {probable_cause(last_words(death))}; "
                "what is finished is kept, --resume goes on from there"
            )
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it wraps."""
    yield error
    for attribute in ("cause", "__cause__"):
        if isinstance(inner := getattr(error, attribute, None), BaseException):
            yield from _chain(inner)
