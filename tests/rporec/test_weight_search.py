"""The search for scalars finds what helps and drops what does not."""

from __future__ import annotations

import numpy as np
import pytest

from rporec.models.weight_search import search_weights


def test_search_takes_the_signal_and_drops_noise() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 50, 400)
    signal = rng.normal(size=(400, 50)).astype(np.float32)
    signal[np.arange(400), targets] += 2
    harm = -signal + rng.normal(size=signal.shape).astype(np.float32)
    weights, value = search_weights({"harm": harm, "signal": signal, "nothing": np.zeros_like(signal)}, targets)
    assert weights["signal"] == 1
    assert weights["harm"] == 0
    assert weights["nothing"] == 0
    assert value > 0.5


def test_search_joins_two_halves_whatever_their_units() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 60, 600)
    parts = {name: rng.normal(size=(600, 60)).astype(np.float32) for name in ("left", "right")}
    for part in parts.values():
        part[np.arange(600), targets] += 1.5
    alone = {name: search_weights({name: part}, targets)[1] for name, part in parts.items()}
    weights, both = search_weights({"left": parts["left"], "right": 1000 * parts["right"]}, targets)
    assert both > max(alone.values()) + 0.05
    assert 0.3 < weights["left"] / (1000 * weights["right"]) < 3


def test_search_leaves_excluded_items_out() -> None:
    targets = np.arange(20)
    scores = np.zeros((20, 40), np.float32)
    scores[:, 30:] = 2  # all of them excluded
    scores[np.arange(20), targets] = 1
    value = search_weights({"only": scores}, targets, [np.arange(30, 40)] * 20)[1]
    assert value == pytest.approx(1)


def test_search_is_deterministic() -> None:
    rng = np.random.default_rng(2)
    parts = {name: rng.normal(size=(100, 30)).astype(np.float32) for name in "abc"}
    targets = rng.integers(0, 30, 100)
    assert search_weights(parts, targets) == search_weights(parts, targets)
