"""The five stages of a training, each one function that reads the run directory and writes into it.

    data      raw files (or the embedded world) -> a data set
    warmup    the backbone, the teacher's rationales, supervised warm-up
    stage1    what the LLM writes for head slice, validation and test; the RecHead
    stage2    asynchronous reinforcement learning (`actors.controller`)
    evaluate  what the improved LLM writes for test; the table and the report

A stage that has finished is skipped by `--resume`; one that was cut off goes on where it was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console

from actors.cluster import Cluster
from actors.generation import RolloutPool
from actors.learner import MAX_RESTARTS, fit, head_loop, rl_loop, warmup_loop
from rporec.config import Config, ConfigError
from rporec.data import build, find_sources, is_built
from rporec.files import read_json, read_lines, write_json
from rporec.models.trainable import learner_environment
from rporec.recipes.rporec import RPORec
from rporec.report.live import LiveTable, progress
from rporec.run import Run
from rporec.text.completion_store import Part

ENDPOINT_SHARD = 64  # rationales that an interruption of an endpoint's teacher may lose at most, were it a crash


@dataclass(frozen=True)
class Job:
    """What every stage is given."""

    run: Run
    config: Config
    cluster: Cluster
    console: Console

    @property
    def recipe(self) -> RPORec:
        return RPORec(self.run, self.config)

    def learner_env(self, ranks: int, *, alone: bool) -> dict[str, str]:
        """`alone`: no rollout workers generate meanwhile, so the ranks may have all cores."""
        cores = os.cpu_count() or 1
        sharing = ranks if alone else ranks + self.config.rollout_workers
        return learner_environment(self.cluster.cuda, threads=max(1, cores // sharing))

    def generators(self) -> int:
        """Workers for bulk generation, when no learner wants the cores: one each, up to the machine's."""
        if self.cluster.cuda or not self.cluster.local:
            return self.config.rollout_workers
        return max(self.config.rollout_workers, min(os.cpu_count() or 1, 4))


def prepare_data(run: Run, config: Config, console: Console) -> None:
    """Make or find the data set; needs no cluster."""
    settings = config.data
    with run.stage("data"), progress("data", console=console) as bar:

        def report(stage: str, done: int, total: int | None) -> None:
            bar.update(done, total=total, description=f"data: {stage}")

        if settings.path is None:
            from rporec.data.synthetic import write_synthetic

            source = run.folder / "source"
            if not source.exists():
                write_synthetic(source, settings.synthetic, config.seed)
        else:
            source = Path(settings.path)
            if is_built(source):
                write_json(run.folder / "data.json", {"path": str(source.absolute())})
                return
        if run.data.exists() and not is_built(run.data):
            shutil.rmtree(run.data)
        if not is_built(run.data):
            interactions, items = find_sources(source)
            build(
                interactions,
                items,
                run.data,
                split=settings.split,
                window=settings.window,
                k_core=settings.k_core,
                headline=settings.headline,
                progress=report,
            )


# --- warm-up ---------------------------------------------------------------------------------
def warm_up(job: Job) -> None:
    """Backbone, rationales, supervised warm-up."""
    run, config = job.run, job.config
    with run.stage("warmup") as notes:
        if not run.backbone.exists():
            _make_backbone(job)
        recipe = job.recipe
        slices = recipe.slices
        notes["samples"] = {name: len(getattr(slices, name)) for name in ("warmup", "head", "rl")}
        job.console.print(
            f"samples: {len(slices.warmup):,} for warm-up, {len(slices.head):,} for the head, {len(slices.rl):,} for RL"
        )
        if config.warmup.steps == 0:
            return
        _teach(job, recipe)
        notes |= _supervise(job, "warmup", config.warmup.steps)


def _supervise(job: Job, name: str, steps: int | None) -> dict[str, Any]:
    """Train the backbone on the rationales into `RUN/name/model`; returns what it took."""
    log = job.run.folder / f"{name}.jsonl"
    log.unlink(missing_ok=True)
    out = job.run.folder / name / "model"
    spec = {"run": job.run, "config": job.config, "steps": steps, "log": log, "out": out}
    with progress(name, console=job.console) as bar:

        def watch() -> None:
            if records := read_lines(log):
                last = records[-1]
                bar.update(last["step"] + 1, total=last["steps"], note=f"loss {last['loss']:.3f}")

        _fit(job, warmup_loop, spec, name, job.config.learners, watch)
        watch()
    last = read_lines(log)[-1]
    return {
        "steps": last["steps"],
        "loss": last["loss"],
        "training_seconds": round(last["seconds"], 2),
        "cpu_seconds": round(last["cpu_seconds"], 1),
    }


def _make_backbone(job: Job) -> None:
    from rporec.data import Dataset
    from rporec.models.backbone import load_model, load_tokenizer, make_tiny, save_model
    from rporec.text.prompt import ItemWriter
    from rporec.text.teacher import tokenizer_texts

    run, config = job.run, job.config
    if config.tiny_backbone:
        writer = ItemWriter(Dataset.load(run.data), config.text)
        make_tiny(tokenizer_texts(writer), config.tiny, config.seed, run.backbone)
        return
    source = Path(config.backbone)
    if source.is_dir():
        load_tokenizer(source)  # says in one line what is wrong with it
        run.backbone.symlink_to(source.absolute(), target_is_directory=True)
        return
    save_model(load_model(config.backbone, "bfloat16"), load_tokenizer(config.backbone), run.backbone)


def _teach(job: Job, recipe: RPORec) -> None:
    """Rationales for the warm-up slice, those that are not stored yet."""
    from rporec.text.rationales import Rationale, done_samples, write_shard
    from rporec.text.teacher import TemplateTeacher

    run, config, dataset = job.run, job.config, recipe.dataset
    store = run.folder / "rationales"
    done = done_samples(store)
    samples = np.array([sample for sample in recipe.slices.warmup.tolist() if sample not in done], np.int64)
    targets = dataset.targets(samples)
    with progress("rationales", total=len(samples), console=job.console) as bar:
        if config.teacher_kind == "template":
            teacher = TemplateTeacher(recipe.writer.items, config.teacher.decision)
            for start in range(0, len(samples), 2048):
                chunk = range(start, min(start + 2048, len(samples)))
                write_shard(
                    store,
                    [
                        Rationale(
                            sample=int(samples[i]),
                            text=teacher.rationale(dataset.history(int(samples[i])), int(targets[i])),
                            teacher="template",
                            model="template",
                            prompt_hash="",
                        )
                        for i in chunk
                    ],
                )
                bar.update(chunk[-1] + 1)
        elif config.teacher_kind == "openai":
            asyncio.run(_teach_by_endpoint(job, recipe, store, samples, bar.update))
        else:
            _teach_by_backbone(job, recipe, store, samples, bar.update)


async def _teach_by_endpoint(
    job: Job, recipe: RPORec, store: Path, samples: np.ndarray, update: Callable[[int], None]
) -> None:
    from rporec.text.llm_teacher import OpenAITeacher
    from rporec.text.rationales import write_shard

    config, dataset = job.config, recipe.dataset
    teacher = OpenAITeacher(recipe.writer.items, config.teacher, config.sampling.max_tokens)
    asked = zip(samples.tolist(), dataset.targets(samples).tolist(), strict=True)
    requests = ((sample, dataset.history(sample).tolist(), target) for sample, target in asked)
    waiting: list[Any] = []
    done = 0
    try:
        async for rationale in teacher.rationales(requests):
            waiting.append(rationale)
            done += 1
            update(done)
            if len(waiting) == ENDPOINT_SHARD:
                write_shard(store, waiting)
                waiting = []
    finally:
        write_shard(store, waiting)  # what an interrupted teacher had written is paid for: keep it


def _teach_by_backbone(
    job: Job, recipe: RPORec, store: Path, samples: np.ndarray, update: Callable[[int], None]
) -> None:
    from rporec.text.completion_store import read_completions
    from rporec.text.llm_teacher import BackboneTeacher
    from rporec.text.rationales import write_shard

    run, config, dataset = job.run, job.config, recipe.dataset
    teacher = BackboneTeacher(
        recipe.writer.items, recipe.writer.tokenizer, config.backbone, recipe.context, config.sampling.max_tokens
    )

    def prompts(chunk: np.ndarray) -> list[Any]:
        return [
            teacher.prompt_ids(dataset.history(int(sample)), int(target))
            for sample, target in zip(chunk, dataset.targets(chunk), strict=True)
        ]

    part = Part(run.completions("teacher", "warmup"), samples, recipe.sampled_spec(1, top_p=config.sampling.top_p))
    with RolloutPool(run.backbone, config, job.cluster, recipe.context, job.generators()) as pool:
        pool.write(part, prompts, lambda done, total, tokens: update(done))
    written, texts = read_completions(part.folder)
    write_shard(
        store,
        [
            teacher.rationale(int(sample), ids, text, int(target))
            for sample, ids, text, target in zip(
                written, prompts(written), texts, dataset.targets(written), strict=True
            )
        ],
    )


# --- stage 1 ---------------------------------------------------------------------------------
def train_head_stage(job: Job) -> None:
    """Completions of the LLM before RL, then the RecHead on those of the head slice."""
    run, config, recipe = job.run, job.config, job.recipe
    with run.stage("stage1") as notes:
        slices = recipe.slices
        parts = [
            Part(run.completions("stage1", "head"), slices.head, recipe.sampled_spec(1, top_p=config.sampling.top_p)),
            Part(run.completions("stage1", "valid"), recipe.evaluated("valid"), recipe.greedy_spec()),
            *_test_parts(job, recipe, "stage1"),
        ]
        _write_completions(job, recipe, run.warm_model, parts)
        log = run.folder / "head.jsonl"
        log.unlink(missing_ok=True)
        with progress("RecHead", console=job.console) as bar:

            def watch() -> None:
                if records := read_lines(log):
                    last = records[-1]
                    value = last.get("valid_ndcg@10", last.get("ndcg@10"))
                    bar.update(
                        last["epoch"], total=last["epochs"], note=f"{last['head']}: validation NDCG@10 {value:.4f}"
                    )

            _fit(job, head_loop, {"run": run, "config": config, "log": log}, "head", config.head.workers, watch)
            watch()
        notes["samples"] = len(slices.head)
        notes["validation"] = {r["head"]: r["valid_ndcg@10"] for r in read_lines(log) if "valid_ndcg@10" in r}


def _test_parts(job: Job, recipe: RPORec, stage: str) -> list[Part]:
    test, samples = recipe.evaluated("test"), job.config.eval_samples
    parts = [Part(job.run.completions(stage, "test"), test, recipe.greedy_spec())]
    if samples:
        parts.append(Part(job.run.completions(stage, "test_sampled"), test, recipe.sampled_spec(samples)))
    return parts


def _write_completions(job: Job, recipe: RPORec, model: Path, parts: list[Part]) -> None:
    if not any(part.missing() for part in parts):
        return
    with RolloutPool(model, job.config, job.cluster, recipe.context, job.generators()) as pool:
        for part in parts:
            with progress(f"completions: {part.folder.name}", total=len(part.samples), console=job.console) as bar:

                def report(done: int, total: int, tokens: int) -> None:
                    bar.update(done, tokens=tokens)

                pool.write(part, recipe.prompts, report)


# --- stage 2 ---------------------------------------------------------------------------------
def reinforce(job: Job) -> None:
    """The asynchronous loop: controller, rollout, reward and learner actors."""
    from actors.controller import Controller

    run, config = job.run, job.config
    with run.stage("stage2") as notes:
        if config.steps == 0:
            notes["skipped"] = "steps: 0"
            return
        controller = Controller.options(name="controller").remote(run, config, job.cluster)
        write_json(
            run.folder / "run.json",
            {
                "address": job.cluster.address,
                "namespace": job.cluster.namespace,
                "controller": "controller",
                "pid": os.getpid(),
            },
        )
        started = controller.start.remote()
        try:
            with LiveTable(config.steps, config.max_staleness, job.console) as table:

                def watch() -> None:
                    status = read_json(run.folder / "status.json", {})
                    validation = read_lines(run.validation)
                    table.update(status, status.get("last_step") or None, validation[-1] if validation else None)
                    ready, _ = ray.wait([started], timeout=0)
                    if ready:
                        ray.get(started)

                spec = {"run": run, "config": config}
                _fit(job, rl_loop, spec, "stage2", config.learners, watch, restarts=MAX_RESTARTS)
                ray.get(controller.stop.remote())
                watch()
        finally:
            ray.kill(controller)
            (run.folder / "run.json").unlink(missing_ok=True)
        status = read_json(run.folder / "status.json")
        notes |= {key: status[key] for key in ("groups", "best", "cpu_seconds")}


# --- evaluate --------------------------------------------------------------------------------
def evaluate_run(job: Job, *, ablations: bool = True) -> dict[str, Any]:
    """Completions of the best checkpoint for test, then the table of all methods and the report."""
    from rporec.evaluation.table import print_table
    from rporec.recipes.evaluation import evaluate
    from rporec.report.html import write_report

    run, config, recipe = job.run, job.config, job.recipe
    with run.stage("evaluate"):
        if run.best_model.is_dir():
            _write_completions(job, recipe, run.best_model, _test_parts(job, recipe, "stage2"))
        if config.more_warmup:
            _more_warmup(job, recipe)
        with progress("ranking", console=job.console) as bar:
            summary = evaluate(run, config, ablations=ablations, progress=lambda name: bar.update(note=name))
    write_report(run.folder)
    print_table(summary, job.console)
    return summary


def _more_warmup(job: Job, recipe: RPORec) -> None:
    """The control that RL must beat: its CPU seconds spent on a longer warm-up from the same backbone."""
    run = job.run
    if not (run.folder / "more_warmup" / "model").is_dir():
        stages = read_json(run.folder / "stages.json")
        warmup = stages["warmup"]
        per_step = warmup["cpu_seconds"] / warmup["steps"]
        steps = warmup["steps"] + round(stages["stage2"]["cpu_seconds"] / per_step)
        _supervise(job, "more_warmup", steps)
    parts = _test_parts(job, recipe, "more_warmup")
    _write_completions(job, recipe, run.folder / "more_warmup" / "model", parts)


def _fit(
    job: Job,
    loop: Callable[[dict[str, Any]], None],
    spec: dict[str, Any],
    name: str,
    workers: int,
    watch: Callable[[], None],
    restarts: int = 0,
) -> None:
    fit(
        loop,
        spec,
        name=name,
        run=job.run,
        cluster=job.cluster,
        workers=workers,
        watch=watch,
        env=job.learner_env(workers, alone=loop is not rl_loop),
        restarts=restarts,
    )


STAGES: dict[str, Callable[[Job], Any]] = {
    "warmup": warm_up,
    "stage1": train_head_stage,
    "stage2": reinforce,
    "evaluate": evaluate_run,
}


def check_stages(names: list[str]) -> None:
    known = ["data", *STAGES]
    for name in names:
        if name not in known:
            raise ConfigError(f"--stages: {name!r} is none of {', '.join(known)}")
