"""The five stages of a training, each one function that reads the run directory and writes into it.

    data      raw files (or the embedded world) -> a data set
    warmup    the backbone, the teacher's rationales, supervised warm-up
    stage1    what the LLM writes before RL for the heads and for evaluation; the heads of the recipe
    stage2    asynchronous reinforcement learning (`actors.reinforce`), or offline preferences (`actors.preference`)
    evaluate  what the improved LLM writes for test; the table and the report

A stage that has finished is skipped by `--resume`; one that was cut off goes on where it was.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cluster import cores
from actors.generation import RolloutPool
from actors.heads import head_loop
from actors.job import Job
from actors.preference import prefer
from actors.reinforce import reinforce
from actors.teaching import teach
from actors.warmup import warmup_loop
from rporec.config import Config
from rporec.data import build, find_sources, is_built
from rporec.data.remote import fetch, is_url
from rporec.files import read_json, read_lines, write_json
from rporec.recipes import StagedRecipe
from rporec.recipes.rporec import RPORec
from rporec.report.live import Progress, following, progress, say
from rporec.run import Run
from rporec.text.completion_store import Part

LOOKED_AT = 512  # validation samples whose prompts are looked at before training


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
            if is_url(settings.path):
                source = run.folder / "source"
                if not source.exists():
                    fetch(settings.path, source, report)
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
    """Backbone, rationales where a teacher writes them, supervised warm-up."""
    run, config = job.run, job.config
    with run.stage("warmup") as notes:
        job.load_recipe().make_backbone()
        recipe = job.load_recipe()  # which now finds its tokenizer
        notes["samples"] = {name: len(getattr(recipe.slices, name)) for name in ("warmup", "head", "rl")}
        counts = ", ".join(f"{count:,} for {name}" for name, count in notes["samples"].items() if count)
        job.console.print(f"samples: {counts}")
        if notice := _left_out(recipe):
            say(job.console, notice)
        if config.warmup.steps == 0:
            return
        if isinstance(recipe, RPORec):
            teach(job, recipe)
        notes |= _supervise(job, "warmup", config.warmup.steps)


def _left_out(recipe: StagedRecipe) -> str | None:
    """What prompts leave out of histories, if anything: no figure but the last would tell."""
    writer, dataset, samples = recipe.writer, recipe.dataset, recipe.evaluated("valid")[:LOOKED_AT]
    before = writer.dropped
    recipe.prompts(samples)
    dropped = writer.dropped - before
    if not dropped:
        return None
    shown = sum(len(writer.items.visible(dataset.history(int(sample)))) for sample in samples)
    knob = "tiny.context" if writer.tiny else "engine.args.max_model_len"
    return (
        f"prompts: {dropped / shown:.0%} of the items of histories do not fit, the oldest are left out; raise {knob} "
        f"({writer.budget + writer.reserve} tokens, {writer.reserve} of them for the completion) to show them"
    )


def _supervise(job: Job, name: str, steps: int | None) -> dict[str, Any]:
    """Train the backbone on the recipe's pairs into `RUN/name/model`; returns what it took."""
    folder, log = job.run.folder / name, job.run.folder / f"{name}.jsonl"
    spec = {"run": job.run, "config": job.config, "steps": steps, "log": log, "folder": folder}

    def show(bar: Progress, last: dict[str, Any]) -> None:
        bar.update(last["step"] + 1, total=last["steps"], note=f"loss {last['loss']:.3f}")

    with following(log, show, name, None, job.console) as watch:
        if not (folder / "model").is_dir():  # or cut off after its end
            job.fit(warmup_loop, spec, name, job.config.learners, watch)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # large, and the model is whole
    last = read_lines(log)[-1]
    return {
        "steps": last["steps"],
        "loss": last["loss"],
        "training_seconds": round(last["seconds"], 2),
        "cpu_seconds": round(last["cpu_seconds"], 1),
    }


# --- stage 1 ---------------------------------------------------------------------------------
def write_and_train_heads(job: Job) -> None:
    """Completions of the LLM before RL, then the recipe's heads."""
    run, recipe = job.run, job.load_recipe()
    with run.stage("stage1") as notes:
        _write_completions(job, recipe, run.warm_model, recipe.parts("stage1"))
        if recipe.heads:
            notes["samples"] = len(recipe.slices.head)
            notes |= _train_heads(job, "head", "stage1", recipe.heads)


def _train_heads(
    job: Job, name: str, stage: str, heads: dict[str, str], slices: tuple[str, ...] = ("head",)
) -> dict[str, dict[str, Any]]:
    """Train `{folder: "text" | "blank"}` on what the LLM of `stage` wrote for `slices`, with `RUN/NAME.jsonl` as log.

    Returns by head its NDCG@10 on validation, and the scalars that were searched there.
    """
    log = job.run.folder / f"{name}.jsonl"
    log.unlink(missing_ok=True)
    spec = {"run": job.run, "config": job.config, "log": log, "stage": stage, "slices": slices, "heads": heads}

    def show(bar: Progress, last: dict[str, Any]) -> None:
        value = last.get("valid_ndcg@10", last.get("ndcg@10"))
        bar.update(last["epoch"], total=last["epochs"], note=f"{last['head']}: validation NDCG@10 {value:.4f}")

    with following(log, show, "RecHead", None, job.console) as watch:
        job.fit(head_loop, spec, name, job.config.head.workers, watch)
    chosen = [record for record in read_lines(log) if "valid_ndcg@10" in record]
    return {
        "validation": {record["head"]: record["valid_ndcg@10"] for record in chosen},
        "weights": {record["head"]: record["weights"] for record in chosen},
    }


def _write_completions(job: Job, recipe: StagedRecipe, model: Path, parts: list[Part]) -> None:
    if not any(part.missing() for part in parts):
        return
    with RolloutPool(model, job.config, job.cluster, recipe.context, job.generators()) as pool:
        for part in parts:
            with progress(f"completions: {part.folder.name}", total=len(part.samples), console=job.console) as bar:

                def report(done: int, total: int, tokens: int) -> None:
                    bar.update(done, tokens=tokens)

                pool.write(part, recipe.prompts, report)


# --- evaluate --------------------------------------------------------------------------------
def evaluate_run(job: Job, *, ablations: bool = True) -> dict[str, Any]:
    """Completions of the best checkpoint for test, then the table of all methods and the report."""
    run, config, recipe = job.run, job.config, job.load_recipe()
    over = run.finished("stage2")
    # Of a training under way this is a look, not the stage.
    with run.stage("evaluate") if over else contextlib.nullcontext():
        if run.finished("stage1"):  # what the config has come to ask for since
            tested = [part for part in recipe.parts("stage1") if part.folder.name.startswith("test")]
            _write_completions(job, recipe, run.warm_model, tested)
        if run.best_model.is_dir():
            _forget_earlier_best(run)
            # Heads are refreshed once it is over; until then the next best model would undo what was written for them.
            parts = [part for part in recipe.parts("stage2") if over or part.folder.name.startswith("test")]
            _write_completions(job, recipe, run.best_model, parts)
        if config.more_warmup and over:
            _more_warmup(job, recipe)
        if config.head.refreshed and over:
            _refresh_heads(job, recipe)
        return rank_methods(run, config, job.console, ablations=ablations)


def rank_methods(run: Run, config: Config, console: Console, *, ablations: bool) -> dict[str, Any]:
    """The table of all methods and the report, of what is there; needs no cluster."""
    from rporec.evaluation.terminal import print_table
    from rporec.recipes.evaluation import evaluate
    from rporec.report.html import write_report

    with progress("ranking", console=console) as bar:
        summary = evaluate(
            run, config, ablations=ablations, progress=lambda note: bar.update(note=note), processes=cores()
        )
    write_report(run.folder)
    print_table(summary, console)
    return summary


def _more_warmup(job: Job, recipe: StagedRecipe) -> None:
    """The control that RL must beat: its CPU seconds spent on a longer warm-up, and stage 1 after that."""
    run = job.run
    folder = run.folder / "more_warmup"
    if not (folder / "model").is_dir() or (folder / "checkpoints").is_dir():
        stages = read_json(run.folder / "stages.json")
        warmup = stages["warmup"]
        per_step = warmup["cpu_seconds"] / warmup["steps"]
        steps = warmup["steps"] + round(stages["stage2"]["cpu_seconds"] / per_step)
        _supervise(job, "more_warmup", steps)
    _write_completions(job, recipe, folder / "model", recipe.parts("more_warmup"))
    if not run.head("more_warmup/head").is_dir():
        _train_heads(job, "more_warmup_head", "more_warmup", {"more_warmup/head": "text"})


def _refresh_heads(job: Job, recipe: StagedRecipe) -> None:
    """Heads on the head and the RL slice: for the LLM before RL, for the one after it, and on history alone."""
    run = job.run
    before, after = {"refreshed/stage1": "text", "refreshed/history": "blank"}, {"refreshed/stage2": "text"}
    for stage, model, heads in (("stage1", run.warm_model, before), ("stage2", run.best_model, after)):
        if model.is_dir() and not all(run.head(name).is_dir() for name in heads):
            _train_heads(job, f"refreshed_{stage}", stage, heads, ("head", "rl"))


def _forget_earlier_best(run: Run) -> None:
    """What came of a checkpoint that validation has since replaced is not the best one's."""
    folder, best = run.folder / "completions" / "stage2", read_json(run.folder / "best.json")
    model = {key: best[key] for key in ("attempt", "version")}
    if read_json(folder / "model.json") != model:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(run.head("refreshed/stage2"), ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "model.json", model)


CLUSTER_STAGES: dict[str, Callable[[Job], Any]] = {
    "warmup": warm_up,
    "stage1": write_and_train_heads,
    "stage2": lambda job: (prefer if job.config.recipe == "preference" else reinforce)(job),
    "evaluate": evaluate_run,
}
