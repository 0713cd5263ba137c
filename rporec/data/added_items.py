"""Items that were added to a catalogue while it served: a folder of numbered Parquet files, one for each item.

The number is the item's place behind the catalogue, the same in every process that reads the folder.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rporec.data.catalog import Catalog
from rporec.data.errors import DataError
from rporec.files import FolderWatch, sync


class GrowingCatalog:
    """A catalogue and what was added to it, by whichever process. `catalog` is as of the last `refresh`."""

    def __init__(self, base: Catalog, folder: Path) -> None:
        self.base, self.folder, self.catalog = base, folder, base
        self._watch = FolderWatch(folder)
        self._reading = threading.Lock()
        self.refresh()

    def refresh(self) -> bool:
        """Read what was added since; True when there was something. One `stat` when there was not."""
        with self._reading:  # threads that append the same item each would shift all later ones
            return self._watch.changed() and self._read()

    def _read_now(self) -> bool:
        with self._reading:
            return self._read()

    def _read(self) -> bool:
        added = len(self.catalog) - len(self.base)
        new: list[pa.Table] = []
        while (path := self._path(added + len(new))).exists():
            new.append(pq.read_table(path, schema=self.base.table.schema))
        if new:
            self.catalog = Catalog(pa.concat_tables([self.catalog.table, *new]))
        return bool(new)

    def add(self, item_id: str, attributes: Mapping[str, str]) -> int:
        """Add one item for good; returns its index.

        Raises DataError for an item_id that is blank or there, and for an attribute that is no text column.
        """
        if not item_id.strip():  # `rporec data build` refuses it
            raise DataError("item_id: empty; give the item an id")
        schema = self.base.table.schema
        texts = {
            field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        }
        if unknown := sorted(set(attributes) - texts | set(attributes) & {"item_id"}):
            known = ", ".join(sorted(texts - {"item_id"})) or "none"
            raise DataError(f"attributes: the catalogue has no text column {unknown[0]!r}; it has {known}")
        row = {field.name: attributes.get(field.name) for field in schema} | {"item_id": item_id}
        table = pa.Table.from_pylist([row], schema=schema)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        pq.write_table(table, temporary, compression="zstd")
        try:
            sync(temporary)
            while True:
                self._read_now()
                if item_id in self.catalog.index:
                    raise DataError(f"item_id: {item_id!r} is in the catalogue already")
                place = len(self.catalog) - len(self.base)
                try:
                    os.link(temporary, self._path(place))  # fails where another process was quicker
                except FileExistsError:
                    continue
                sync(self.folder)
                self._read_now()
                return len(self.base) + place
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, place: int) -> Path:
        return self.folder / f"{place:08d}.parquet"
