"""Folders that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rporec.data.errors import DataError
from rporec.files import replacing

Progress = Callable[[str, int, int | None], None]  # stage, done, total if known


def silent(stage: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""


def check_free(out: Path) -> None:
    """Raise DataError unless `out` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not empty; choose another folder or delete it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` when the block ends, and vanishes when it fails."""
    check_free(out)
    with replacing(out) as partial:
        partial.mkdir()
        yield partial
        check_free(out)  # what has come there meanwhile is not to be replaced
