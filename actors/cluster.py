"""Where actors live: joining or starting a Ray cluster, and what each role asks of it.

Roles ask for logical resources (`rollout`, `reward`, `learner`, `serve`), which a local start
declares and a cluster's nodes declare in their YAML, so a laptop and a cluster share one placement.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rporec.config import Config, ConfigError

# Room for `rporec scale` and for the bulk generation of stage 1 beyond what the config starts with.
_SPARE = 6
# Environment of what asks for no GPU: Ray shows it all of them, torch takes the first, and that one is another's.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Cluster:
    address: str
    namespace: str
    local: bool  # started by this process, and stopped with it
    cuda: bool

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def core(self, index: int) -> int | None:
        """The core that the `index`-th worker is pinned to; None where it need not be on this machine, or has a GPU."""
        return core(index) if self.local and not self.cuda else None


@contextlib.contextmanager
def connected(config: Config, address: str | None, namespace: str) -> Iterator[Cluster]:
    """Join the cluster at `address`, or start one on this machine and stop it afterwards."""
    # Ray reads these on import, and its children inherit them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report waits for this poll
    gpus = shutil.which("nvidia-smi") is not None
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on import that it looked for a GPU
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"namespace": namespace, "logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        serve = config.serve
        options |= {
            "address": "local",  # whatever RAY_ADDRESS says
            "num_cpus": max(4, cores()),  # logical: roles place themselves by the resources below
            "resources": {
                "rollout": config.rollout_workers.max + _SPARE,
                "reward": config.reward_workers.max + _SPARE,
                "learner": max(config.learners, config.head.workers),
                "serve": sum(role.max for role in (serve.ingresses, serve.reasoners, serve.retrievers)) + _SPARE,
            },
            "include_dashboard": True,  # `ray list actors` asks it
            "dashboard_host": "127.0.0.1",
        }
        if config.device == "cpu" or not gpus:  # with GPUs one version may be of 16 GB: as much as Ray thinks right
            options["object_store_memory"] = 512 * 2**20
    else:
        options |= {"address": address}
    terminate = signal.getsignal(signal.SIGTERM)
    context = ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's own would end this process on the spot
    try:
        yield Cluster(
            address=context.address_info["gcs_address"],
            namespace=namespace,
            local=address is None,
            cuda=_cuda(config, local=address is None),
        )
    finally:
        ray.shutdown()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def core(index: int) -> int:
    """The core that the `index`-th worker of this machine is pinned to, among those it may use."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[index % len(allowed)]


def cores_beside(workers: int) -> list[int]:
    """The cores that none of the first `workers` workers is pinned to."""
    return sorted(os.sched_getaffinity(0))[workers:]


def _cuda(config: Config, *, local: bool) -> bool:
    """Whether roles ask for GPUs. ConfigError when they shall and this machine, alone, has none that torch can use."""
    import ray

    if config.device == "cpu" or (config.device == "cuda" and not local):
        return config.device == "cuda"
    there = ray.cluster_resources().get("GPU", 0) > 0
    if local and there:
        import torch

        there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError("device: cuda, and torch finds no GPU on this machine; `rporec doctor` says more")
    return there


def awaited(needed: Mapping[str, float]) -> str:
    """What to tell of resources, as in `{role: workers}`, of which the cluster, as it is now, has too few; "" when none."""
    import ray

    there = ray.cluster_resources()
    lacking = [f"{role} ({there.get(role, 0):g} of {n:g})" for role, n in needed.items() if there.get(role, 0) < n]
    if not lacking:
        return ""
    return f"waits for nodes: {', '.join(lacking)}; an autoscaler brings them, else `ray start --resources` does"


def log_of(pid: int) -> str:
    """Where an actor's last output is, on its own node."""
    return f"/tmp/ray/session_latest/logs/worker-*-{pid}.err"


def last_words(error: BaseException) -> str:
    """The line of a Ray error that says what happened, without the traceback that it carries."""
    text = str(error).partition("Some common causes")[0]  # Ray's guesses, the same at every death
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "EngineError: " in line]
    return (telling or lines or [type(error).__name__])[-1].rpartition("EngineError: ")[2][:600]


# What a death's last words tell of its cause, the most telling first.
_CAUSES = (
    ("probable cause", ""),  # an engine's own
    ("preempted", "its node was taken back"),
    ("node", "its node is gone: lost, stopped or out of reach"),
    ("unavailable", "its process or its node is gone or out of reach"),
    ("no answer within", "it hangs, or one call takes longer than the timeout"),
    ("memory", "no memory left on its node"),
    ("connection error code 2", "killed from outside: by the kernel for want of memory (see dmesg), or by hand"),
    ("its process ended", "killed from outside: by the kernel for want of memory (see dmesg), or by hand"),
)


def probable_cause(words: str) -> str:
    """Of a death with these last words; "" when they say it themselves."""
    return next((cause for sign, cause in _CAUSES if sign in words.lower()), "a fault in its code; its log has it")


def role_options(
    role: str, cluster: Cluster, *, gpus: float = 0.0, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """`actor.options(**…)` of one role: one unit of its resource, its share of GPUs, its environment."""
    gpus = gpus if cluster.cuda else 0
    common = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", **({} if gpus else NO_GPU)}
    return {
        "num_cpus": 0,
        "num_gpus": gpus,
        "resources": {role: 1},
        "runtime_env": {"env_vars": common | (env or {})},
    }
