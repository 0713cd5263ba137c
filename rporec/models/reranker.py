"""A small network over the candidates of the experts: what the best of them says, given all the others.

A sum of experts weighs each of them alike for every user and item. This sees which of them speak, how old
and how common an item is, and what the history is made of. It is stacked (Wolpert 1992): it learns from
samples that come after everything the experts were counted on, as those it is asked about do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from rporec.config import ConfigError
from rporec.data.slices import evenly_spread, rows_of
from rporec.models.head_inputs import HeadInputs
from rporec.models.transitions import newest, ones

if TYPE_CHECKING:
    from rporec.data import Dataset
    from rporec.models.experts import Experts

CANDIDATES = 20  # best items of each of `RANKED` per sample, and what equals the last of them
RANKED = (
    "rules",
    "rules_linear",
    "rules_newest",
    "successor",
    "text_knn",
    "text_newest",
    "popularity_fast",
    "popularity",
)
NEAR = 3  # newest history items of `rules_newest`
FAR = 10  # newest history items that `text_nearest` looks at
DAY = 86_400.0
CLIP = 6.0  # standard deviations that a feature counts for
SPAN = 10.0  # a candidate e^SPAN times less likely than the best says 0
PARTS = 8  # of the samples, in time order; the experts of a part are counted on those before it
FIRST = 4  # the first part that is learned from
ROWS = 8000  # samples of a part that are learned from, evenly spread
WIDTH = 32
EPOCHS = 12
BATCH = 64
RATE = 3e-3
CHUNK = 512  # samples whose features are made at once


@dataclass(frozen=True)
class Candidates:
    """M pairs of a sample and an item, by sample and then by item."""

    rows: np.ndarray  # int [M], ascending
    items: np.ndarray  # int [M]
    features: np.ndarray  # float32 [M, F]


@dataclass(frozen=True)
class Reranker:
    """Two hidden layers beside a linear one; knows features and no items, so that a catalogue may grow."""

    parameters: dict[str, np.ndarray]  # float32

    def apply(self, experts: Experts, inputs: HeadInputs, sparse: Mapping[str, sp.csr_matrix]) -> sp.csr_matrix:
        """float32 [B, N]: 1 for the likeliest candidate, 1 / SPAN less per nat behind it; sparse: see `candidates`."""
        found = candidates(experts, inputs, sparse)
        logits = self._logits(found.features)
        best = np.full(len(inputs), -np.inf, np.float32)
        np.maximum.at(best, found.rows, logits)
        values = np.maximum(1 + (logits - best[found.rows]) / np.float32(SPAN), 0)
        shape = (len(inputs), experts.rules.shape[0])
        return sp.csr_matrix((values.astype(np.float32), (found.rows, found.items)), shape)

    def _logits(self, features: np.ndarray) -> np.ndarray:
        p = self.parameters
        x = _standardised(features, p["mean"], p["deviation"])
        hidden = np.maximum(x @ p["0.weight"].T + p["0.bias"], 0)
        hidden = np.maximum(hidden @ p["1.weight"].T + p["1.bias"], 0)
        return x @ p["linear"] + hidden @ p["2.weight"]

    @classmethod
    def fit(cls, dataset: Dataset, samples: np.ndarray, experts: Experts, *, seed: int = 0) -> Reranker:
        """Learn from the later parts of `samples`, each with experts that were counted on the parts before it.

        experts: of the same data set, counted on anything. Cross entropy over a sample's candidates; samples
        whose target is none of them teach nothing. Raises ConfigError where none is left. Deterministic.
        """
        parts = np.array_split(np.sort(samples), PARTS)
        pieces, targets, counts = [], [], []
        for number in range(FIRST, PARTS):
            before = experts.refitted(dataset, rows_of(dataset, np.concatenate(parts[:number])))
            asked = parts[number][evenly_spread(len(parts[number]), ROWS)]
            for start in range(0, len(asked), CHUNK):
                chunk = asked[start : start + CHUNK]
                inputs = HeadInputs.of(dataset, chunk)
                found = candidates(before, inputs, before.sparse(inputs))
                hit = found.items == dataset.targets(chunk)[found.rows]
                kept = np.isin(found.rows, found.rows[hit])
                _, sizes = np.unique(found.rows[kept], return_counts=True)
                pieces.append(found.features[kept])
                targets.append(np.flatnonzero(hit[kept]) - (np.cumsum(sizes) - sizes))
                counts.append(sizes)
        if not sum(map(len, targets)):
            raise ConfigError(
                f"head.reranker: none of {len(samples)} samples has its target among the experts' candidates; "
                "bring more interactions or leave it out"
            )
        return cls(_trained(np.concatenate(pieces), np.concatenate(counts), np.concatenate(targets), seed))


def _standardised(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return np.clip((features - mean) / deviation, -CLIP, CLIP)


def _trained(features: np.ndarray, counts: np.ndarray, targets: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Parameters learned from S samples; features: [M, F], counts: candidates of each [S], targets: which of them [S]."""
    import torch
    from torch import nn

    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation = features.std(axis=0, dtype=np.float64).astype(np.float32)
    deviation[deviation < 1e-6] = 1
    x = torch.from_numpy(_standardised(features, mean, deviation))
    starts = np.cumsum(counts) - counts
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = nn.ModuleList([nn.Linear(x.shape[1], WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1, bias=False)])
        linear = nn.Linear(x.shape[1], 1, bias=False)
        learned = [*deep.parameters(), *linear.parameters()]
        optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=1e-4)
        steps = EPOCHS * -(-len(counts) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
        for _ in range(EPOCHS):
            order = rng.permutation(len(counts))
            for batch in (order[at : at + BATCH] for at in range(0, len(order), BATCH)):
                sizes = counts[batch]
                row = np.repeat(np.arange(len(batch)), sizes)
                place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
                given = x[torch.from_numpy(starts[batch][row] + place)]
                hidden = nn.functional.dropout(torch.relu(deep[0](given)), 0.1)
                flat = linear(given) + deep[2](torch.relu(deep[1](hidden)))
                logits = torch.full((len(batch), int(sizes.max())), -torch.inf)
                logits[torch.from_numpy(row), torch.from_numpy(place)] = flat.squeeze(1)
                loss = nn.functional.cross_entropy(logits, torch.from_numpy(targets[batch]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    result = {name: value.detach().numpy().copy() for name, value in deep.named_parameters()}
    result["2.weight"] = result["2.weight"][0]
    return result | {"linear": linear.weight.detach().numpy()[0].copy(), "mean": mean, "deviation": deviation}


def candidates(experts: Experts, inputs: HeadInputs, sparse: Mapping[str, sp.csr_matrix]) -> Candidates:
    """The items that at least one expert ranks high, and what is known of each.

    sparse: what the experts that are silent about most items say, name -> [B, N].
    """
    shared, which = experts.shared(inputs.time)
    parts = {
        **sparse,
        "rules_newest": experts.linear_rules(inputs, NEAR),
        "successor": newest(inputs.seen, experts.rules.shape[0], 1) @ experts.successors,
        "text_nearest": _nearest(experts, inputs),
    }
    rows, items = _chosen(parts, shared, which, experts.rules.shape[0])
    values = {name: np.asarray(part[rows, items], np.float32).ravel() for name, part in parts.items()}
    values |= {name: table[which[rows], items] for name, table in shared.items()}
    count, first, last = experts.lifetimes
    now = inputs.time.astype(np.float64)
    recent = newest(inputs.seen, len(count))
    there = np.diff(recent.indptr) > 0
    past = {
        "length": np.log1p([len(one) for one in inputs.seen]),
        "past_age": np.where(there, _days(now - recent @ first), 0),
        "past_count": recent @ np.log1p(count),
        "behind": _days(now - experts.end),
    }
    values |= {
        **{f"rank_{name}": _ranks(values[name], rows) for name in RANKED},
        "count": np.log1p(count[items]),
        "age": _days(now[rows] - first[items]),
        "idle": _days(now[rows] - last[items]),
        **{name: value[rows] for name, value in past.items()},
    }
    features = np.stack([np.asarray(values[name], np.float32) for name in sorted(values)], axis=1)
    return Candidates(rows, items, features)


def _days(seconds: np.ndarray) -> np.ndarray:
    return np.log1p(np.maximum(seconds, 0) / DAY)


def _nearest(experts: Experts, inputs: HeadInputs) -> sp.csr_matrix:
    """float32 [B, N]: cosine of the text with the nearest of the `FAR` newest history items."""
    size = experts.rules.shape[0]
    result = sp.csr_matrix((len(inputs), size), dtype=np.float32)
    for place in range(1, FAR + 1):
        item = ones([one[-place : len(one) - place + 1] if len(one) >= place else one[:0] for one in inputs.seen], size)
        result = result.maximum(item @ experts.neighbours)
    return result


def _chosen(
    parts: Mapping[str, sp.csr_matrix], shared: Mapping[str, np.ndarray], which: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, items) of the candidates, by row and then by item."""
    found = []
    for name in RANKED:
        if name in shared:
            past, item = _best_of(sp.csr_matrix(shared[name]))
            counts = np.bincount(past, minlength=len(shared[name]))
            starts = np.cumsum(counts) - counts
            row = np.repeat(np.arange(len(which)), counts[which])
            place = np.arange(len(row)) - np.repeat(np.cumsum(counts[which]) - counts[which], counts[which])
            found.append(row * size + item[starts[which[row]] + place])
        else:
            row, item = _best_of(parts[name])
            found.append(row.astype(np.int64) * size + item)
    return np.divmod(np.unique(np.concatenate(found)), size)


def _best_of(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the `CANDIDATES` largest of each row above 0, and of what equals the last of them."""
    threshold = np.zeros(matrix.shape[0], np.float32)
    for row, (start, end) in enumerate(pairwise(matrix.indptr)):
        if end - start > CANDIDATES:
            last = end - start - CANDIDATES
            threshold[row] = np.partition(matrix.data[start:end], last)[last]
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    chosen = (matrix.data >= threshold[rows]) & (matrix.data > 0)
    return rows[chosen], matrix.indices[chosen]


def _ranks(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """ln(1 + how many candidates of the same row have more), float32; rows: ascending."""
    order = np.lexsort((-values, rows))
    row, value = rows[order], values[order]
    place = np.arange(len(order))
    begins = np.ones(len(order), bool)
    begins[1:] = row[1:] != row[:-1]
    changes = begins.copy()
    changes[1:] |= value[1:] != value[:-1]
    above = np.maximum.accumulate(np.where(changes, place, 0)) - np.maximum.accumulate(np.where(begins, place, 0))
    result = np.empty(len(order), np.float32)
    result[order] = np.log1p(above)
    return result
