"""Reading what a user brings: CSV, TSV, JSON lines or Parquet, by extension.

Interactions come as a stream of Arrow batches that hold the wanted columns alone; items, which are few, as one table.
Where Arrow stops at a fault it names a block, not a row: a slower reader then goes over the file once more and finds it.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from rporec.config import first_line
from rporec.data.errors import DataError, at

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".ndjson", ".json")
EXTENSIONS = (*DELIMITERS, *JSON, ".parquet")
BLOCK = 1 << 24  # bytes; a single CSV or JSON row must fit into it
ROWS = 1 << 18  # rows of a Parquet or slow JSON batch

Given = Path | str | Sequence[Path | str]  # one source or several, each a file or a folder of Parquet parts


@dataclass(frozen=True)
class Source:
    """What stands at `path`, a file or a folder, and the files to read for it, in order."""

    path: Path
    files: tuple[Path, ...]


def open_sources(given: Given) -> list[Source]:
    """The sources in the order given; of a folder its `*.parquet` as they are now, by name, without hidden ones.

    Raises DataError for a file that `check_file` refuses, for one that is there twice and for a folder without parts.
    """
    paths = [given] if isinstance(given, str | Path) else given
    if not paths:
        raise DataError("no source; give at least one file or folder")
    sources = [Source(path, _files(path)) for path in map(Path, paths)]
    seen: set[Path] = set()
    for file in (file for source in sources for file in source.files):
        check_file(file)
        if (real := file.resolve()) in seen:
            raise DataError(f"{file}: given twice; name it once")
        seen.add(real)
    return sources


def _files(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    parts = sorted(part for part in path.glob("*.parquet") if not part.name.startswith(".") and part.is_file())
    if not parts:
        raise DataError(f"{path}: a folder without *.parquet; give a file, or a folder that holds parts")
    return tuple(parts)


def find_sources(folder: Path | str) -> tuple[Path, Path]:
    """The interactions.* and items.* files of a folder. Raises DataError when one is missing or there are several."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold interactions.* and items.*")
    return _only(folder, "interactions"), _only(folder, "items")


def _only(folder: Path, stem: str) -> Path:
    found = [folder / f"{stem}{extension}" for extension in EXTENSIONS if (folder / f"{stem}{extension}").is_file()]
    if not found:
        raise DataError(f"{folder}: no {stem} file; give {stem}.csv, .tsv, .jsonl or .parquet")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: several {stem} files ({names}); leave one")
    return found[0]


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a file that is not empty and has an extension that is read here."""
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; check the path")
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; use one of {', '.join(EXTENSIONS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give one row per line or a Parquet file")


def count_rows(path: Path) -> int | None:
    """Rows of a Parquet file, from its footer; None for formats that do not say."""
    return _open_parquet(path).metadata.num_rows if path.suffix.lower() == ".parquet" else None


def stream(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...] = (), sparse: tuple[str, ...] = ()
) -> Iterator[pa.RecordBatch]:
    """Batches of the required columns and of those optional ones that the file has.

    CSV values come as strings, so that "007" stays an id; JSON and Parquet values in their own types. What optional
    columns JSON has its first row decides; `sparse` names optional texts that any row may have or lack.
    Raises DataError for a missing column, a malformed row, text that is not UTF-8.
    """
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        yield from _stream_csv(path, required, optional + sparse)
    elif suffix in JSON:
        yield from _stream_json(path, required, optional, sparse)
    else:
        yield from _stream_parquet(path, required, optional + sparse)


def read_items(path: Path) -> pa.Table:
    """The whole items file, every column, types as found; `item_id` and `title` of a CSV stay strings.

    Raises DataError as `stream` does.
    """
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            table = _open_parquet(path).read()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: no readable Parquet file ({first_line(error)}); write it again") from None
        _choose(path, table.column_names, ("item_id",), tuple(table.column_names))
    elif suffix in JSON:
        table = pa.Table.from_batches([_columns(list(_json_rows(path)))])
        _choose(path, table.column_names, ("item_id",))
    else:
        delimiter = DELIMITERS[suffix]
        header = _csv_header(path, delimiter)
        _choose(path, header, ("item_id",), tuple(header))
        types = {"item_id": pa.string(), "title": pa.string()}
        try:
            table = pacsv.read_csv(
                path,
                read_options=pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
                parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pacsv.ConvertOptions(column_types=types),
            )
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise _csv_fault(path, delimiter, error) from None
    return table.replace_schema_metadata(None)


def _choose(path: Path, names: list[str], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[str]:
    for name in required:
        if name not in names:
            raise DataError(f"{at(path, name)}: missing; the file has {', '.join(map(repr, names))}; rename or add it")
    chosen = [*required, *(name for name in optional if name in names)]
    for name in chosen:
        if names.count(name) > 1:
            raise DataError(f"{at(path, name)}: stands there {names.count(name)} times; keep one")
    return chosen


# Parquet


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable Parquet file ({first_line(error)}); write it again") from None


def _stream_parquet(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    file = _open_parquet(path)
    columns = _choose(path, file.schema_arrow.names, required, optional)
    try:
        yield from file.iter_batches(batch_size=ROWS, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable Parquet file ({first_line(error)}); write it again") from None


# CSV


def _stream_csv(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    delimiter = DELIMITERS[path.suffix.lower()]
    columns = _choose(path, _csv_header(path, delimiter), required, optional)
    try:
        yield from pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _csv_fault(path, delimiter, error) from None


def _csv_header(path: Path, delimiter: str) -> list[str]:
    with path.open("rb") as file:
        line = file.readline(BLOCK)
    try:
        return next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")], delimiter=delimiter), [])
    except UnicodeDecodeError:
        raise DataError(f"{path}: the header is not UTF-8; convert the file to UTF-8") from None


def _csv_fault(path: Path, delimiter: str, error: Exception) -> DataError:
    header = _csv_header(path, delimiter)
    with path.open(encoding="latin-1", newline="") as file:  # latin-1 maps every byte, so cells can be told apart
        try:
            rows = (row for row in csv.reader(file, delimiter=delimiter) if row)
            for number, row in enumerate(itertools.islice(rows, 1, None), 1):
                if len(row) != len(header):
                    count = f"{len(row)} values where the header names {len(header)}"
                    return DataError(f"{at(path, row=number)}: {count}; quote values that hold {delimiter!r}")
                for name, cell in zip(header, row, strict=True):
                    if not _is_utf8(cell.encode("latin-1")):
                        return DataError(f"{at(path, name, number)}: not UTF-8; convert the file to UTF-8")
        except csv.Error as fault:
            return DataError(f"{at(path, row=number)}: not valid CSV ({fault}); correct the row")
    return DataError(f"{path}: not valid CSV ({first_line(error)}); correct the file")


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# JSON lines


def _stream_json(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], sparse: tuple[str, ...]
) -> Iterator[pa.RecordBatch]:
    first = next(_json_rows(path), None)
    if first is None:
        return
    columns = [*_choose(path, list(first), required, optional), *sparse]
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    done = 0
    types = {name: type(first.get(name, "")) for name in columns}
    if all(kind in kinds for kind in types.values()):
        options = pajson.ParseOptions(
            explicit_schema=pa.schema([(name, kinds[kind]) for name, kind in types.items()]),
            unexpected_field_behavior="ignore",
            newlines_in_values=False,
        )
        try:
            reading = pajson.ReadOptions(block_size=BLOCK, use_threads=False)
            for batch in pajson.open_json(path, read_options=reading, parse_options=options):
                yield batch
                done += batch.num_rows
            return
        except pa.ArrowInvalid:
            pass  # a fault, or values of several types: the slow reader names the one and reads the other
    rows = itertools.islice(_json_rows(path), done, None)
    while block := list(itertools.islice(rows, ROWS)):
        yield _columns([{name: row.get(name) for name in columns} for row in block])


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, or of a file that is one JSON list of objects."""
    with path.open("rb") as file:
        number = 0
        for line in file:
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if not line.strip():
                continue
            if number == 0 and line.lstrip().startswith(b"["):
                yield from _json_list(path, line + file.read())
                return
            number += 1
            yield _json_object(path, line, number)


def _json_list(path: Path, raw: bytes) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not valid JSON ({error.msg}); correct the line") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{at(path, row=number)}: not an object; write {{...}} with a key for each column")
        yield row


def _json_object(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{at(path, row=number)}: not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{at(path, row=number)}: not valid JSON ({error.msg}); write one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{at(path, row=number)}: not an object; write {{...}} with a key for each column")
    return row


def _columns(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.record_batch({name: _array([row.get(name) for row in rows]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # values of several types become strings
        return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values])
