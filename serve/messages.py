"""What the deployments send each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Query:
    """What to rank for: indices of items, oldest first, and a completion that `version` wrote, if any did."""

    history: np.ndarray  # int64
    time: int  # seconds since 1970
    k: int
    excluded: np.ndarray  # int64
    filters: Mapping[str, list[str]]
    items: int  # the catalogue that the indices are of has as many
    text: str | None = None
    version: str | None = None  # None: the one in use


@dataclass(frozen=True)
class Ranked:
    """Best first."""

    items: list[int]
    scores: list[float]
    version: str


@dataclass(frozen=True)
class Thought:
    """A completion and the version that wrote all of it."""

    text: str
    version: str
