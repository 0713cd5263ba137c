"""The results of a study together: seeds pooled, and all of them as Markdown tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from scipy.stats import t as student

from rporec.config import ConfigError
from rporec.evaluation.bootstrap import pooled_mean
from rporec.evaluation.table import SUMMED, in_order
from rporec.files import read_json
from rporec.run import contradiction
from rporec.study import VARIES, Result

Interval = tuple[float, float, float]  # value, low, high


def read_studies(out: Path) -> list[list[Result]]:
    """The results of a folder, those of one name together by seed.

    Raises ConfigError when there are none, or seeds of one name were made with different configs.
    """
    found = [Result(path, read_json(path)) for path in sorted(out.glob("*-seed*.json"))]
    if not found:
        raise ConfigError(f"{out}: no results of a study here; `rporec study CONFIG --out {out}` makes one")
    studies: dict[str, list[Result]] = {}
    for result in sorted(found, key=lambda one: (one.config.recipe != "rporec", one.name, one.seed)):
        seeds = studies.setdefault(result.name, [])
        if seeds and (key := contradiction(seeds[0].config, result.config, VARIES)):
            raise ConfigError(f"{result.path}: another {key} than {seeds[0].path.name}; they are no seeds of one study")
        seeds.append(result)
    return list(studies.values())


def pooled(results: Sequence[Result]) -> dict[str, dict[str, Interval]]:
    """NDCG@10 and HR@10 of every method and pair "A-B" that all seeds have: means over seeds, by `pooled_mean`.

    Seeds on one data set rank the same samples, so a user is drawn for all of them at once; in the embedded world
    every seed has users of its own. The interval is that of new users under these trainings, not of new trainings.
    """
    tables = [result.table for result in results]
    methods = [
        name
        for name in tables[0]["methods"]
        if all(name in t["methods"] and t["methods"][name]["samples"] == t["samples"] for t in tables)
    ]
    pairs = [pair for pair in tables[0]["paired"] if all(pair in t["paired"] for t in tables)]
    pairs = [pair for pair in pairs if set(pair.split("-")) <= set(methods)]
    shared = results[0].config.data.path is not None

    labels, counts, sums = [], [], []
    for result in results:
        by_method = {name: result.sums.filter(pc.field("method") == name) for name in methods}
        rows = by_method[methods[0]]  # all have the same users in the same order
        users = rows["user_id"].to_pylist()
        labels.append(users if shared else [f"{result.seed}/{user}" for user in users])
        counts.append(rows["samples"].to_numpy())
        values = {m: np.stack([t[metric].to_numpy() for metric in SUMMED], axis=1) for m, t in by_method.items()}
        differences = [values[a] - values[b] for a, b in (pair.split("-") for pair in pairs)]
        sums.append(np.concatenate([*values.values(), *differences], axis=1))
    everyone, owner = np.unique(np.concatenate(labels), return_inverse=True)
    all_sums = np.zeros((len(everyone), len(results), sums[0].shape[1]))
    all_counts = np.zeros((len(everyone), len(results)))
    for number, users in enumerate(np.split(owner, np.cumsum([len(one) for one in labels])[:-1])):
        all_sums[users, number], all_counts[users, number] = sums[number], counts[number]
    found = pooled_mean(all_sums, all_counts)
    columns = [tuple(map(float, column)) for column in zip(found.value, found.low, found.high, strict=True)]
    return {
        key: dict(zip(SUMMED, columns[at : at + len(SUMMED)], strict=True))  # type: ignore[arg-type]
        for at, key in zip(range(0, len(columns), len(SUMMED)), [*methods, *pairs], strict=True)
    }


def over_trainings(results: Sequence[Result]) -> dict[str, Interval]:
    """NDCG@10 of what two seeds or more all have: the mean over seeds, and Student's interval of that of new seeds.

    The test samples stay as they are; `pooled` tells what new users would change.
    """
    seeds = [_by_seed(result) for result in results]
    if len(seeds) < 2:
        return {}
    keys = [key for key in seeds[0] if all(key in seed for seed in seeds)]
    values = np.array([[seed[key][0] for key in keys] for seed in seeds])
    mean = values.mean(axis=0)
    half = student.ppf(0.975, len(seeds) - 1) * values.std(axis=0, ddof=1) / len(seeds) ** 0.5
    return {key: (float(m), float(m - h), float(m + h)) for key, m, h in zip(keys, mean, half, strict=True)}


# --- Markdown ------------------------------------------------------------------------------------
def markdown(out: Path) -> str:
    """Every table of the results in `out`: methods and pairs by study, seeds pooled; then each study by seed."""
    studies = read_studies(out)
    parts = [_commands(studies), _samples(studies)]
    for recipe in dict.fromkeys(study[0].config.recipe for study in studies):
        of_recipe = [study for study in studies if study[0].config.recipe == recipe]
        figures = {study[0].name: pooled(study) for study in of_recipe}
        parts.append(f"### {recipe}: means over seeds")
        for metric, paired in ((SUMMED[0], False), (SUMMED[1], False), (SUMMED[0], True)):
            parts.append(_table(metric, paired, {name: _of(found, metric) for name, found in figures.items()}))
        for study in of_recipe:
            if len(study) > 1:
                columns = {f"seed {one.seed}": _by_seed(one) for one in study}
                columns["all, new users"] = _of(figures[study[0].name], SUMMED[0])
                columns["all, new seeds"] = over_trainings(study)
                parts.append(f"### {study[0].name} by seed")
                parts += [_table(SUMMED[0], paired, columns) for paired in (False, True)]
            parts += [f"### {study[0].name} beside accuracy", _beside(study)]
    return "\n\n".join(parts)


def _commands(studies: Iterable[Sequence[Result]]) -> str:
    lines = [
        f"{shlex.join(result.summary['command'])}  # {result.summary['revision']}"
        for study in studies
        for result in study
    ]
    return "\n".join(["```sh", *lines, "```"])


def _samples(studies: Iterable[Sequence[Result]]) -> str:
    lines = ["| study | seeds | test samples | users | ranked |", "| --- | --- | --- | --- | --- |"]
    for study in studies:
        seeds = ", ".join(str(one.seed) for one in study)
        kept = "history excluded" if study[0].summary["headline"] == "exclude_history" else "nothing removed"
        samples, users = (
            ", ".join(dict.fromkeys(f"{one.table[key]:,}" for one in study)) for key in ("samples", "users")
        )
        lines.append(f"| {study[0].name} | {seeds} | {samples} | {users} | {kept} |")
    return "\n".join(lines)


def _by_seed(result: Result) -> dict[str, Interval]:
    methods, paired = result.table["methods"], result.table["paired"]
    found = {name: (entry["ndcg@10"], *entry["ndcg@10_ci"]) for name, entry in methods.items()}
    return found | {pair: (entry["ndcg@10"], *entry["ci"]) for pair, entry in paired.items()}


def _of(figures: dict[str, dict[str, Interval]], metric: str) -> dict[str, Interval]:
    return {key: found[metric] for key, found in figures.items()}


def _table(metric: str, paired: bool, columns: dict[str, dict[str, Interval]]) -> str:
    """Rows are the methods, or the pairs, that any column has; in the order of the table of one run."""
    keys = dict.fromkeys(key for found in columns.values() for key in found if ("-" in key) == paired)
    rows = list(keys) if paired else in_order(keys)
    heading = f"paired, {metric.upper()}" if paired else metric.upper()
    lines = [f"| {' | '.join([heading, *columns])} |", f"| {' | '.join(['---'] * (len(columns) + 1))} |"]
    for key in rows:
        cells = [_cell(found[key], paired) if key in found else "–" for found in columns.values()]
        lines.append(f"| {' | '.join([key.replace('-', ' − '), *cells])} |")
    return "\n".join(lines)


def _beside(study: Sequence[Result]) -> str:
    """NDCG@10 by kind of target (how many), and what the best ten are like: mean over seeds (least–greatest)."""
    kinds = {"cold": [one.table["cold"] for one in study]}
    kinds |= {name: [one.table["by_popularity"][name] for one in study] for name in study[0].table["by_popularity"]}
    columns = {f"{kind} ({tables[0]['samples']:,})": (SUMMED[0], tables) for kind, tables in kinds.items()}
    columns |= {name: (name, [one.table for one in study]) for name in ("coverage@10", "diversity@10")}
    lines = [f"| {' | '.join([SUMMED[0].upper(), *columns])} |", f"| {' | '.join(['---'] * (len(columns) + 1))} |"]
    for method in in_order(dict.fromkeys(name for one in study for name in one.table["methods"])):
        cells = []
        for metric, tables in columns.values():
            found = [value for table in tables if (value := table["methods"].get(method, {}).get(metric)) is not None]
            mean = sum(found) / len(found) if found else 0
            spread = f" ({_figure(min(found), False)}–{_figure(max(found), False)})" if len({*found}) > 1 else ""
            spread += f", {len(found)} of {len(study)} seeds" if 0 < len(found) < len(study) else ""
            cells.append(f"{_figure(mean, False)}{spread}" if found else "–")
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


def _cell(interval: Interval, signed: bool) -> str:
    value, low, high = (_figure(number, signed) for number in interval)
    return f"{value} [{low}, {high}]"


def _figure(number: float, signed: bool) -> str:
    """.0475 or, signed, −.0005; no sign before what rounds to 0."""
    written = f"{number:{'+' if signed else ''}.4f}".replace("0.", ".", 1).replace("-", "−")
    return written.lstrip("+−") if float(f"{number:.4f}") == 0 else written
