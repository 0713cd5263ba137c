"""The ranks of every method on every test sample, and the table that follows from them.

`ranks.parquet` is the record, `metrics.json` a summary: what of the second rests on ranks anyone can
recompute from the first; `rporec.recipes.evaluation` adds coverage, diversity and what tuning found. A
method that draws several completions for a sample has several rows for it; the metric of a sample is
the mean over its rows, the metric of a method the mean over samples, and the bootstrap draws users.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rporec.config import CONVENTIONS, Convention
from rporec.evaluation.bootstrap import RESAMPLES, Estimate, bootstrap_mean, per_user
from rporec.evaluation.ranking import hit, ndcg, ranks
from rporec.files import replacing

if TYPE_CHECKING:
    from rporec.data import Dataset

IN_WORDS = {"exclude_history": "the user's earlier items removed", "all": "nothing removed"}
CUTS = (1, 3, 5, 10, 20, 50)
METRICS = tuple(f"{name}@{k}" for name in ("ndcg", "hr") for k in CUTS)
SUMMED = ("ndcg@10", "hr@10")  # what is compared in pairs, and pooled over seeds

SCHEMA = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        pa.field("convention", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("target", pa.string(), nullable=False),  # item id
        pa.field("rank", pa.float64(), nullable=False),
    ]
)

METHOD_ORDER = (
    "popularity",
    "recent_popularity",
    "itemknn",
    "ease",
    "rules",
    "text_knn",
    "text_rules",
    "text_rules_reranked",
    "gru4rec",
    "sasrec",
    "rechead_history",
    "rechead_history_refreshed",
    "rporec_stage1",
    "rporec_stage1_sampled",
    "rporec_stage1_vote8",
    "rporec_stage1_moresft",
    "rporec_stage1_moresft_sampled",
    "rporec_stage1_moresft_frozen",
    "rporec_stage1_moresft_frozen_sampled",
    "rporec_stage1_blank",
    "rporec_stage1_shuffled",
    "rporec_stage1_rewarding",
    "rporec_stage1_rewarding_sampled",
    "rporec_stage1_refreshed",
    "rporec_stage1_refreshed_sampled",
    "rporec_stage1_refreshed_blank",
    "rporec_stage2",
    "rporec_stage2_sampled",
    "rporec_stage2_vote8",
    "rporec_stage2_blank",
    "rporec_stage2_shuffled",
    "rporec_stage2_rewarding",
    "rporec_stage2_rewarding_sampled",
    "rporec_stage2_rewarding_blank",
    "rporec_stage2_refreshed",
    "rporec_stage2_refreshed_sampled",
    "rporec_stage2_refreshed_blank",
    "rere_sft",
    "s_dpo",
    "dynamicpo",
    "napo",
    "rere",
    "teacher",
    "oracle",
)

DEFAULT_PAIRS = (
    ("rporec_stage2", "rporec_stage1"),
    ("rporec_stage2_sampled", "rporec_stage1_sampled"),
    ("rporec_stage2", "rporec_stage1_moresft"),
    ("rporec_stage2_sampled", "rporec_stage1_moresft_sampled"),
    ("rporec_stage2", "rporec_stage1_moresft_frozen"),
    ("rporec_stage2_sampled", "rporec_stage1_moresft_frozen_sampled"),
    ("rporec_stage2", "rporec_stage2_blank"),
    ("rporec_stage2", "rporec_stage2_shuffled"),
    ("rporec_stage1", "rechead_history"),
    ("rporec_stage1", "rporec_stage1_blank"),
    ("rporec_stage1", "rporec_stage1_shuffled"),
    ("rporec_stage2", "rechead_history"),
    ("rporec_stage2_rewarding", "rporec_stage1_rewarding"),
    ("rporec_stage2_rewarding_sampled", "rporec_stage1_rewarding_sampled"),
    ("rporec_stage2_rewarding", "rporec_stage2_rewarding_blank"),
    ("rporec_stage2_refreshed", "rporec_stage1_refreshed"),
    ("rporec_stage2_refreshed_sampled", "rporec_stage1_refreshed_sampled"),
    ("rporec_stage2_refreshed", "rporec_stage2_refreshed_blank"),
    ("rporec_stage2_refreshed", "rechead_history_refreshed"),
    ("rporec_stage2_vote8", "rporec_stage1_vote8"),
    ("rere", "rere_sft"),
    ("s_dpo", "rere_sft"),
    ("dynamicpo", "rere_sft"),
    ("napo", "rere_sft"),
    ("rere", "rporec_stage2"),
    ("rporec_stage2", "text_rules"),
    ("rporec_stage2_refreshed", "text_rules"),
    ("rechead_history", "text_rules"),
    ("rporec_stage2", "sasrec"),
    ("rporec_stage2_blank", "sasrec"),
    ("rporec_stage2_refreshed", "sasrec"),
    ("rporec_stage2_refreshed_blank", "sasrec"),
    ("rechead_history", "sasrec"),
    ("rporec_stage2", "text_rules_reranked"),
    ("rechead_history", "text_rules_reranked"),
    ("text_rules_reranked", "text_rules"),
    ("text_rules", "sasrec"),
    ("rporec_stage2", "popularity"),
    ("rechead_history", "popularity"),
)


def in_order(methods: Iterable[str]) -> list[str]:
    """Known methods first, as METHOD_ORDER has them, then the rest as they came."""
    place = {name: number for number, name in enumerate(METHOD_ORDER)}

    def known(name: str) -> str:
        return re.sub(r"_beams\d+$", "", re.sub(r"_vote\d+$", "_vote8", name))

    return sorted(methods, key=lambda name: place.get(known(name), len(place)))


class RankTable:
    """Ranks by (method, convention, sample), kept as Arrow; the only thing that metrics are made from."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self._parts = [SCHEMA.empty_table() if table is None else table.select(SCHEMA.names).cast(SCHEMA)]

    @property
    def table(self) -> pa.Table:
        if len(self._parts) > 1:
            self._parts = [pa.concat_tables(self._parts)]
        return self._parts[0]

    @property
    def methods(self) -> list[str]:
        """Names present, in the order of the table."""
        return in_order(pc.unique(self.table["method"]).to_pylist())

    def add(
        self, dataset: Dataset, method: str, convention: Convention, samples: np.ndarray, ranks: np.ndarray
    ) -> None:
        """Append one rank for each sample, both [B]; adding a sample again adds a completion to its mean.

        Raises ValueError when a rank is not a finite number of at least 1.
        """
        samples, ranks = np.asarray(samples, dtype=np.int64), np.asarray(ranks, dtype=np.float64)
        if samples.shape != ranks.shape:
            raise ValueError(f"{method}: {samples.shape} samples and {ranks.shape} ranks")
        if not (np.isfinite(ranks) & (ranks >= 1)).all():
            raise ValueError(f"{method}: a rank is a finite number of at least 1")
        users = np.asarray(dataset.user_ids, dtype=object)[dataset.sample_user[samples]]
        targets = np.asarray(dataset.catalog.ids, dtype=object)[dataset.targets(samples)]
        names = [[name] * len(samples) for name in (method, convention)]
        columns = [pa.array(names[0], pa.string()), pa.array(names[1], pa.string()), pa.array(users, pa.string())]
        columns += [pa.array(samples), pa.array(targets, pa.string()), pa.array(ranks)]
        self._parts.append(pa.Table.from_arrays(columns, schema=SCHEMA))

    def add_scores(
        self,
        dataset: Dataset,
        method: str,
        samples: np.ndarray,
        scores: np.ndarray,
        conventions: Collection[Convention] = CONVENTIONS,
    ) -> None:
        """Rank the targets of `samples` [B] by `scores` [B, N] in both conventions, or in one, and append the rows."""
        targets = dataset.targets(samples)
        for convention in conventions:
            places = ranks(scores, targets, dataset.excluded_of(samples, convention))
            self.add(dataset, method, convention, samples, places)

    def write(self, path: Path | str) -> None:
        """Write Parquet, all or nothing."""
        with replacing(Path(path)) as temporary:
            pq.write_table(self.table, temporary, compression="zstd")

    @classmethod
    def read(cls, path: Path | str) -> RankTable:
        return cls(pq.read_table(path))


def metrics(
    table: RankTable,
    dataset_info: dict[str, Any],
    split: str,
    seeds: Sequence[int],
    headline: Convention,
    pairs: Sequence[tuple[str, str]] = DEFAULT_PAIRS,
    *,
    cold: Collection[str] | None = None,
    strata: Mapping[str, Collection[str]] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """What `metrics.json` holds: each method's metrics with `_ci`, and paired differences, by convention.

    pairs: (A, B) for the difference A - B on the samples that both have; pairs with an absent method
    are left out. cold: ids of items unseen in training; their targets get a table of their own, and so
    do those of each of `strata` (name -> ids), under `by_popularity`.
    """
    conventions: dict[str, Any] = {}
    for convention in CONVENTIONS:
        rows = table.table.filter(pc.equal(table.table["convention"], convention))
        if len(rows):
            conventions[convention] = _summary(rows, table.methods, pairs, resamples)

            def of(ids: Collection[str], rows: pa.Table = rows) -> dict[str, Any]:
                chosen = rows.filter(pc.is_in(rows["target"], value_set=pa.array(sorted(ids), pa.string())))
                return _summary(chosen, table.methods, pairs, resamples)

            if cold is not None:
                conventions[convention]["cold"] = of(cold)
            if strata is not None:
                conventions[convention]["by_popularity"] = {name: of(ids) for name, ids in strata.items()}
    return {
        "dataset": dataset_info,
        "split": split,
        "seeds": list(seeds),
        "headline": headline,
        "conventions": conventions,
    }


def _summary(
    rows: pa.Table, methods: Sequence[str], pairs: Sequence[tuple[str, str]], resamples: int
) -> dict[str, Any]:
    """Metrics and paired differences of one convention, from one set of resamples."""
    by_method, users = _sample_values(rows)
    present = [m for m in methods if m in by_method]
    compared = [(a, b) for a, b in pairs if a in by_method and b in by_method]
    compared = [(a, b) for a, b in compared if not np.isnan(by_method[a] - by_method[b]).all()]
    blocks = [by_method[m] for m in present] + [by_method[a] - by_method[b] for a, b in compared]
    columns = np.concatenate(blocks, axis=1) if blocks else np.zeros((0, 0))
    estimate = bootstrap_mean(columns, users, resamples=resamples)
    block = {key: i * len(METRICS) for i, key in enumerate([*present, *compared])}
    return {
        "samples": len(users),
        "users": len(np.unique(users)),
        "methods": {m: _method_entry(estimate, block[m], int((~np.isnan(by_method[m][:, 0])).sum())) for m in present},
        "paired": {f"{a}-{b}": _paired_entry(estimate, block[a, b]) for a, b in compared},
    }


def _sample_values(rows: pa.Table) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(by method the METRICS of each sample [n, metrics], NaN where it lacks one; the user of each sample [n])."""
    names, method = np.unique(np.asarray(rows["method"]).astype(str), return_inverse=True)
    samples, first, sample = np.unique(np.asarray(rows["sample"]), return_index=True, return_inverse=True)
    at = np.asarray(rows["rank"])
    row_values = np.stack([f(at, k) for f in (ndcg, hit) for k in CUTS], axis=1)  # [rows, metrics]
    cell = method * len(samples) + sample
    sizes = np.bincount(cell, minlength=len(names) * len(samples))
    with np.errstate(invalid="ignore"):  # 0 / 0
        cells = [np.bincount(cell, weights=v, minlength=len(sizes)) / sizes for v in row_values.T]
    values = np.stack(cells, axis=1).reshape(len(names), len(samples), len(METRICS))
    return dict(zip(names.tolist(), values, strict=True)), np.asarray(rows["user_id"]).astype(str)[first]


def _method_entry(estimate: Estimate, start: int, samples: int) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for i, metric in enumerate(METRICS, start):
        entry[metric] = float(estimate.value[i])
        entry[f"{metric}_ci"] = [float(estimate.low[i]), float(estimate.high[i])]
    return entry | {"samples": samples}


def _paired_entry(estimate: Estimate, start: int) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for metric, interval in (("ndcg@10", "ci"), ("hr@10", "hr@10_ci")):
        i = start + METRICS.index(metric)
        entry[metric] = float(estimate.value[i])
        entry[interval] = [float(estimate.low[i]), float(estimate.high[i])]
    return entry


def user_sums(table: RankTable, convention: Convention) -> pa.Table:
    """One row a method and user: `samples`, and the sums of its NDCG@10 and HR@10 over them.

    As much as means, paired differences and the bootstrap over users need of the ranks.
    """
    by_method, users = _sample_values(table.table.filter(pc.equal(table.table["convention"], convention)))
    labels, owner = np.unique(users, return_inverse=True)
    parts = []
    for name in filter(by_method.__contains__, table.methods):
        values = by_method[name][:, [METRICS.index(metric) for metric in SUMMED]]
        present = ~np.isnan(values[:, :1])
        counts, sums = (per_user(v, owner, len(labels)) for v in (present.astype(float), np.nan_to_num(values)))
        columns = [pa.array([name] * len(labels)), pa.array(labels), pa.array(counts[:, 0].astype(np.int32))]
        parts.append(
            pa.Table.from_arrays([*columns, *map(pa.array, sums.T)], ["method", "user_id", "samples", *SUMMED])
        )
    return pa.concat_tables(parts)
