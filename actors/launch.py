"""What the commands of the CLI start: a training, an evaluation, on a cluster joined or started here."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from actors.cluster import awaited, connected
from actors.job import Job
from actors.stages import CLUSTER_STAGES, evaluate_run, prepare_data, rank_methods
from rporec.config import Config, ConfigError
from rporec.report.live import say
from rporec.run import Run


def train(run: Run, config: Config, stages: list[str], address: str | None, console: Console) -> None:
    """Run the stages that are asked for and not finished, in their order."""
    if "data" in stages and not run.finished("data"):
        prepare_data(run, config, console)
    missing = [name for name in CLUSTER_STAGES if name in stages and not run.finished(name)]
    if not missing:
        console.print("nothing left to do; every stage that was asked for has finished")
        return
    with on_cluster(run, config, address, console, "rollout", "reward", "learner") as job:
        if "stage2" in missing and config.steps:
            _check_gpus(job)
        for name in missing:
            console.rule(name)
            CLUSTER_STAGES[name](job)


def _check_gpus(job: Job) -> None:
    """Before the hours of other stages: without its GPUs stage 2 waits. A cluster may get more, a machine never does."""
    import ray

    needed, there = job.gpus(), ray.cluster_resources().get("GPU", 0)
    if job.cluster.local and there < needed:
        raise ConfigError(
            f"stage 2 holds {needed:g} GPUs at once, and this machine has {there:g}; roles share one with "
            "engine.gpu_share=0.5 deepspeed.gpu_share=0.4, as in configs/gpu_1x.yaml"
        )
    if line := awaited({"GPU": needed}):
        say(job.console, line)


@contextlib.contextmanager
def on_cluster(run: Run, config: Config, address: str | None, console: Console, *roles: str) -> Iterator[Job]:
    """The job on a cluster joined or started here; says so when that has too little of what `roles` need."""
    _quiet()
    with connected(config, address, _namespace(run)) as cluster:
        job = Job(run, config, cluster, console)
        if line := awaited({role: job.placements()[role] for role in roles}):
            say(console, line)
        yield job


def _namespace(run: Run) -> str:
    """Of this run alone, however many share a cluster and a config's name."""
    return f"rporec-{run.folder.name}-{zlib.crc32(str(run.folder).encode()):08x}"


def _quiet() -> None:
    """Progress is this program's to show, not each library's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def evaluate(run: Run, config: Config, *, ablations: bool, address: str | None, console: Console) -> dict[str, Any]:
    """Of a run without an LLM yet the baselines alone, which takes no cluster."""
    if not run.finished("stage1"):
        return rank_methods(run, config, console, ablations=ablations)
    with on_cluster(run, config, address, console) as job:
        return evaluate_run(job, ablations=ablations)
