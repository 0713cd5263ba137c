"""The methods that evaluation ranks: baselines, heads on what an LLM wrote, items that it wrote, ceilings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from rporec.baselines.family import Baseline
from rporec.baselines.store import BaselineStore, families
from rporec.config import CONVENTIONS, Config, Convention
from rporec.data import Dataset
from rporec.data.world import World
from rporec.evaluation.ranking import list_scores
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.recipes import StagedRecipe
from rporec.recipes.head_stage import final_head
from rporec.recipes.rere import beams_of_test
from rporec.run import Run
from rporec.text.completion_store import read_completions, read_items
from rporec.text.teacher import TemplateTeacher

Scores = Callable[[np.ndarray], np.ndarray]  # positions in a method's samples [B] -> scores [B, N]


@dataclass(frozen=True)
class Method:
    """A row of the table, or a share of one: what comes again under the same name counts with its mean."""

    name: str
    samples: np.ndarray  # a method that draws has some more than once
    scores: Scores
    conventions: Collection[Convention] = CONVENTIONS  # that the scores are for


def methods(
    recipe: StagedRecipe, run: Run, store: BaselineStore, ablations: bool, processes: int = 1
) -> Iterator[Method]:
    """Every method that the run has: of one without an LLM yet, the baselines. processes: see `BaselineStore.prepare`."""
    test = recipe.evaluated("test")
    yield from baselines(store, recipe.config, test, processes)
    if not run.finished("stage1"):
        yield from _ceilings(recipe, None, test)
    elif recipe.config.writes_items:
        yield from _beams(recipe, run)
        yield from _ceilings(recipe, None, test)
    else:
        yield from _head_methods(recipe, run, ablations, test)


def baselines(store: BaselineStore, config: Config, test: np.ndarray, processes: int = 1) -> Iterator[Method]:
    """Fitted on all of train. One that depends on its seed comes once for each."""
    known, seeds = families(), range(config.seed, config.seed + config.evaluate.seeds)
    store.prepare([known[name] for name in config.evaluate.baselines], seeds, processes)
    for name in config.evaluate.baselines:
        for baseline in store.fitted(known[name], seeds):
            yield Method(name, test, _by(baseline, store.dataset, test))


def _by(baseline: Baseline, dataset: Dataset, samples: np.ndarray) -> Scores:
    return lambda rows: baseline.scores(dataset, samples[rows])


def _beams(recipe: StagedRecipe, run: Run) -> Iterator[Method]:
    """The items that the LLM wrote after warm-up and after stage 2, in a search of its own for each convention."""
    items, config = len(recipe.dataset.catalog), recipe.config
    for name, stage in (("rere_sft", "stage1"), (trained_writer(config), "stage2")):
        for suffix, convention in product(beams_of_test(config).values(), config.tested_conventions):
            if (folder := run.completions(stage, f"test_{convention}{suffix}")).is_dir():
                samples, beams = read_items(folder)
                yield Method(f"{name}{suffix}", samples, _listed(beams, items), [convention])


def trained_writer(config: Config) -> str:
    """The row of an LLM that writes items, after stage 2."""
    return "rere" if config.recipe == "rere" else config.preference.loss


def _listed(beams: list[np.ndarray], items: int) -> Scores:
    return lambda rows: list_scores([beams[row] for row in rows], items)


def _head_methods(recipe: StagedRecipe, run: Run, ablations: bool, test: np.ndarray) -> Iterator[Method]:
    """Heads, on what the LLM wrote before and after RL."""
    dataset, config = recipe.dataset, recipe.config
    history = final_head(run, recipe, "head_history")
    yield Method("rechead_history", test, _scored(history, HeadInputs.of(dataset, test)))
    head = final_head(run, recipe, "head")
    for stage in ("stage1", "stage2"):
        if not run.completions(stage, "test").is_dir():
            continue
        samples, texts = read_completions(run.completions(stage, "test"))
        inputs = HeadInputs.of(dataset, samples, texts)
        yield Method(f"rporec_{stage}", samples, _scored(head, inputs))
        if ablations:
            yield Method(f"rporec_{stage}_blank", samples, _scored(head, inputs.blank()))
            shuffled = inputs.shuffled(dataset.sample_user[samples], np.random.default_rng(config.seed))
            yield Method(f"rporec_{stage}_shuffled", samples, _scored(head, shuffled))
        if run.completions(stage, "test_sampled").is_dir():
            samples, texts = read_completions(run.completions(stage, "test_sampled"))
            inputs = HeadInputs.of(dataset, samples, texts)
            yield Method(f"rporec_{stage}_sampled", samples, _scored(head, inputs))
            yield from voted(f"rporec_{stage}_vote", samples, _scored(head, inputs))
    if run.head("head_refit").is_dir():
        yield from _rewarding(recipe, run, ablations, test)
    yield from _more_warmup(recipe, run, head)
    yield from _refreshed(recipe, run, ablations, test)
    yield from _ceilings(recipe, head.scores, test)


def _rewarding(recipe: StagedRecipe, run: Run, ablations: bool, test: np.ndarray) -> Iterator[Method]:
    """The LLM before and after RL under the head that rewarded it, where another, refitted one ranks test."""
    head = RecHead.load(run.head("head"), recipe.dataset.catalog)
    for stage in ("stage1", "stage2"):
        yield from _on_text(recipe, run, stage, {f"rporec_{stage}_rewarding": head})
    if ablations:
        yield Method("rporec_stage2_rewarding_blank", test, _scored(head, HeadInputs.of(recipe.dataset, test)))


def _on_text(recipe: StagedRecipe, run: Run, stage: str, heads: dict[str, RecHead]) -> Iterator[Method]:
    """Heads on the greedy and on the sampled text of a stage, as far as it was written."""
    for part, suffix in (("test", ""), ("test_sampled", "_sampled")):
        if run.completions(stage, part).is_dir():
            samples, texts = read_completions(run.completions(stage, part))
            inputs = HeadInputs.of(recipe.dataset, samples, texts)
            for name, head in heads.items():
                yield Method(f"{name}{suffix}", samples, _scored(head, inputs))


def voted(name: str, samples: np.ndarray, scores: Scores) -> Iterator[Method]:
    """K completions a sample vote by the mean of the scores that they lead to; nothing where K is 1."""
    distinct, counts = np.unique(samples, return_counts=True)
    k = int(counts.max(initial=0))
    if k < 2 or counts.min() != k:
        return
    rows = np.argsort(samples, kind="stable").reshape(len(distinct), k)

    def mean(chosen: np.ndarray) -> np.ndarray:
        return np.mean([scores(column) for column in rows[chosen].T], axis=0)

    yield Method(f"{name}{k}", distinct, mean)


def _more_warmup(recipe: StagedRecipe, run: Run, frozen: RecHead) -> Iterator[Method]:
    """Stage 1 with RL's CPU time spent on more warm-up: under a head of its own, and under the one RL had."""
    if not run.head("more_warmup/head").is_dir():
        return
    own = final_head(run, recipe, "more_warmup/head")
    heads = {"rporec_stage1_moresft": own, "rporec_stage1_moresft_frozen": frozen}
    yield from _on_text(recipe, run, "more_warmup", heads)


def _refreshed(recipe: StagedRecipe, run: Run, ablations: bool, test: np.ndarray) -> Iterator[Method]:
    """Heads trained anew after RL, on the RL slice too: each reads the LLM that it was trained for."""
    dataset = recipe.dataset
    if run.head("refreshed/history").is_dir():
        history = final_head(run, recipe, "refreshed/history")
        yield Method("rechead_history_refreshed", test, _scored(history, HeadInputs.of(dataset, test)))
    for stage in ("stage1", "stage2"):
        if not run.head(f"refreshed/{stage}").is_dir():
            continue
        name, head = f"rporec_{stage}_refreshed", final_head(run, recipe, f"refreshed/{stage}")
        if ablations:
            yield Method(f"{name}_blank", test, _scored(head, HeadInputs.of(dataset, test)))
        yield from _on_text(recipe, run, stage, {name: head})


def _scored(head: RecHead, inputs: HeadInputs) -> Scores:
    return lambda rows: head.scores(inputs.take(rows)).numpy()


def _ceilings(recipe: StagedRecipe, head_scores: Any | None, test: np.ndarray) -> Iterator[Method]:
    """Of the synthetic world alone: an oracle that knows it, and a teacher whose target is the oracle's guess.

    `head_scores`: of the head that reads the teacher; None where there is none.
    """
    dataset = recipe.dataset
    if dataset.root is None or not (dataset.root / "world.json").is_file():
        return
    world = World.load(dataset.root)
    oracle = world.oracle_scores(dataset, test)
    yield Method("oracle", test, lambda chunk: oracle[chunk])
    if head_scores is not None and recipe.config.teacher_kind == "template":
        teacher = TemplateTeacher(recipe.writer.items, recipe.config.teacher.decision)
        guesses = oracle.argmax(axis=1)
        texts = [teacher.rationale(dataset.history(int(s)), int(guess)) for s, guess in zip(test, guesses, strict=True)]
        inputs = HeadInputs.of(dataset, test, texts)
        yield Method("teacher", test, lambda chunk: head_scores(inputs.take(chunk)).numpy())
