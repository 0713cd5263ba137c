"""Building a data set: read, check, code, sort, split, write. `build` at the end is the whole story.

Ids become int32 codes as each batch arrives, so ten million interactions need well under 2 GB.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rporec.data.catalog import Catalog
from rporec.data.columns import IdColumn, NumberColumn, TimeColumn
from rporec.data.errors import DataError, at
from rporec.data.folder import Progress, check_free, new_folder, silent
from rporec.data.order import stable_order
from rporec.data.samples import FILES, SCHEMA_VERSION, SPLITS, Dataset
from rporec.data.sources import check_file, count_rows, read_items, stream
from rporec.data.splits import SplitRule, k_core, split_codes

WORLD = "world.json"  # of a synthetic source; travels along so that its ceiling can be computed


@dataclass(frozen=True, eq=False)
class Log:
    """Interactions as arrays of one length, one entry per interaction."""

    user: np.ndarray  # int32, in the order of `user_ids`
    item: np.ndarray  # int32
    time: np.ndarray  # int64 microseconds
    seq: np.ndarray | None  # int64
    rating: np.ndarray | None  # float32
    label: np.ndarray | None  # int8 split column
    user_ids: pa.Array  # sorted strings

    def take(self, rows: np.ndarray) -> Log:
        """The given rows (positions or mask), in that order."""
        columns = ("user", "item", "time", "seq", "rating", "label")
        arrays: dict[str, Any] = {name: getattr(self, name) for name in columns}
        return replace(self, **{name: array[rows] for name, array in arrays.items() if array is not None})


def read_catalog(path: Path) -> Catalog:
    """The items file as a catalogue; dictionary columns decoded, `item_id` turned into strings.

    Raises DataError for an empty or repeated item_id and for fewer than two items.
    """
    table = read_items(path)
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
        elif pa.types.is_string_view(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
    ids = IdColumn(path, "item_id")
    ids.add(table.column("item_id").combine_chunks(), 1)
    codes, values = ids.finish()
    if len(values) < len(codes):
        row = int(np.setdiff1d(np.arange(len(codes)), np.unique(codes, return_index=True)[1])[0])
        item_id = values[codes[row]].as_py()
        raise DataError(f"{at(path, 'item_id', row + 1)}: {item_id!r} stands there twice; keep one row per item")
    if len(codes) < 2:
        raise DataError(f"{path}: {len(codes)} item; a catalogue needs at least two to rank")
    place = table.column_names.index("item_id")
    return Catalog(table.set_column(place, "item_id", values.take(pa.array(codes))))


def read_log(path: Path, catalog: Catalog, rule: SplitRule, progress: Progress) -> Log:
    """Stream the interactions file. Raises DataError for the first row that cannot be used."""
    labelled = (rule.column,) if rule.kind == "column" else ()
    users, items, times = IdColumn(path, "user_id"), IdColumn(path, "item_id"), TimeColumn(path, "timestamp")
    columns: dict[str, Any] = {"user_id": users, "item_id": items, "timestamp": times}
    optional = {"seq": NumberColumn(path, "seq", np.int64), "rating": NumberColumn(path, "rating", np.float32)}
    labels = IdColumn(path, rule.column)
    total = count_rows(path)
    rows = 0
    present: set[str] = set()
    for batch in stream(path, ("user_id", "item_id", "timestamp", *labelled), ("seq", "rating")):
        present.update(batch.schema.names)
        for name, column in (columns | {n: c for n, c in optional.items() if n in present}).items():
            column.add(batch.column(name), rows + 1)
        for name in labelled:
            labels.add(batch.column(name), rows + 1)
        rows += batch.num_rows
        progress("interactions", rows, total)
    if rows == 0:
        raise DataError(f"{path}: no interactions; give at least one row")

    user, user_ids = users.finish()
    order = pc.sort_indices(user_ids)
    rank = np.empty(len(order), np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    label = None
    if labelled:
        codes, texts = labels.finish()
        label = split_codes(texts.to_pylist())[codes]
        if (bad := int(np.argmin(label))) >= 0 and label[bad] < 0:
            text = texts[codes[bad]].as_py()
            raise DataError(f"{at(path, rule.column, bad + 1)}: unknown split {text!r}; use {', '.join(SPLITS)}")
    return Log(
        user=rank[user],
        item=_known_items(path, *items.finish(), catalog),
        time=times.finish(),
        seq=optional["seq"].finish() if "seq" in present else None,
        rating=optional["rating"].finish() if "rating" in present else None,
        label=label,
        user_ids=user_ids.take(order),
    )


def _known_items(path: Path, codes: np.ndarray, values: pa.Array, catalog: Catalog) -> np.ndarray:
    known = pc.index_in(values, value_set=catalog.table.column("item_id").combine_chunks())
    item = known.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)[codes]
    if (item < 0).any():
        row = int(np.argmax(item < 0))
        unknown = values[codes[row]].as_py()
        raise DataError(f"{at(path, 'item_id', row + 1)}: {unknown!r} is not in the items file; add it or drop the row")
    return item


def reduce_to_core(log: Log, catalog: Catalog, k: int) -> tuple[Log, Catalog]:
    """Keep the k-core; users and items outside it leave, the catalogue too. Raises DataError when little is left."""
    log = log.take(k_core(log.user, log.item, k))
    users, user = np.unique(log.user, return_inverse=True)
    items, item = np.unique(log.item, return_inverse=True)
    if len(items) < 2:
        raise DataError(f"k-core {k}: {len(items)} items remain; use a smaller k")
    log = replace(log, user=user.astype(np.int32), item=item.astype(np.int32), user_ids=log.user_ids.take(users))
    return log, Catalog(catalog.table.take(items))


def build(
    interactions: Path | str,
    items: Path | str,
    out: Path | str,
    *,
    split: str = "time",
    window: int = 20,
    k_core: int = 0,
    headline: Literal["exclude_history", "all"] = "exclude_history",
    progress: Progress | None = None,
) -> Dataset:
    """Check the two files and write a data set into the folder `out`, which must not exist or be empty.

    `seq` breaks ties of timestamps within a user, else the order in the file does. A sample is every interaction
    with at least one before it of its user; see `SplitRule` for the splits. `window` is in items. With `k_core` > 0
    the catalogue keeps only the items that remain, else all of the items file.
    Raises DataError naming file, row and column; then nothing is left behind.
    """
    interactions, items, out = Path(interactions), Path(items), Path(out)
    progress = progress or silent
    rule = SplitRule.parse(split)
    if window < 1:
        raise DataError(f"window {window}: use at least 1 item of history")
    if k_core < 0:
        raise DataError(f"k-core {k_core}: use 0 for none, or a number above it")
    check_free(out)
    for path in (items, interactions):
        check_file(path)

    catalog = read_catalog(items)
    progress("items", len(catalog), len(catalog))
    log = read_log(interactions, catalog, rule, progress)
    if k_core > 0:
        log, catalog = reduce_to_core(log, catalog, k_core)
    progress("samples", 0, None)
    keys = (log.time, log.user) if log.seq is None else (log.seq, log.time, log.user)
    log = log.take(stable_order(*keys))  # stable: what is still tied stays in the order of the file
    seconds = log.time // 10**6
    offsets = np.searchsorted(log.user, np.arange(len(log.user_ids) + 1))
    is_sample = np.ones(len(log.user), bool)
    is_sample[offsets[:-1]] = False
    row = np.flatnonzero(is_sample)
    row = row[stable_order(seconds[row])]
    user = log.user[row]
    sample_split = rule.assign(row, offsets[user + 1] - 1, log.label)
    counts = {name: int((sample_split == code).sum()) for code, name in enumerate(SPLITS)}
    for name in SPLITS[1:]:
        if not counts[name]:
            raise DataError(f"{interactions}: split {split!r} leaves {name} without samples; use more data or another")
    progress("samples", len(row), len(row))

    settings: dict[str, Any] = {"split": split, "window": window, "k_core": k_core, "headline": headline}
    if log.label is not None:  # a user's first interaction has no history; whatever its label, it is no sample
        unused = np.bincount(log.label[offsets[:-1]], minlength=len(SPLITS)).tolist()
        settings["labels_without_history"] = dict(zip(SPLITS, unused, strict=True))
    rows = {"user": log.user, "item": log.item, "timestamp": seconds}
    if log.rating is not None:
        rows["rating"] = log.rating
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "counts": {"users": len(log.user_ids), "items": len(catalog), "interactions": len(log.user), "samples": counts},
        "settings": settings,
        "catalogue": "items that remain in the k-core" if k_core else "every item of the items file",
        "time": {"first": int(seconds.min()), "last": int(seconds.max())},
        "inputs": {"interactions": _fingerprint(interactions), "items": _fingerprint(items)},
    }
    tables = {
        "users.parquet": pa.table({"user_id": log.user_ids, "interactions": np.diff(offsets)}),
        "interactions.parquet": pa.table(rows),
        "samples.parquet": pa.table({"user": user, "row": row, "split": sample_split}),
    }
    del log, rows, keys
    _write(out, manifest, catalog, tables, interactions.parent / WORLD, progress)
    return Dataset.load(out)


def _write(
    out: Path, manifest: dict[str, Any], catalog: Catalog, tables: dict[str, pa.Table], world: Path, progress: Progress
) -> None:
    """Write next to `out`, then rename: whoever sees `out` sees all of it."""
    with new_folder(out) as partial:
        catalog.write(partial / "items.parquet")
        for done, (name, table) in enumerate(tables.items(), 1):
            progress("write", done, len(tables) + 1)
            pq.write_table(table, partial / name, compression="zstd", use_dictionary=False)
        names = list(FILES)
        if world.is_file():
            shutil.copyfile(world, partial / WORLD)
            names.append(WORLD)
        manifest["outputs"] = {name: _fingerprint(partial / name) for name in names}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    progress("write", len(tables) + 1, len(tables) + 1)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
