"""What the LLM wrote for the same users before and after RL, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rporec.evaluation.ranking import list_scores, ranks
from rporec.models.head_inputs import HeadInputs
from rporec.recipes import StagedRecipe
from rporec.recipes.head_stage import final_head
from rporec.run import Run
from rporec.text.completion import parse
from rporec.text.completion_store import read_completions, read_items

SHOWN = 12  # users whose rollouts the report puts side by side
SHOWN_ITEMS = 3  # of a user's beams


def rollouts_side_by_side(recipe: StagedRecipe, run: Run) -> list[dict[str, Any]]:
    """What the LLM wrote for the same users before and after RL, with the rank that it led to."""
    dataset, config = recipe.dataset, recipe.config
    part = f"test_{config.data.headline}" if config.writes_items else "test"
    stages = [stage for stage in ("stage1", "stage2") if run.completions(stage, part).is_dir()]
    if not stages:
        return []
    shown = _shown_items if config.writes_items else _shown_texts
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
    scores = head.scores(HeadInputs.of(dataset, chosen, written)).numpy()
    exclude = dataset.excluded_of(chosen, recipe.config.data.headline)
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
