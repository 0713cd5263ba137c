"""The numbers of steps.jsonl as TensorBoard scalars, for those who look there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Scalars:
    """One event file in `folder`; nested records become `outer/inner`."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in _flat(record):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
