"""The teachers of warm-up: rationales for its slice from a template, an endpoint or the backbone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.generation import RolloutPool
from actors.job import Job
from rporec.recipes.rporec import RPORec
from rporec.report.live import progress
from rporec.text.completion_store import Part, read_completions
from rporec.text.llm_teacher import BackboneTeacher, OpenAITeacher
from rporec.text.rationales import Rationale, done_samples, write_shard
from rporec.text.teacher import TemplateTeacher

TEMPLATE_SHARD = 2048  # rationales
ENDPOINT_SHARD = 64  # rationales that an interruption of an endpoint's teacher may lose at most, were it a crash


def teach(job: Job, recipe: RPORec) -> None:
    """Rationales for the warm-up slice, those that are not stored yet."""
    store = job.run.folder / "rationales"
    done = done_samples(store)
    samples = np.array([sample for sample in recipe.slices.warmup.tolist() if sample not in done], np.int64)
    if not len(samples):
        return
    with progress("rationales", total=len(samples), console=job.console) as bar:
        if job.config.teacher_kind == "template":
            _by_template(job, recipe, store, samples, bar.update)
        elif job.config.teacher_kind == "openai":
            asyncio.run(_by_endpoint(job, recipe, store, samples, bar.update))
        else:
            _by_backbone(job, recipe, store, samples, bar.update)


def _by_template(job: Job, recipe: RPORec, store: Path, samples: np.ndarray, update: Callable[[int], None]) -> None:
    dataset = recipe.dataset
    teacher = TemplateTeacher(recipe.writer.items, job.config.teacher.decision)
    targets = dataset.targets(samples)
    for start in range(0, len(samples), TEMPLATE_SHARD):
        chunk = range(start, min(start + TEMPLATE_SHARD, len(samples)))
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
        update(chunk[-1] + 1)


async def _by_endpoint(
    job: Job, recipe: RPORec, store: Path, samples: np.ndarray, update: Callable[[int], None]
) -> None:
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


def _by_backbone(job: Job, recipe: RPORec, store: Path, samples: np.ndarray, update: Callable[[int], None]) -> None:
    run, config, dataset = job.run, job.config, recipe.dataset
    teacher = BackboneTeacher(
        recipe.writer.items, recipe.writer.tokenizer, config.backbone, recipe.context, config.sampling.max_tokens
    )

    def prompts(chunk: np.ndarray) -> list[Any]:
        return [
            teacher.prompt_ids(dataset.history(int(sample)), int(target))
            for sample, target in zip(chunk, dataset.targets(chunk), strict=True)
        ]

    part = Part(run.completions("teacher", "warmup"), samples, recipe.written_spec())
    if part.missing():
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
