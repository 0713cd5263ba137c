"""The one exception of `rporec.data`."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used; the message is one line: file, row, column, what is wrong, the way out."""


def at(path: Path, column: str | None = None, row: int | None = None) -> str:
    """Where a fault lies, as messages say it: `file: row 3, column 'x'`; rows are data rows and count from 1."""
    place = [f"row {row}"] if row is not None else []
    place += [f"column {column!r}"] if column is not None else []
    return f"{path}: {', '.join(place)}" if place else f"{path}"
