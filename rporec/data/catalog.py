"""The items: one Arrow table whose row order is the item index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rporec.config import first_line
from rporec.data.errors import DataError, at

BLANK = ("", "None")  # texts that say nothing; exports write a missing value as the word None


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items with their attributes; `table` has `item_id` (distinct strings) and whatever columns the user brought.

    Texts are stripped; "", "None" and null are blank. An item is named by its row, 0 <= item < len(catalog).
    """

    table: pa.Table

    @cached_property
    def ids(self) -> list[str]:
        """item_id by item."""
        return self.table.column("item_id").to_pylist()

    @cached_property
    def index(self) -> dict[str, int]:
        """item by item_id."""
        return {item_id: item for item, item_id in enumerate(self.ids)}

    @cached_property
    def text_columns(self) -> list[str]:
        """String columns, other than item_id, in which at least one item is not blank; title first."""
        names = [
            field.name
            for field in self.table.schema
            if field.name != "item_id" and _is_text(field.type) and any(self._texts(field.name))
        ]
        return sorted(names, key=lambda name: name != "title")

    def __len__(self) -> int:
        return self.table.num_rows

    def value(self, column: str, item: int) -> str:
        """The text of one attribute, "" when blank; KeyError when there is no such column."""
        return self._texts(column)[item]

    def title(self, item: int) -> str:
        """The title, or the item_id where the catalogue has no title for it."""
        title = self.value("title", item) if "title" in self.table.column_names else ""
        return title or self.ids[item]

    def text(self, item: int) -> str:
        """All text columns that are not blank, title first, joined by " | "; the item_id where there are none."""
        texts = [self._texts(column)[item] for column in self.text_columns]
        return " | ".join(text for text in texts if text) or self.ids[item]

    def texts(self) -> list[str]:
        """`text` of every item."""
        return [self.text(item) for item in range(len(self))]

    def begins_with(self, other: Catalog) -> bool:
        """Whether the first items are those of `other`, in its order."""
        ids = other.table.column("item_id")
        return self.table.column("item_id").slice(0, len(ids)).equals(ids)

    @classmethod
    def read(cls, path: Path | str) -> Catalog:
        """Read what `write` wrote. Raises DataError when the file is not a catalogue."""
        path = Path(path)
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; build the data set again") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: no readable Parquet file ({first_line(error)}); build it again") from None
        if "item_id" not in table.column_names:
            raise DataError(f"{at(path, 'item_id')}: missing; this is no catalogue")
        return cls(table)

    def write(self, path: Path | str) -> None:
        """Write one Parquet file."""
        pq.write_table(self.table, path, compression="zstd")

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        return {}

    def _texts(self, column: str) -> list[str]:
        """Stripped texts of a column, "" when blank; made at the first use, for catalogues have wide rows."""
        if column not in self._columns:
            values = self.table.column(column).to_pylist()
            texts = ["" if value is None else str(value).strip() for value in values]
            self._columns[column] = ["" if text in BLANK else text for text in texts]
        return self._columns[column]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
