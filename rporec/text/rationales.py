"""Stored rationales: Parquet shards that say where each text came from.

A shard appears whole or not at all and is named by its content, so a teacher that was interrupted goes on
with the samples that `done_samples` lacks, and writing a shard twice changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import rporec
from rporec.files import replacing

SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_hash", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Rationale:
    """One teacher completion of one training sample, with its provenance."""

    sample: int
    text: str | None  # None: the teacher wrote nothing usable
    teacher: str  # template | backbone | openai
    model: str  # name of the model that wrote it
    prompt_hash: str  # `hash_prompt` of what the teacher was asked; "" without a prompt
    version: str = rporec.__version__


def hash_prompt(prompt: str | Sequence[int]) -> str:
    """16 hexadecimal digits that identify a prompt, text or token ids."""
    data = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def write_shard(folder: Path | str, rationales: Iterable[Rationale]) -> Path | None:
    """Add rationales to the store as one file; returns its path, None if there were none."""
    rows = sorted((asdict(rationale) for rationale in rationales), key=lambda row: row["sample"])
    if not rows:
        return None
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    content = hashlib.sha256(repr(rows).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = Path(folder) / f"shard-{rows[0]['sample']:09d}-{content}.parquet"
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
    return path


def done_samples(folder: Path | str) -> set[int]:
    """Samples that the store holds, unusable ones included; empty if there is no store."""
    done: set[int] = set()
    for path in _shards(folder):
        done.update(pq.read_table(path, columns=["sample"])["sample"].to_pylist())
    return done


def read_rationales(folder: Path | str) -> list[Rationale]:
    """The usable rationales, sorted by sample, one per sample (the first shard's, by name)."""
    found: dict[int, Rationale] = {}
    for path in _shards(folder):
        for row in pq.read_table(path, schema=SCHEMA).to_pylist():
            if row["text"] is not None:
                found.setdefault(row["sample"], Rationale(**row))
    return [found[sample] for sample in sorted(found)]


def _shards(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("shard-*.parquet"))
