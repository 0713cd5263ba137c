"""Completions on disk: Parquet shards, each written whole, which a restart keeps.

A shard is the unit of work and of resumption: its prompts and its seed follow from its number alone,
so which worker writes it, and in which attempt, does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rporec.config import ConfigError
from rporec.engine.types import ItemSpec, Spec
from rporec.files import replacing

SHARD = 128  # prompts

SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("index", pa.int16(), nullable=False),  # of the completion among those of its sample
        pa.field("text", pa.string(), nullable=False),
        pa.field("item", pa.int64()),  # of the catalogue; null for free text
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Part:
    """Completions that belong together: one prompt a sample, `spec.n` completions a prompt.

    exclude: the items that must not come out for a sample, where `spec` finds items.
    """

    folder: Path
    samples: np.ndarray  # int64 [n]
    spec: Spec
    exclude: Callable[[int], tuple[int, ...]] | None = None

    @property
    def shards(self) -> int:
        return -(-len(self.samples) // SHARD)

    def shard(self, number: int) -> np.ndarray:
        """Samples of one shard."""
        return self.samples[number * SHARD : (number + 1) * SHARD]

    def specs(self, number: int) -> list[Spec]:
        """Of each sample of a shard, seeds one after the other."""
        first = self.spec.seed * 1_000_003 + number * SHARD
        return [self._spec(sample, first + at) for at, sample in enumerate(self.shard(number).tolist())]

    def _spec(self, sample: int, seed: int) -> Spec:
        if isinstance(self.spec, ItemSpec) and self.exclude is not None:
            return replace(self.spec, seed=seed, exclude=self.exclude(sample))
        return replace(self.spec, seed=seed)

    def missing(self) -> list[int]:
        return [number for number in range(self.shards) if not self._path(number).exists()]

    def write(self, number: int, rows: Sequence[Sequence[dict[str, Any]]]) -> int:
        """Write one shard; `rows[i]` are the completions of its i-th sample. Returns their tokens."""
        flat = [
            {
                "sample": int(sample),
                "index": index,
                "text": one["text"],
                "item": one["item"],
                "tokens": len(one["token_ids"]),
                "finish_reason": one["finish_reason"],
            }
            for sample, completions in zip(self.shard(number), rows, strict=True)
            for index, one in enumerate(completions)
        ]
        with replacing(self._path(number)) as temporary:
            pq.write_table(pa.Table.from_pylist(flat, schema=SCHEMA), temporary)
        return sum(row["tokens"] for row in flat)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.parquet"


def read_completions(folder: Path) -> tuple[np.ndarray, list[str]]:
    """(sample numbers, texts) of all completions of a part, in the order in which they were asked for.

    Raises ConfigError when nothing was written there.
    """
    table = _read(folder)
    return table["sample"].to_numpy(), table["text"].to_pylist()


def read_items(folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """(sample numbers, the items found for each, best first) of a part; errors as of `read_completions`."""
    table = _read(folder)
    samples = table["sample"].to_numpy()
    first = np.flatnonzero(table["index"].to_numpy() == 0)
    return samples[first], np.split(table["item"].to_numpy(), first[1:])


def _read(folder: Path) -> pa.Table:
    paths = sorted(folder.glob("shard-*.parquet"))
    if not paths:
        raise ConfigError(f"{folder}: no completions here; train the stage that writes them (--resume)")
    return pa.concat_tables([pq.read_table(path) for path in paths])
