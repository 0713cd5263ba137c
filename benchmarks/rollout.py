"""Tokens a second of the engine alone, in its actor, and through the controller.

    rporec bench rollout [--json]

The same groups each time, from an empty engine to the last group; the engines are pinned to one core and take
turns. `bare` is vLLM stepped in a loop, with nothing around it. `actor` asks a rollout worker for as many groups at a
time as the controller would. `controller` is the real one with a real reward worker, and a learner that takes
groups and does nothing with them. The rate is that of the middle, so that neither the filling of the batch
nor its emptying counts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
from rich.console import Console

from actors.cluster import connected, core
from actors.controller import Controller
from actors.placement import RayPlacement
from actors.rollout import RolloutWorker, rollout_options
from benchmarks.result import machine, result
from benchmarks.workload import SMALL, Dealt, Workload, prepare
from rporec.config import Config, override
from rporec.engine.types import Version
from rporec.report.live import progress
from rporec.rl.rollout_schema import Lease
from rporec.run import Run

WORKLOAD = Workload(name="rollout", shape=SMALL, prompt=256, lengths=(16, 128), groups=8, size=8)
GROUPS, ROUNDS = 96, 3
SEQUENCES = 64  # at once; a third of all at most, so that there is a middle
MIDDLE = (0.15, 0.85)  # of all tokens
POLL = 0.2  # seconds; every question costs the worker a little
WAYS = ("bare", "actor", "controller")


@dataclass(frozen=True)
class Written:
    """Tokens of the groups that were complete (cumulative) at each moment, and seconds of CPU that the engine's
    process had taken by then."""

    moments: list[float]
    tokens: list[int]
    cpu: list[float]

    def rate(self, clock: str) -> float:
        """Tokens a second of the middle, by wall clock or the engine's CPU."""
        seconds = self.moments if clock == "wall" else self.cpu
        low, high = (share * self.tokens[-1] for share in MIDDLE)
        began, ended = np.interp([low, high], self.tokens, seconds)
        return float((high - low) / (ended - began))


class Bare:
    """vLLM and nothing else; an actor only so that it has a process of its own."""

    def __init__(self, model: str, config: Config, context: int, pinned: int) -> None:
        os.sched_setaffinity(0, {pinned})
        from rporec.engine.vllm_start import start_llm

        llm = start_llm(model, config.engine, context=context, seed=0, device="cpu", name="bare")
        self.core = llm.llm_engine

    def write(self, prompts: list[list[int]], lengths: list[int], size: int) -> Written:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        written = Written([time.perf_counter()], [0], [time.process_time()])
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(
                n=size,
                min_tokens=length,
                max_tokens=length,
                seed=number,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.core.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while self.core.has_unfinished_requests():
            if finished := self.core.step():
                tokens = sum(len(one.token_ids) for output in finished for one in output.outputs)
                written.moments.append(time.perf_counter())
                written.tokens.append(written.tokens[-1] + tokens)
                written.cpu.append(time.process_time())
        self.core.reset_prefix_cache()
        return written


@dataclass(frozen=True)
class Given(RayPlacement):
    """Workers that are there already, and that outlive the controller."""

    worker: Any
    judge: Any

    def rollout(self, *_: Any) -> Any:
        return self.worker

    def reward(self, *_: Any) -> Any:
        return self.judge

    def kill(self, actor: Any) -> None:
        pass


def watched(worker: Any, total: int, work: Callable[[], None]) -> Written:
    """What a rollout worker writes while `work` runs beside, until it has written `total` tokens more."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    before = ray.get(worker.status.remote())["tokens"]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    written = Written([], [], [])
    while not failed and (not written.tokens or written.tokens[-1] < total):
        status = ray.get(worker.status.remote())
        written.moments.append(time.perf_counter())
        written.tokens.append(status["tokens"] - before)
        written.cpu.append(status["cpu_seconds"])
        time.sleep(POLL)
    thread.join()
    if failed:
        raise failed[0]
    return written


def ask(worker: Any, recipe: Dealt, groups: int, slots: int) -> None:
    """Have groups written, `slots` of them at a time."""
    open_calls: list[Any] = []
    for number in range(groups):
        if len(open_calls) == slots:
            _, open_calls = ray.wait(open_calls)
        sample, seed = recipe.draw(number)
        lease = Lease(number, sample, recipe.prompts([sample])[0], seed)
        open_calls.append(worker.generate.remote(lease, recipe.rollout_spec(seed))[1])
    ray.get(open_calls)


def train(controller: Any, steps: int) -> None:
    """As rank 0 of a learner that needs no time and changes nothing."""
    ray.get(controller.start.remote())
    attempt = ray.get(controller.attach.remote(0, os.getpid(), "", 0))
    nothing = {"attempt": attempt, "cpu_seconds": 0.0, "seconds": {"wait": 0.0, "total": 0.0}}
    for step in range(steps):
        ray.get(controller.next_batch.remote(step, attempt))
        record = nothing | {"step": step, "version": step}
        ray.get(controller.finished_step.remote(step, Version(attempt, step + 1), record))
    ray.get(controller.stop.remote())


def measure(folder: Path, workload: Workload, groups: int, rounds: int) -> dict[str, list[Written]]:
    """By way; the first round warms up and is left out."""
    run = prepare(folder / "run", workload)
    # No version is published, so no group ever grows too old.
    config = override(
        run.config(),
        [f"steps={groups // workload.groups}", "max_staleness=1000000", f"engine.max_num_seqs={SEQUENCES}"],
    )
    recipe = Dealt(run, config, workload)
    lengths = [recipe.length(number) for number in range(groups)]
    total = sum(lengths) * workload.size
    found: dict[str, list[Written]] = {way: [] for way in WAYS}
    with connected(config, None, "bench") as cluster:
        options = rollout_options(config.engine)
        bare: Any = (
            ray.remote(Bare)
            .options(**{**options, "max_concurrency": 1})
            .remote(recipe.model, config, recipe.context, core(0))
        )
        worker: Any = RolloutWorker.options(**options).remote(
            "rollout-0", recipe.model, config.engine, recipe.context, config.seed, core(0)
        )
        placement = RayPlacement(cluster)
        judge = placement.reward(run, config, "reward-0")

        def controlled(recipe: Dealt) -> None:
            copy = Run(folder / f"run_{recipe.first}")
            shutil.copytree(run.folder, copy.folder)
            actor: Any = ray.remote(num_cpus=0, max_concurrency=1000)(Controller)
            controller = actor.remote(copy, config, Given(cluster, worker, judge), recipe)
            try:
                train(controller, config.steps)
            finally:
                ray.kill(controller)

        with progress("rollout", total=rounds, console=Console(stderr=True)) as bar:
            for number in range(rounds + 1):
                # Prompts that the worker has not seen: its prefix cache is to help within a group only.
                one, other = (Dealt(run, config, workload, (2 * number + way) * groups) for way in range(2))
                prompts = [prompt.tolist() for prompt in one.prompts([one.draw(n)[0] for n in range(groups)])]
                taken = {
                    "bare": ray.get(bare.write.remote(prompts, lengths, workload.size)),
                    "actor": watched(worker, total, partial(ask, worker, one, groups, config.slots)),
                    "controller": watched(worker, total, partial(controlled, other)),
                }
                if number:
                    for way, written in taken.items():
                        found[way].append(written)
                bar.update(number)
    return found


QUICK = {"groups": 64, "rounds": 2}


def run(workload: Workload = WORKLOAD, *, groups: int = GROUPS, rounds: int = ROUNDS) -> dict[str, Any]:
    before = machine()
    with tempfile.TemporaryDirectory(prefix="rporec-bench-") as folder:
        found = measure(Path(folder), workload, groups, rounds)
    ratios: dict[str, Any] = {}
    seconds: dict[str, dict[str, float]] = {}
    for clock in ("wall", "cpu"):
        rates = {way: [written.rate(clock) for written in found[way]] for way in WAYS}
        for way in WAYS[1:]:
            pairs = [mine / alone for mine, alone in zip(rates[way], rates["bare"], strict=True)]
            ratios[f"{way}_over_bare_{clock}"] = round(median(pairs), 3)
            ratios[f"{way}_over_bare_{clock}_pairs"] = [round(pair, 3) for pair in pairs]
        ratios |= {f"tokens_per_{clock}_second_{way}": round(median(rates[way]), 1) for way in WAYS}
        seconds[clock] = {f"{way}_1000_tokens": 1000 / median(rates[way]) for way in WAYS}
    return result("rollout", ratios, seconds["wall"], seconds["cpu"], machine=before)
