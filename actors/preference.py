"""Stage 2 of the offline recipe: the learner group alone, on pairs that nobody has to generate."""

from __future__ import annotations

import shutil
import time
from typing import Any

from actors import checkpoints
from actors.job import Job
from actors.learner import step_record
from rporec.config import ConfigError
from rporec.engine.types import Version
from rporec.files import append_line, cut_lines, read_lines, write_json
from rporec.report.live import Progress, following


def prefer(job: Job) -> None:
    """Train on chosen items and negatives, from the newest checkpoint; the last weights become `best/`."""
    run, config = job.run, job.config
    with run.stage("stage2") as notes:
        if config.steps == 0:
            notes["skipped"] = "steps: 0"
            return
        step = checkpoints.newest(run.checkpoints) or 0
        if step > config.steps:
            raise ConfigError(
                f"steps: {config.steps}, but {run.folder} has done {step} already; ask for as many or more"
            )

        def show(bar: Progress, last: dict[str, Any]) -> None:
            note = f"loss {last['loss']:.3f}, chosen above all negatives {last['accuracy']:.0%}"
            bar.update(last["step"] + 1, note=note)

        name, spec = config.preference.loss, {"run": run, "config": config}
        with following(run.steps, show, name, config.steps, job.console) as watch:
            if not run.best_model.is_dir():  # or cut off after its end
                job.fit(preference_loop, spec, name, config.learners, watch)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # large, and the model is whole
        last = read_lines(run.steps)[-1]
        done = last["step"] + 1  # what was asked for, unless it was cut off after its end and asked for more
        notes |= {"steps": done, "loss": last["loss"], "cpu_seconds": last["cpu_seconds"] * config.learners}
        write_json(run.folder / "best.json", {"attempt": 0, "version": done, "step": done})


def preference_loop(spec: dict[str, Any]) -> None:
    """All steps on one rank; groups are dealt to ranks in turn."""
    run, config = spec["run"], spec["config"]
    run.require_here()
    import torch.distributed as dist

    from rporec.recipes.preference import Preference
    from rporec.rl.learner import Clock
    from rporec.rl.preference_learner import PreferenceLearner

    rank, world = dist.get_rank(), dist.get_world_size()
    recipe = Preference(run, config)
    learner = PreferenceLearner(run.warm_model, config, world=world, auxiliary=recipe.auxiliary())
    first = checkpoints.resume(run.checkpoints, learner.policy)
    began = time.process_time()
    if rank == 0:
        began -= sum(record["cpu_seconds"] for record in cut_lines(run.steps, first)[-1:])
    for step in range(first, config.steps):
        clock = Clock()
        offset = step * config.groups_per_step
        groups = recipe.groups(range(offset + rank, offset + config.groups_per_step, world))
        clock.lap("other")
        metrics = learner.step(groups)
        clock.lap("backward")
        if rank == 0:
            append_line(run.steps, step_record(step, Version(0, step), metrics, clock, began))
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            checkpoints.save(run.checkpoints, step + 1, learner.policy)
    learner.policy.save_model(recipe.writer.tokenizer, run.best_model)
