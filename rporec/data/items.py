"""The items of all sources as one catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rporec.data.catalog import Catalog
from rporec.data.columns import IdColumn
from rporec.data.errors import DataError, Origin, at, locate
from rporec.data.sources import read_items


def read_catalog(files: Sequence[Path]) -> Catalog:
    """The items of all files as one catalogue, in the order of the files; columns united by name, missing ones null.

    Dictionary columns are decoded, `item_id` turned into strings. Raises DataError for an empty item_id, one that
    stands twice (in two files: with other attributes), a column of two types, and for fewer than two items.
    """
    tables = [_read_items(file) for file in files]
    origins = [Origin(file, range(1, len(table) + 1)) for file, table in zip(files, tables, strict=True)]
    types: dict[str, tuple[pa.DataType, Path]] = {}
    for file, table in zip(files, tables, strict=True):
        for field in table.schema:
            known, where = types.get(field.name, (pa.null(), file))
            if known != field.type and not pa.types.is_null(known) and not pa.types.is_null(field.type):
                raise DataError(f"{at(file, field.name)}: {field.type}, but {known} in {where}; write both as one type")
            if pa.types.is_null(known):
                types[field.name] = field.type, file
    table = pa.concat_tables(tables, promote_options="default")
    if len(files) > 1:
        table = _without_copies(table, origins)
    if len(table) < 2:
        names = ", ".join(map(str, files))
        raise DataError(f"{names}: {len(table)} item; a catalogue needs at least two to rank")
    return Catalog(table)


def _read_items(file: Path) -> pa.Table:
    table = read_items(file)
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
            kind = pa.string()
        if kind != field.type:
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    ids = IdColumn("item_id")
    origin = Origin(file, range(1, len(table) + 1))
    ids.add(table.column("item_id").combine_chunks(), origin)
    codes, values = ids.finish()
    if len(values) < len(codes):
        row = int(np.setdiff1d(np.arange(len(codes)), np.unique(codes, return_index=True)[1])[0])
        item_id = values[codes[row]].as_py()
        raise DataError(f"{origin.at('item_id', row)}: {item_id!r} stands there twice; keep one row per item")
    place = table.column_names.index("item_id")
    return table.set_column(place, "item_id", values.take(pa.array(codes)))


def _without_copies(table: pa.Table, origins: Sequence[Origin]) -> pa.Table:
    """Each item once, where it stands first. Raises DataError where two rows of an item differ."""
    codes = table.column("item_id").combine_chunks().dictionary_encode().indices.to_numpy()
    kept = np.unique(codes, return_index=True)[1]  # ascending, for codes count from the first row on
    copies = np.setdiff1d(np.arange(len(codes)), kept)
    copied, originals = table.take(copies), table.take(kept[codes[copies]])
    if not copied.equals(originals):
        for copy, row, original in zip(copies, copied.to_pylist(), originals.to_pylist(), strict=True):
            if repr(row) != repr(original):  # as text, for NaN is not equal to itself
                differing = next(name for name in row if repr(row[name]) != repr(original[name]))
                raise DataError(
                    f"{locate(origins, int(copy), differing)}: {row['item_id']!r} differs from "
                    f"{locate(origins, int(kept[codes[copy]]))}; make them equal or drop one"
                )
    return table.take(kept) if len(copies) else table
