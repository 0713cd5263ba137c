"""The one exception of `rporec.data`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """Data that cannot be used; the message is one line: file, row, column, what is wrong, the way out."""


def at(path: Path, column: str | None = None, row: int | None = None) -> str:
    """Where a fault lies, as messages say it: `file: row 3, column 'x'`; rows are data rows and count from 1."""
    place = [f"row {row}"] if row is not None else []
    place += [f"column {column!r}"] if column is not None else []
    return f"{path}: {', '.join(place)}" if place else f"{path}"


@dataclass(frozen=True)
class Origin:
    """Where the rows of a batch came from: row i of the batch is data row `rows[i]` (from 1) of `path`."""

    path: Path
    rows: Sequence[int] | np.ndarray

    def at(self, column: str | None, row: int) -> str:
        """`at` for row `row` of the batch, which counts from 0."""
        return at(self.path, column, int(self.rows[row]))


def locate(origins: Sequence[Origin], row: int, column: str | None = None) -> str:
    """`at` for row `row`, from 0, of all batches behind one another."""
    for origin in origins:
        if row < len(origin.rows):
            return origin.at(column, row)
        row -= len(origin.rows)
    raise IndexError(row)
