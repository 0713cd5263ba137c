"""One table for all methods: same samples, same ranking function, both conventions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rporec.baselines.family import Baseline
from rporec.baselines.store import BaselineStore, families
from rporec.config import Config
from rporec.data import Dataset
from rporec.data.world import World
from rporec.evaluation.cold import cold_items, popularity_strata
from rporec.evaluation.lists import TopLists
from rporec.evaluation.table import CONVENTIONS, DEFAULT_PAIRS, Convention, RankTable, metrics, write_metrics
from rporec.files import write_json
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.models.text_neighbours import TextVectors
from rporec.recipes.head_stage import final_head
from rporec.recipes.rporec import RPORec
from rporec.rl.judge import head_inputs
from rporec.run import Run
from rporec.text.completion import parse
from rporec.text.completion_store import read_completions
from rporec.text.teacher import TemplateTeacher

CHUNK = 512  # samples scored at once
SHOWN = 12  # users whose rollouts the report puts side by side

Scores = Callable[[np.ndarray], np.ndarray]  # positions in the method's samples [B] -> scores [B, N]
Method = tuple[str, np.ndarray, Scores]  # name, sample numbers; a method that draws has some more than once


def evaluate(run: Run, config: Config, *, ablations: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Rank test with every method the run has; writes ranks.parquet, metrics.json and rollouts.json."""
    recipe, store = RPORec(run, config), baseline_store(run, config, progress)
    ranked = rank(recipe.dataset, _methods(recipe, run, store, ablations), progress)
    ranked.table.write(run.folder / "ranks.parquet")
    summary = summarize(recipe.dataset, config, ranked)
    summary["baselines"] = {name: store.record(name) for name in config.evaluate.baselines}
    write_metrics(summary, run.folder / "metrics.json")
    write_json(run.folder / "rollouts.json", rollouts_side_by_side(recipe, run))
    return summary


@dataclass(frozen=True)
class Ranked:
    """What evaluation keeps of every method's scores."""

    table: RankTable
    lists: dict[Convention, TopLists]


def rank(dataset: Dataset, methods: Iterable[Method], progress: Callable[[str], None]) -> Ranked:
    """Rank the catalogue by every method, in both conventions."""
    table, lists = RankTable(), {convention: TopLists() for convention in CONVENTIONS}
    for name, samples, scores in methods:
        progress(name)
        for start in range(0, len(samples), CHUNK):
            chunk = np.arange(start, min(start + CHUNK, len(samples)))
            found, asked = scores(chunk), samples[chunk]
            table.add_scores(dataset, name, asked, found)
            lists["all"].add(name, asked, found)
            lists["exclude_history"].add(name, asked, found, [dataset.seen(int(sample)) for sample in asked])
    return Ranked(table, lists)


def summarize(dataset: Dataset, config: Config, ranked: Ranked) -> dict[str, Any]:
    """What metrics.json says of these ranks and lists."""
    vote = f"vote{config.eval_samples}"
    voted = (f"rporec_stage2_{vote}", f"rporec_stage1_{vote}")
    summary = metrics(
        ranked.table,
        {"path": str(dataset.root), **dataset.manifest["counts"], **dataset.manifest["settings"]},
        "test",
        [config.seed],
        config.data.headline,
        DEFAULT_PAIRS if voted in DEFAULT_PAIRS else (*DEFAULT_PAIRS, voted),
        cold=cold_items(dataset),
        strata=popularity_strata(dataset),
    )
    vectors = _text_vectors(dataset)
    for convention, shown in ranked.lists.items():
        for name, entry in shown.summary(len(dataset.catalog), vectors).items():
            summary["conventions"][convention]["methods"][name] |= entry
    return summary


def baseline_store(run: Run, config: Config, progress: Callable[[str], None]) -> BaselineStore:
    """The run's baselines, chosen and fitted by the conventions of its heads."""
    return BaselineStore(
        run.folder / "baselines",
        Dataset.load(run.data),
        exclude_history=config.data.headline == "exclude_history",
        refit=config.head.refit == "train+valid",
        progress=progress,
    )


def _methods(recipe: RPORec, run: Run, store: BaselineStore, ablations: bool) -> Iterator[Method]:
    """Every method that the run has."""
    dataset, config = recipe.dataset, recipe.config
    test = recipe.evaluated("test")
    yield from baselines(store, config, test)
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
            inputs = head_inputs(dataset, samples, texts)
            yield f"rporec_{stage}_sampled", samples, _scored(head, inputs)
            yield from _voted(f"rporec_{stage}_vote", samples, _scored(head, inputs))
    yield from _more_warmup(recipe, run, head)
    yield from _ceilings(recipe, head.scores, test)


def _more_warmup(recipe: RPORec, run: Run, frozen: RecHead) -> Iterator[Method]:
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


def baselines(store: BaselineStore, config: Config, test: np.ndarray) -> Iterator[Method]:
    """Fitted on all of train. One that depends on its seed comes once for each: a sample counts with their mean."""
    known, seeds = families(), range(config.seed, config.seed + config.evaluate.seeds)
    for name in config.evaluate.baselines:
        for baseline in store.fitted(known[name], seeds):
            yield name, test, _by(baseline, store.dataset, test)


def _voted(name: str, samples: np.ndarray, scores: Scores) -> Iterator[Method]:
    """K completions a sample vote by the mean of the scores that they lead to; nothing where K is 1."""
    distinct, counts = np.unique(samples, return_counts=True)
    k = int(counts.max(initial=0))
    if k < 2 or counts.min() != k:
        return
    rows = np.argsort(samples, kind="stable").reshape(len(distinct), k)

    def mean(chosen: np.ndarray) -> np.ndarray:
        return np.mean([scores(column) for column in rows[chosen].T], axis=0)

    yield f"{name}{k}", distinct, mean


def _text_vectors(dataset: Dataset) -> Any:
    """TF-IDF of the items, or None where they have no text."""
    catalog = dataset.catalog
    return (
        TextVectors.fit([catalog.text(item) for item in range(len(catalog))]).vectors if catalog.text_columns else None
    )


def _ceilings(recipe: RPORec, head_scores: Any, test: np.ndarray) -> Iterator[Method]:
    """Of the synthetic world alone: an oracle that knows it, and a teacher whose target is the oracle's guess."""
    dataset = recipe.dataset
    if dataset.root is None or not (dataset.root / "world.json").is_file():
        return
    world = World.load(dataset.root)
    oracle = world.oracle_scores(dataset, test)
    yield "oracle", test, lambda chunk: oracle[chunk]
    if recipe.config.teacher_kind == "template":
        teacher = TemplateTeacher(recipe.writer.items, recipe.config.teacher.decision)
        guesses = oracle.argmax(axis=1)
        texts = [teacher.rationale(dataset.history(int(s)), int(guess)) for s, guess in zip(test, guesses, strict=True)]
        inputs = head_inputs(dataset, test, texts)
        yield "teacher", test, lambda chunk: head_scores(inputs.take(chunk)).numpy()


def rollouts_side_by_side(recipe: RPORec, run: Run) -> list[dict[str, Any]]:
    """What the LLM wrote for the same users before and after RL, with the rank that it led to."""
    from rporec.evaluation.ranking import ranks

    dataset = recipe.dataset
    stages = [stage for stage in ("stage1", "stage2") if run.completions(stage, "test").is_dir()]
    if not stages:
        return []
    head = final_head(run, recipe, "head")
    everyone, _ = read_completions(run.completions(stages[0], "test"))
    chosen = np.random.default_rng(recipe.config.seed).choice(everyone, min(SHOWN, len(everyone)), replace=False)
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
        if stage not in stages:
            continue
        samples, texts = read_completions(run.completions(stage, "test"))
        text_of = dict(zip(samples.tolist(), texts, strict=True))
        written = [text_of[int(sample)] for sample in chosen]
        scores = head.scores(head_inputs(dataset, chosen, written)).numpy()
        seen = [dataset.seen(int(sample)) for sample in chosen]
        exclude = seen if recipe.config.data.headline == "exclude_history" else None
        places = ranks(scores, dataset.targets(chosen), exclude)
        for record, text, place in zip(records, written, places, strict=True):
            parsed = parse(text)
            record[key] = {"cot": parsed.cot, "answer": parsed.answer, "rank": float(place)}
    return records
