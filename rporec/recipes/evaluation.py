"""One table for all methods: same samples, same ranking function, both conventions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rporec.baselines.popularity import Baseline, Popularity, RecentPopularity
from rporec.config import Config
from rporec.data import Dataset
from rporec.data.world import World
from rporec.evaluation.cold import cold_items, held_rows
from rporec.evaluation.ranking import list_scores, ranks
from rporec.evaluation.table import CONVENTIONS, Convention, RankTable, metrics, write_metrics
from rporec.files import write_json
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.recipes import StagedRecipe, load_recipe
from rporec.recipes.head_stage import final_head
from rporec.rl.judge import head_inputs
from rporec.run import Run
from rporec.text.completion import parse
from rporec.text.completion_store import read_completions, read_items
from rporec.text.teacher import TemplateTeacher

CHUNK = 512  # samples scored at once
SHOWN = 12  # users whose rollouts the report puts side by side
SHOWN_ITEMS = 3  # of a user's beams

Scores = Callable[[np.ndarray], np.ndarray]  # sample numbers [B] -> scores [B, N]


def evaluate(run: Run, config: Config, *, ablations: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Rank test with every method the run has; writes ranks.parquet, metrics.json and rollouts.json."""
    recipe = load_recipe(run, config)
    table = RankTable()
    for name, samples, scores, *conventions in _methods(recipe, run, ablations):
        progress(name)
        for start in range(0, len(samples), CHUNK):
            chunk = np.arange(start, min(start + CHUNK, len(samples)))
            table.add_scores(recipe.dataset, name, samples[chunk], scores(chunk), *conventions)
    table.write(run.folder / "ranks.parquet")
    info = {"path": str(run.data), **recipe.dataset.manifest["counts"], **recipe.dataset.manifest["settings"]}
    summary = metrics(table, info, "test", [config.seed], config.data.headline, cold=cold_items(recipe.dataset))
    write_metrics(summary, run.folder / "metrics.json")
    write_json(run.folder / "rollouts.json", rollouts_side_by_side(recipe, run))
    return summary


def _methods(recipe: StagedRecipe, run: Run, ablations: bool) -> Iterator[Any]:
    """(name, sample numbers, scores of positions in them) of every method; sampled ones repeat samples.

    A fourth value are the conventions that the scores are for; without it both.
    """
    test = recipe.evaluated("test")
    yield from _popularity(recipe.dataset, recipe.config, test)
    if recipe.config.recipe == "rere":
        yield from _beams(recipe, run)
        yield from _ceilings(recipe, None, test)
    else:
        yield from _head_methods(recipe, run, ablations, test)


def _beams(recipe: StagedRecipe, run: Run) -> Iterator[tuple[str, np.ndarray, Scores, list[Convention]]]:
    """The items that the LLM wrote before and after RL, in a search of its own for each convention."""
    items = len(recipe.dataset.catalog)
    for name, stage in (("rere_sft", "stage1"), ("rere", "stage2")):
        for convention in CONVENTIONS:
            if (folder := run.completions(stage, f"test_{convention}")).is_dir():
                samples, beams = read_items(folder)
                yield name, samples, _listed(beams, items), [convention]


def _listed(beams: list[np.ndarray], items: int) -> Scores:
    return lambda rows: list_scores([beams[row] for row in rows], items)


def _head_methods(
    recipe: StagedRecipe, run: Run, ablations: bool, test: np.ndarray
) -> Iterator[tuple[str, np.ndarray, Scores]]:
    """Heads, on what the LLM wrote before and after RL."""
    dataset, config = recipe.dataset, recipe.config
    history = final_head(run, recipe, "head_history")
    yield "rechead_history", test, _scored(history, head_inputs(dataset, test, None))
    head = final_head(run, recipe, "head")
    for stage in ("stage1", "stage2"):
        if not run.completions(stage, "test").is_dir():
            continue
        samples, texts = read_completions(run.completions(stage, "test"))
        inputs = head_inputs(dataset, samples, texts)
        yield f"rporec_{stage}", samples, _scored(head, inputs)
        if ablations:
            yield f"rporec_{stage}_blank", samples, _scored(head, inputs.blank())
            shuffled = inputs.shuffled(dataset.sample_user[samples], np.random.default_rng(config.seed))
            yield f"rporec_{stage}_shuffled", samples, _scored(head, shuffled)
        if run.completions(stage, "test_sampled").is_dir():
            samples, texts = read_completions(run.completions(stage, "test_sampled"))
            yield f"rporec_{stage}_sampled", samples, _scored(head, head_inputs(dataset, samples, texts))
    yield from _more_warmup(recipe, run, head)
    yield from _ceilings(recipe, head.scores, test)


def _more_warmup(recipe: StagedRecipe, run: Run, frozen: RecHead) -> Iterator[tuple[str, np.ndarray, Scores]]:
    """Stage 1 with RL's CPU time spent on more warm-up: under a head of its own, and under the one RL had."""
    if not run.head("more_warmup/head").is_dir():
        return
    own = final_head(run, recipe, "more_warmup/head")
    for part, suffix in (("test", ""), ("test_sampled", "_sampled")):
        if not run.completions("more_warmup", part).is_dir():
            continue
        samples, texts = read_completions(run.completions("more_warmup", part))
        inputs = head_inputs(recipe.dataset, samples, texts)
        yield f"rporec_stage1_moresft{suffix}", samples, _scored(own, inputs)
        yield f"rporec_stage1_moresft_frozen{suffix}", samples, _scored(frozen, inputs)


def _scored(head: RecHead, inputs: HeadInputs) -> Scores:
    return lambda rows: head.scores(inputs.take(rows)).numpy()


def _by(baseline: Baseline, dataset: Dataset, samples: np.ndarray) -> Scores:
    return lambda rows: baseline.scores(dataset, samples[rows])


def _popularity(dataset: Dataset, config: Config, test: np.ndarray) -> Iterator[tuple[str, np.ndarray, Scores]]:
    """Fitted on all of train; the half-life is picked on validation."""
    rows = held_rows(dataset)
    masks = config.data.headline == "exclude_history"
    for baseline in (
        Popularity.fit(dataset, rows),
        RecentPopularity.select(dataset, rows, dataset.split("valid"), exclude_history=masks),
    ):
        yield baseline.name, test, _by(baseline, dataset, test)


def _ceilings(
    recipe: StagedRecipe, head_scores: Any | None, test: np.ndarray
) -> Iterator[tuple[str, np.ndarray, Scores]]:
    """Of the synthetic world alone: an oracle that knows it, and a teacher whose target is the oracle's guess.

    `head_scores`: of the head that reads the teacher; None where there is none.
    """
    dataset = recipe.dataset
    if dataset.root is None or not (dataset.root / "world.json").is_file():
        return
    world = World.load(dataset.root)
    oracle = world.oracle_scores(dataset, test)
    yield "oracle", test, lambda chunk: oracle[chunk]
    if head_scores is not None and recipe.config.teacher_kind == "template":
        teacher = TemplateTeacher(recipe.writer.items, recipe.config.teacher.decision)
        guesses = oracle.argmax(axis=1)
        texts = [teacher.rationale(dataset.history(int(s)), int(guess)) for s, guess in zip(test, guesses, strict=True)]
        inputs = head_inputs(dataset, test, texts)
        yield "teacher", test, lambda chunk: head_scores(inputs.take(chunk)).numpy()


def rollouts_side_by_side(recipe: StagedRecipe, run: Run) -> list[dict[str, Any]]:
    """What the LLM wrote for the same users before and after RL, with the rank that it led to."""
    dataset, config = recipe.dataset, recipe.config
    part = f"test_{config.data.headline}" if config.recipe == "rere" else "test"
    stages = [stage for stage in ("stage1", "stage2") if run.completions(stage, part).is_dir()]
    if not stages:
        return []
    shown = _shown_items if config.recipe == "rere" else _shown_texts
    everyone = np.unique(read_completions(run.completions(stages[0], part))[0])
    chosen = np.random.default_rng(config.seed).choice(everyone, min(SHOWN, len(everyone)), replace=False)
    catalog, items = dataset.catalog, recipe.writer.items
    records: list[dict[str, Any]] = [
        {
            "user_id": dataset.user_ids[dataset.sample_user[sample]],
            "history": [catalog.title(int(item)) for item in dataset.history(int(sample))[-10:]],
            "target": items.short(int(target)),
        }
        for sample, target in zip(chosen, dataset.targets(chosen), strict=True)
    ]
    for stage, key in (("stage1", "before"), ("stage2", "after")):
        if stage in stages:
            sides = shown(recipe, run, run.completions(stage, part), chosen)
            for record, (cot, answer, place) in zip(records, sides, strict=True):
                record[key] = {"cot": cot, "answer": answer, "rank": place}
    return records


def _shown_texts(recipe: StagedRecipe, run: Run, folder: Path, chosen: np.ndarray) -> list[tuple[str, str, float]]:
    """(thought, answer, rank of the target) for each of the chosen samples."""
    dataset, head = recipe.dataset, final_head(run, recipe, "head")
    samples, texts = read_completions(folder)
    text_of = dict(zip(samples.tolist(), texts, strict=True))
    written = [text_of[int(sample)] for sample in chosen]
    scores = head.scores(head_inputs(dataset, chosen, written)).numpy()
    seen = [dataset.seen(int(sample)) for sample in chosen]
    exclude = seen if recipe.config.data.headline == "exclude_history" else None
    places = ranks(scores, dataset.targets(chosen), exclude).tolist()
    parsed = [parse(text) for text in written]
    return [(one.cot, one.answer, place) for one, place in zip(parsed, places, strict=True)]


def _shown_items(recipe: StagedRecipe, run: Run, folder: Path, chosen: np.ndarray) -> list[tuple[str, str, float]]:
    """No thought, the first items, and the rank of the target."""
    dataset, catalog = recipe.dataset, recipe.dataset.catalog
    samples, beams = read_items(folder)
    beams_of = dict(zip(samples.tolist(), beams, strict=True))
    found = [beams_of[int(sample)] for sample in chosen]
    places = ranks(list_scores(found, len(catalog)), dataset.targets(chosen)).tolist()
    names = [" · ".join(catalog.title(int(item)) for item in items[:SHOWN_ITEMS]) for items in found]
    return [("", name, place) for name, place in zip(names, places, strict=True)]
