"""What users did after a recommendation: a folder of small Parquet parts that `rporec data build` reads.

Many processes may append at once; a part is written whole under a name of its own, or not at all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rporec.files import FolderWatch, replacing

# Events by which a user did not choose an item: as a next one to predict it would teach what was refused or only shown.
NO_CHOICE = ("dislike", "impression")

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),  # seconds since 1970
        pa.field("event", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Reaction:
    """One event of one user; `event` is a word such as click, like, dislike, purchase."""

    user_id: str
    item_id: str
    timestamp: int
    event: str


class FeedbackLog:
    """The parts of one folder, those of other processes included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[str] = set()
        self._watch = FolderWatch(folder)

    def append(self, reactions: Sequence[Reaction]) -> None:
        """Write one part; when this returns the events are on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([vars(reaction) for reaction in reactions], schema=SCHEMA)
        with replacing(self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def news(self) -> list[Reaction]:
        """The events of parts that this object has not returned yet, in the order of the parts."""
        if not self._watch.changed():
            return []
        parts = sorted(path for path in self.folder.glob("*.parquet") if path.name not in self._read)
        found = [Reaction(**row) for path in parts for row in pq.read_table(path, schema=SCHEMA).to_pylist()]
        self._read.update(path.name for path in parts)
        return found
