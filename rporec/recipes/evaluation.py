"""One table for all methods: same samples, same ranking function, same conventions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rporec.baselines.store import BaselineStore
from rporec.config import CONVENTIONS, Config, Convention
from rporec.data import Dataset
from rporec.evaluation.cold import cold_items, popularity_strata
from rporec.evaluation.lists import TopLists
from rporec.evaluation.table import DEFAULT_PAIRS, RankTable, metrics
from rporec.files import write_json
from rporec.models.text_neighbours import TextVectors
from rporec.recipes import load_recipe
from rporec.recipes.methods import Method, methods, trained_writer
from rporec.recipes.rere import beams_of_test
from rporec.recipes.side_by_side import rollouts_side_by_side
from rporec.run import Run

CHUNK = 512  # samples scored at once


def evaluate(
    run: Run, config: Config, *, ablations: bool, progress: Callable[[str], None], processes: int = 1
) -> dict[str, Any]:
    """Rank test with every method the run has; writes ranks.parquet, metrics.json and rollouts.json.

    processes: that may train baselines at once.
    """
    recipe, store = load_recipe(run, config), baseline_store(run, config, progress)
    ranked = rank(
        recipe.dataset, methods(recipe, run, store, ablations, processes), progress, config.tested_conventions
    )
    ranked.table.write(run.folder / "ranks.parquet")
    summary = summarize(recipe.dataset, config, ranked)
    summary["baselines"] = {name: store.record(name) for name in config.evaluate.baselines}
    write_json(run.folder / "metrics.json", summary)
    write_json(run.folder / "rollouts.json", rollouts_side_by_side(recipe, run))
    return summary


@dataclass(frozen=True)
class Ranked:
    """What evaluation keeps of every method's scores."""

    table: RankTable
    lists: dict[Convention, TopLists]


def rank(
    dataset: Dataset,
    methods: Iterable[Method],
    progress: Callable[[str], None],
    conventions: Collection[Convention] = CONVENTIONS,
) -> Ranked:
    """Rank the catalogue by every method, in those of the conventions that it is for."""
    table, lists = RankTable(), {convention: TopLists() for convention in conventions}
    for method in methods:
        progress(method.name)
        wanted = [convention for convention in conventions if convention in method.conventions]
        for start in range(0, len(method.samples), CHUNK):
            chunk = np.arange(start, min(start + CHUNK, len(method.samples)))
            found, asked = method.scores(chunk), method.samples[chunk]
            table.add_scores(dataset, method.name, asked, found, wanted)
            for convention in wanted:
                lists[convention].add(method.name, asked, found, dataset.excluded_of(asked, convention))
    return Ranked(table, lists)


def summarize(dataset: Dataset, config: Config, ranked: Ranked) -> dict[str, Any]:
    """What metrics.json says of these ranks and lists."""
    vote = f"vote{config.eval_samples}"
    own = [(f"rporec_stage2_{vote}", f"rporec_stage1_{vote}")]
    if config.writes_items:
        own += [(f"{trained_writer(config)}{beams}", f"rere_sft{beams}") for beams in beams_of_test(config).values()]
    summary = metrics(
        ranked.table,
        {"path": str(dataset.root), **dataset.manifest["counts"], **dataset.manifest["settings"]},
        "test",
        [config.seed],
        config.data.headline,
        tuple(dict.fromkeys((*DEFAULT_PAIRS, *own))),
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


def _text_vectors(dataset: Dataset) -> Any:
    """TF-IDF of the items, or None where they have no text."""
    return TextVectors.fit(dataset.catalog.texts()).vectors if dataset.catalog.text_columns else None
