"""Building a data set: read, check, code, sort, split, write. `build` at the end is the whole story.

Ids become int32 codes as each batch arrives, so ten million interactions need well under 2 GB.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rporec.config import Convention
from rporec.data.catalog import Catalog
from rporec.data.columns import IdColumn, NumberColumn, TimeColumn
from rporec.data.errors import DataError, Origin, at, locate
from rporec.data.feedback import NO_CHOICE
from rporec.data.folder import Progress, check_free, new_folder, silent
from rporec.data.items import read_catalog
from rporec.data.order import stable_order
from rporec.data.samples import FILES, SCHEMA_VERSION, SPLITS, Dataset
from rporec.data.sources import Given, Source, count_rows, open_sources, stream
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


def read_log(
    files: Sequence[Path], catalog: Catalog, rule: SplitRule, progress: Progress
) -> tuple[Log, dict[str, int]]:
    """Stream the interactions files, one after the other, and count by event the rows left out.

    Raises DataError for the first row that cannot be used.
    """
    labelled = (rule.column,) if rule.kind == "column" else ()
    users, items, times = IdColumn("user_id"), IdColumn("item_id"), TimeColumn("timestamp")
    columns: dict[str, Any] = {"user_id": users, "item_id": items, "timestamp": times}
    optional = {"seq": NumberColumn("seq", np.int64), "rating": NumberColumn("rating", np.float32)}
    labels = IdColumn(rule.column)
    lengths = [count_rows(file) for file in files]
    total = None if None in lengths else sum(filter(None, lengths))
    rows = 0
    present: set[str] = set()
    origins: list[Origin] = []
    left_out: Counter[str] = Counter()
    for batch, origin in _batches(files, (*columns, *labelled), tuple(optional)):
        rows += batch.num_rows
        if "event" in batch.schema.names:
            batch, origin = _choices(batch, origin, left_out)
        origins.append(origin)
        present.update(batch.schema.names)
        for name, column in columns.items():
            column.add(batch.column(name), origin)
        for name, number in optional.items():
            if name in batch.schema.names:
                number.add(batch.column(name), origin)
            else:
                number.skip(batch.num_rows)
        for name in labelled:
            labels.add(batch.column(name), origin)
        progress("interactions", rows, total)
    if rows == left_out.total():
        names = ", ".join(map(str, files))
        raise DataError(f"{names}: no interactions; give at least one row")

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
            raise DataError(f"{locate(origins, bad, rule.column)}: unknown split {text!r}; use {', '.join(SPLITS)}")
    log = Log(
        user=rank[user],
        item=_known_items(origins, *items.finish(), catalog),
        time=times.finish(),
        seq=optional["seq"].finish() if "seq" in present else None,
        rating=optional["rating"].finish() if "rating" in present else None,
        label=label,
        user_ids=user_ids.take(order),
    )
    return log, dict(sorted(left_out.items()))


def _batches(
    files: Sequence[Path], required: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[tuple[pa.RecordBatch, Origin]]:
    for file in files:
        done = 0
        for batch in stream(file, required, optional, sparse=("event",)):
            yield batch, Origin(file, range(done + 1, done + batch.num_rows + 1))
            done += batch.num_rows


def _choices(batch: pa.RecordBatch, origin: Origin, left_out: Counter[str]) -> tuple[pa.RecordBatch, Origin]:
    """The rows that are choices of a user; adds the others to `left_out`."""
    try:
        events = batch.column("event").cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = batch.column("event").type
        raise DataError(f"{at(origin.path, 'event')}: type {kind}; use words such as click or dislike") from None
    refused = pc.is_in(events, value_set=pa.array(NO_CHOICE))
    for word in pc.value_counts(events.filter(refused)).to_pylist():
        left_out[word["values"]] += word["counts"]
    kept = np.flatnonzero(~refused.to_numpy(zero_copy_only=False))
    if len(kept) == batch.num_rows:
        return batch, origin
    return batch.take(pa.array(kept)), Origin(origin.path, kept + origin.rows[0])


def _known_items(origins: Sequence[Origin], codes: np.ndarray, values: pa.Array, catalog: Catalog) -> np.ndarray:
    known = pc.index_in(values, value_set=catalog.table.column("item_id").combine_chunks())
    item = known.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)[codes]
    if (item < 0).any():
        row = int(np.argmax(item < 0))
        unknown = values[codes[row]].as_py()
        raise DataError(
            f"{locate(origins, row, 'item_id')}: {unknown!r} is not among the items; add it or drop the row"
        )
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
    interactions: Given,
    items: Given,
    out: Path | str,
    *,
    split: str = "time",
    window: int = 20,
    k_core: int = 0,
    headline: Convention = "exclude_history",
    progress: Progress | None = None,
) -> Dataset:
    """Check the sources and write a data set into the folder `out`, which must not exist or be empty.

    A source is a file or a folder of Parquet parts. `seq` breaks ties of timestamps within a user, else the order of
    sources and rows does; rows of a file without `seq` stay behind the files before theirs. Rows whose `event` is in
    NO_CHOICE are left out. A sample is every interaction with at least one before it of its user; see `SplitRule` for
    the splits. `window` is in items. With `k_core` > 0 the catalogue keeps only the items that remain, else all.
    Raises DataError naming file, row and column; then nothing is left behind.
    """
    out = Path(out)
    progress = progress or silent
    rule = SplitRule.parse(split)
    if window < 1:
        raise DataError(f"window {window}: use at least 1 item of history")
    if k_core < 0:
        raise DataError(f"k-core {k_core}: use 0 for none, or a number above it")
    check_free(out)
    chosen = open_sources(interactions)
    described = open_sources(items)  # later: an item that was added meanwhile may have been chosen already
    files = [file for source in chosen for file in source.files]

    catalog = read_catalog([file for source in described for file in source.files])
    progress("items", len(catalog), len(catalog))
    log, left_out = read_log(files, catalog, rule, progress)
    if k_core > 0:
        log, catalog = reduce_to_core(log, catalog, k_core)
    progress("samples", 0, None)
    keys = (log.time, log.user) if log.seq is None else (log.seq, log.time, log.user)
    log = log.take(stable_order(*keys))  # stable: what is still tied stays in the order of the sources
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
            names = ", ".join(str(source.path) for source in chosen)
            raise DataError(f"{names}: split {split!r} leaves {name} without samples; use more data or another")
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
        "counts": {
            "users": len(log.user_ids),
            "items": len(catalog),
            "interactions": len(log.user),
            "left_out": left_out,
            "samples": counts,
        },
        "settings": settings,
        "catalogue": "items that remain in the k-core" if k_core else "every item of the sources",
        "time": {"first": int(seconds.min()), "last": int(seconds.max())},
        "inputs": {"interactions": [*map(_fingerprint, chosen)], "items": [*map(_fingerprint, described)]},
    }
    tables = {
        "users.parquet": pa.table({"user_id": log.user_ids, "interactions": np.diff(offsets)}),
        "interactions.parquet": pa.table(rows),
        "samples.parquet": pa.table({"user": user, "row": row, "split": sample_split}),
    }
    del log, rows, keys
    # The ceiling is that of the world's own interactions: what was added to them it does not know.
    world = files[0].parent / WORLD if len(files) == len(described) == len(described[0].files) == 1 else None
    _write(out, manifest, catalog, tables, world, progress)
    return Dataset.load(out)


def _write(
    out: Path,
    manifest: dict[str, Any],
    catalog: Catalog,
    tables: dict[str, pa.Table],
    world: Path | None,
    progress: Progress,
) -> None:
    """Write next to `out`, then rename: whoever sees `out` sees all of it."""
    with new_folder(out) as partial:
        catalog.write(partial / "items.parquet")
        for done, (name, table) in enumerate(tables.items(), 1):
            progress("write", done, len(tables) + 1)
            pq.write_table(table, partial / name, compression="zstd", use_dictionary=False)
        names = list(FILES)
        if world is not None and world.is_file():
            shutil.copyfile(world, partial / WORLD)
            names.append(WORLD)
        manifest["outputs"] = {name: _fingerprint(Source(partial / name, (partial / name,))) for name in names}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    progress("write", len(tables) + 1, len(tables) + 1)


def _fingerprint(source: Source) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file; of a folder those of all its parts, one after the other."""
    digest = hashlib.sha256()
    for part in source.files:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    size = sum(part.stat().st_size for part in source.files)
    parts = {} if source.files == (source.path,) else {"parts": len(source.files)}
    return {"file": source.path.name, **parts, "bytes": size, "sha256": digest.hexdigest()}
