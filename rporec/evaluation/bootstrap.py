"""Intervals for means over samples when the samples of one user are not independent.

The percentile bootstrap (Efron and Tibshirani 1993, ch. 13) over clusters: users are drawn with
replacement, each with all its samples, and the mean is taken over the samples drawn. Only per-user
sums and counts matter, so a resample is one row of integer weights and all of them are one matrix
product, whatever the number of metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95  # of an interval
CHUNK_WEIGHTS = 4_000_000  # user weights held at once, 8 bytes each


@dataclass(frozen=True)
class Estimate:
    """Means over samples with their intervals; each [M], NaN for a column without a value."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_mean(values: np.ndarray, users: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of each column of `values` over samples, and its percentile interval over users.

    values: [n, M] or [n]; NaN marks a sample that a column lacks. users: [n], any labels.
    All columns see the same resamples, so the difference of two methods is simply another column.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    labels, owner = np.unique(np.asarray(users), return_inverse=True)
    if len(owner) != len(values):
        raise ValueError(f"bootstrap_mean: {len(values)} samples and {len(owner)} user labels")
    present = ~np.isnan(values)
    sums = per_user(np.where(present, values, 0.0), owner, len(labels))
    counts = per_user((present[:, :1] if present.all() else present).astype(np.float64), owner, len(labels))
    value, draws = _means(sums, counts, resamples, seed)
    return Estimate(value, *_percentiles(draws))


def pooled_mean(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """The mean over S trainings of each one's mean over samples, and its percentile interval over users.

    sums: [users, S, M], of M values over a user's samples in each training; counts: [users, S], those samples. A user
    who is drawn is drawn in all trainings, so what these have in common stays in the interval; what other
    seeds would give does not enter it. With one training the same as `bootstrap_mean`.
    """
    users, trainings, columns = sums.shape
    value, draws = _means(sums.reshape(users, -1), np.repeat(counts, columns, axis=1), RESAMPLES, 0)
    pooled = draws.reshape(RESAMPLES, trainings, columns).mean(axis=1)
    return Estimate(value.reshape(trainings, columns).mean(axis=0), *_percentiles(pooled))


def _means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(means [M], means of every resample [resamples, M]) of per-user sums [users, M], counts [users, M or 1]."""
    draws = np.empty((resamples, sums.shape[1]))
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_WEIGHTS // max(len(sums), 1))
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may miss every user of a column: NaN
        for start in range(0, resamples, step):
            weights = _resample(rng, min(step, resamples - start), len(sums))
            draws[start : start + step] = (weights @ sums) / (weights @ counts)
        return sums.sum(axis=0) / counts.sum(axis=0), draws


def per_user(values: np.ndarray, owner: np.ndarray, users: int) -> np.ndarray:
    """Sums of each column of `values` [n, M] over the rows of each user, [users, M]; owner: user numbers [n]."""
    columns = [np.bincount(owner, weights=column, minlength=users) for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((users, 0))


def _resample(rng: np.random.Generator, draws: int, users: int) -> np.ndarray:
    """How often each user is drawn: rows of a uniform multinomial, float64 [draws, users]."""
    if users == 0:
        return np.zeros((draws, 0))
    chosen = rng.integers(users, size=(draws, users)) + np.arange(draws)[:, None] * users
    return np.bincount(chosen.ravel(), minlength=draws * users).reshape(draws, users).astype(np.float64)


def _percentiles(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(draws.shape[1], np.nan), np.full(draws.shape[1], np.nan)
    known = ~np.isnan(draws).all(axis=0)
    if known.any():
        tail = 100 * (1 - LEVEL) / 2
        columns = draws[:, known]
        percentile = np.nanpercentile if np.isnan(columns).any() else np.percentile
        low[known], high[known] = percentile(columns, [tail, 100 - tail], axis=0)
    return low, high
