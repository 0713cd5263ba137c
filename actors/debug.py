"""One role at a time: what a run's engine writes, what its judge pays for it, what its learner makes of that.

    rollouts   the first groups of stage 2, written by rollout workers with the weights before RL
    rewards    saved groups, scored by reward workers
    learner    saved, scored groups, consumed by the learner group from the weights before RL on

They hand groups to each other in folders like RUN/rollouts: `step_N.parquet`, each with the groups of one
learner step. The run is only read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayActorError
from ray.util import ActorPool
from rich.console import Console

from actors.cluster import last_words
from actors.job import Job
from actors.launch import on_cluster
from actors.learner import step_record
from actors.placement import RayPlacement
from actors.scoring import REWARD_BATCH
from rporec.config import Config, ConfigError
from rporec.data.folder import check_free, new_folder
from rporec.engine.types import EngineError, Version
from rporec.files import append_line
from rporec.report.live import Progress, following, progress, say
from rporec.rl.rollout_schema import ROLLOUT_SCHEMA, GroupMeta, Lease, group_meta, read_groups, write_groups
from rporec.run import Run


# --- the three commands ----------------------------------------------------------------------
def rollouts(run: Run, groups: int | None, out: Path, address: str | None, console: Console) -> None:
    """Sample the first `groups` groups that stage 2 draws (None: one step's) into `out`."""
    config = run.config()
    count = _at_least_1("--groups", config.groups_per_step if groups is None else groups)
    check_free(out)
    with on_cluster(run, config, address, console, "rollout") as job:
        written, seconds = _write(job, count)
    _save(out, written, config)
    whole = group_meta(pa.concat_batches(written))
    stopped = sum(group.column("finish_reason").to_pylist().count("stop") for group in written)
    size = len(whole.lengths)
    say(
        console,
        f"{count:,} groups, {size:,} completions, {whole.tokens:,} tokens in {seconds:.1f} s: "
        f"{whole.tokens / seconds:,.0f} tokens/s; mean length {whole.tokens / size:.1f}, "
        f"ended by themselves {stopped / size:.1%}, well formed {whole.format:.1%}; {out}",
    )


def rewards(run: Run, replay: Path, out: Path | None, address: str | None, console: Console) -> None:
    """Score the groups in `replay` anew, whatever an earlier scoring says, and write them into `out` if given."""
    config, groups = run.config(), saved_groups(replay)
    if out is not None:
        check_free(out)
    with on_cluster(run, config, address, console, "reward") as job:
        scored, metas, seconds = _score(job, groups)
    if out is not None:
        _save(out, scored, config)
    whole = group_meta(pa.concat_batches(scored))
    mean = "none" if whole.reward_mean is None else f"{whole.reward_mean:.4f}"
    parts = ", ".join(f"{name} {value:.4f}" for name, value in whole.parts.items())
    say(
        console,
        f"{len(scored):,} groups in {seconds:.1f} s: {len(scored) / seconds:,.0f} groups/s; reward without the entropy "
        f"term {mean} ({parts}); flat groups {sum(meta.flat for meta in metas)}, "
        f"completions that could not be scored {whole.masked}{'' if out is None else f'; {out}'}",
    )


def learner(run: Run, replay: Path, steps: int | None, out: Path, address: str | None, console: Console) -> None:
    """Train on the groups in `replay`, `groups_per_step` at a time; the records of the steps go to `out/steps.jsonl`."""
    config, groups = run.config(), saved_groups(replay)
    _check_scored(run, replay, groups)
    held = len(groups) // config.groups_per_step
    wanted = _at_least_1("--steps", max(1, held) if steps is None else steps)
    if wanted > held:
        raise ConfigError(
            f"{replay}: {len(groups)} groups, where {wanted} × {config.groups_per_step} (groups_per_step) are needed; "
            f"`rporec debug rollouts {run.folder} --groups {wanted * config.groups_per_step} --out DIR` writes enough"
        )
    check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    log = out.absolute() / "steps.jsonl"

    def show(bar: Progress, last: dict[str, Any]) -> None:
        bar.update(last["step"] + 1, note=f"loss {last['loss']:.5f}")

    spec = {"run": run, "config": config, "replay": replay.absolute(), "steps": wanted, "log": log}
    with (
        on_cluster(run, config, address, console, "learner") as job,
        following(log, show, "learner", wanted, console) as watch,
    ):
        # Ray Train's own files go into `out` too. As many threads as beside rollout workers: sums keep their order.
        replace(job, run=Run(log.parent)).fit(replay_loop, spec, "replay", config.learners, watch, alone=False)
    say(console, str(out / "steps.jsonl"))


# --- saved groups ----------------------------------------------------------------------------
def saved_groups(folder: Path) -> list[pa.RecordBatch]:
    """The groups of `folder/step_*.parquet` in the order of their steps; ConfigError where there are none to read."""
    paths = sorted(folder.glob("step_*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        missing = "no step_*.parquet in it" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"{folder}: {missing}; `rporec debug rollouts` writes such a folder, and save_rollouts: true RUN/rollouts"
        )
    for path in paths:
        _check_schema(path)
    return [group for path in paths for group in read_groups(path)]


def _check_schema(path: Path) -> None:
    try:
        held = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path}: not a Parquet file ({error})") from None
    wrong = [field.name for field in ROLLOUT_SCHEMA if field.name not in held.names or held.field(field.name) != field]
    if wrong:
        raise ConfigError(f"{path}: not groups as this version writes them: missing or of another type: {wrong[0]}")


def _check_scored(run: Run, folder: Path, groups: list[pa.RecordBatch]) -> None:
    for group in groups:
        if group.column("masked").null_count:
            raise ConfigError(
                f"{folder}: group {group.column('group')[0]} is not scored yet; first "
                f"`rporec debug rewards {run.folder} --replay {folder} --out SCORED`, then --replay SCORED"
            )


def _save(out: Path, groups: list[pa.RecordBatch], config: Config) -> None:
    size = config.groups_per_step
    with new_folder(out) as folder:
        for step, start in enumerate(range(0, len(groups), size)):
            write_groups(folder / f"step_{step}.parquet", groups[start : start + size])


# --- what the workers do ---------------------------------------------------------------------
def _write(job: Job, count: int) -> tuple[list[pa.RecordBatch], float]:
    """The first `count` groups of stage 2 by their number, and the seconds that they took once the engines stood."""
    config, recipe, placement = job.config, job.load_recipe(), RayPlacement(job.cluster)
    drawn = [recipe.draw(number) for number in range(count)]
    prompts = recipe.prompts([sample for sample, _ in drawn])
    leases = [
        Lease(number, sample, prompt, seed)
        for number, ((sample, seed), prompt) in enumerate(zip(drawn, prompts, strict=True))
    ]

    def start(name: str, place: int) -> Any:
        return placement.rollout(job.run, config, recipe, name, place)

    def generate(worker: Any, lease: Lease) -> Any:
        rows, _ = worker.generate.remote(lease, recipe.rollout_spec(lease.seed))
        return rows

    groups: list[pa.RecordBatch] = []
    with (
        _workers(job, "rollout", start) as workers,
        progress("rollouts", total=count, console=job.console) as bar,
    ):
        began, tokens = time.perf_counter(), 0
        for group in ActorPool(workers * config.slots).map_unordered(generate, leases):
            groups.append(group)
            tokens += group_meta(group).tokens
            bar.update(len(groups), tokens=tokens)
        seconds = time.perf_counter() - began
    return sorted(groups, key=lambda group: group.column("group")[0].as_py()), seconds


def _score(job: Job, groups: list[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], list[GroupMeta], float]:
    """The groups scored, in their order, what is known of each, and the seconds that it took once the judges stood."""
    placement = RayPlacement(job.cluster)
    parts = [groups[start : start + REWARD_BATCH] for start in range(0, len(groups), REWARD_BATCH)]

    def score(worker: Any, part: list[pa.RecordBatch]) -> Any:
        return worker.score.options(num_returns=1).remote(*part)

    scored: list[pa.RecordBatch] = []
    metas: list[GroupMeta] = []
    with (
        _workers(job, "reward", lambda name, _: placement.reward(job.run, job.config, name)) as workers,
        progress("rewards", total=len(groups), console=job.console) as bar,
    ):
        began = time.perf_counter()
        for *batches, told in ActorPool(workers).map(score, parts):
            scored += batches
            metas += told
            bar.update(len(scored))
        seconds = time.perf_counter() - began
    return scored, metas, seconds


@contextlib.contextmanager
def _workers(job: Job, role: str, start: Callable[[str, int], Any]) -> Iterator[list[Any]]:
    """As many as the run starts with, ready, and gone when the block ends; EngineError with the last words of one
    that dies."""
    workers = [start(f"{role}-{place}", place) for place in range(job.placements()[role])]
    try:
        ray.get([worker.status.remote() for worker in workers])
        yield workers
    except RayActorError as error:
        raise EngineError(f"a {role} worker died: {last_words(error)}") from None
    finally:
        for worker in workers:
            ray.kill(worker)


def replay_loop(spec: dict[str, Any]) -> None:
    """One learner rank on saved groups: the steps of `actors.learner.rl_loop` without controller and publication."""
    import torch.distributed as dist

    from rporec.rl.learner import Clock, Learner

    config: Config = spec["config"]
    rank, world = dist.get_rank(), dist.get_world_size()
    learner = Learner(spec["run"].warm_model, config, world=world)
    groups, size = saved_groups(spec["replay"]), config.groups_per_step
    started_at = time.process_time()
    for step in range(spec["steps"]):
        clock = Clock()
        taken = groups[step * size : (step + 1) * size]
        # The attempt is the run's own at that step, so that its tokens of the current version count as such.
        attempt = max(version.attempt for group in taken for version in group_meta(group).versions)
        version = Version(attempt, step)
        metrics = learner.step(taken[rank::world], version, clock)
        if rank == 0:
            append_line(spec["log"], step_record(step, version, metrics, clock, started_at))


def _at_least_1(option: str, count: int) -> int:
    if count < 1:
        raise ConfigError(f"{option}: 1 or more (got {count})")
    return count
