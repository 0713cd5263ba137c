"""From columns as they come to arrays of codes and seconds, batch by batch, so that no string outlives its batch."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rporec.data.errors import DataError, Origin, at


class IdColumn:
    """Collects ids as int32 codes into their distinct values; 12, 12.0 and "12" are one id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._chunks: list[pa.DictionaryArray] = []

    def add(self, array: pa.Array, origin: Origin) -> None:
        """Raises DataError for a null or blank id and for text that is not UTF-8."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            raise self._empty(origin, _first(array.is_null()))
        encoded = array.dictionary_encode()
        if pa.types.is_null(array.type) or not len(array):
            return
        values = self._strings(encoded.dictionary, origin.path)
        blank = pc.equal(pc.utf8_trim_whitespace(values), "")
        if pc.any(blank).as_py():
            raise self._empty(origin, _first(pc.equal(encoded.indices, _first(blank))))
        self._chunks.append(pa.DictionaryArray.from_arrays(encoded.indices, values))

    def finish(self) -> tuple[np.ndarray, pa.Array]:
        """int32 [rows] codes and the distinct values (strings) that they point into."""
        column = pa.chunked_array(self._chunks, type=pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()
        self._chunks = []
        if not column.num_chunks:
            return np.empty(0, np.int32), pa.array([], pa.string())
        # Unified dictionaries are one and the same, shared by every chunk.
        codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
        return codes, column.chunk(0).dictionary

    def _empty(self, origin: Origin, row: int) -> DataError:
        return DataError(f"{origin.at(self.name, row)}: empty; give every row a value or drop the row")

    def _strings(self, values: pa.Array, path: Path) -> pa.Array:
        if pa.types.is_floating(values.type) and pc.all(pc.equal(values, pc.round(values))).as_py():
            values = values.cast(pa.int64())
        try:
            strings = values.cast(pa.string())
            strings.validate(full=True)
        except pa.ArrowNotImplementedError:
            raise DataError(f"{at(path, self.name)}: ids of type {values.type}; use strings or integers") from None
        except pa.ArrowInvalid:
            raise DataError(f"{at(path, self.name)}: not UTF-8; convert the file to UTF-8") from None
        return strings


class TimeColumn:
    """Collects timestamps as int64 microseconds since 1970 UTC.

    Numbers are seconds; where the largest magnitude of a file is >= 1e11 they are milliseconds, >= 1e14
    microseconds, >= 1e17 nanoseconds (1e11 seconds would be the year 5138). ISO-8601 text and Arrow timestamps
    without a zone are UTC.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._chunks: list[np.ndarray] = []
        self._numbers: defaultdict[Path, list[int]] = defaultdict(list)  # by file, the chunks whose unit is open

    def add(self, array: pa.Array, origin: Origin) -> None:
        """Raises DataError for a null or a value that is no time."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            raise self._fault(None, origin, _first(array.is_null()))
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = self._from_text(pc.utf8_trim_whitespace(array), origin)
        if pa.types.is_temporal(array.type) and not pa.types.is_time(array.type):
            self._chunks.append(_microseconds(array))
            return
        if pa.types.is_decimal(array.type):
            array = array.cast(pa.float64())
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            raise DataError(f"{at(origin.path, self.name)}: type {array.type}; use seconds or ISO-8601 text")
        numbers = array.cast(pa.float64() if pa.types.is_floating(array.type) else pa.int64()).to_numpy(
            zero_copy_only=False
        )
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            row = int(np.argmax(~np.isfinite(numbers)))
            raise self._fault(numbers[row], origin, row)
        self._numbers[origin.path].append(len(self._chunks))
        self._chunks.append(numbers)

    def finish(self) -> np.ndarray:
        """int64 [rows] microseconds."""
        for places in self._numbers.values():
            peak = max(float(np.abs(self._chunks[i]).max(initial=0)) for i in places)
            per_second = 1 if peak < 1e11 else 10**3 if peak < 1e14 else 10**6 if peak < 1e17 else 10**9
            for i in places:
                self._chunks[i] = _scaled(self._chunks[i], per_second)
        chunks, self._chunks = self._chunks, []
        self._numbers.clear()
        return np.concatenate(chunks) if chunks else np.empty(0, np.int64)

    def _from_text(self, texts: pa.Array, origin: Origin) -> pa.Array:
        for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            try:
                return texts.cast(kind)
            except pa.ArrowInvalid:
                continue
        # Mixed notations, or a fault; whichever, value by value.
        dates = []
        for row, text in enumerate(texts.to_pylist()):
            try:
                date = datetime.fromisoformat(text)
            except ValueError:
                if _is_number(text):
                    continue
                raise self._fault(text, origin, row) from None
            dates.append(date if date.tzinfo else date.replace(tzinfo=UTC))
        if len(dates) != len(texts):
            raise DataError(f"{at(origin.path, self.name)}: mixes numbers and dates; write all in one notation")
        return pa.array(dates, pa.timestamp("us", "UTC"))

    def _fault(self, value: object, origin: Origin, row: int) -> DataError:
        problem = "empty" if value is None or value == "" else f"{value!r} is no time"
        return DataError(f"{origin.at(self.name, row)}: {problem}; use seconds since 1970 or ISO-8601")


class NumberColumn:
    """Collects numbers; `kind` int64 refuses nulls and fractions, float32 turns nulls and blanks into NaN."""

    def __init__(self, name: str, kind: type[np.int64] | type[np.float32]) -> None:
        self.name, self.kind = name, kind
        self._chunks: list[np.ndarray] = []
        self._absent = np.nan if kind is np.float32 else np.iinfo(np.int64).min

    def add(self, array: pa.Array, origin: Origin) -> None:
        """Raises DataError for a value that is no number of that kind."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = pc.utf8_trim_whitespace(array)
            array = pc.replace_with_mask(array, pc.equal(array, ""), pa.scalar(None, array.type))
        wanted = pa.float64() if self.kind is np.float32 else pa.int64()
        if wanted == pa.int64() and array.null_count:
            raise self._fault("an empty value", origin, _first(array.is_null()))
        try:
            chunk = array.cast(wanted).to_numpy(zero_copy_only=False).astype(self.kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise next(
                self._fault(repr(value.as_py()), origin, row)
                for row, value in enumerate(array)
                if not _casts(value, wanted)
            ) from None
        self._chunks.append(chunk)
        if self.kind is np.int64:
            self._absent = max(self._absent, int(chunk.max(initial=self._absent)))

    def skip(self, rows: int) -> None:
        """Rows of a file without this column: NaN, or as int64 the largest so far, so that they stay behind the files
        before theirs when ties are broken."""
        self._chunks.append(np.broadcast_to(self.kind(self._absent), rows))  # takes no memory until `finish`

    def finish(self) -> np.ndarray:
        """[rows] of `kind`."""
        chunks, self._chunks = self._chunks, []
        return np.concatenate(chunks) if chunks else np.empty(0, self.kind)

    def _fault(self, value: str, origin: Origin, row: int) -> DataError:
        kind = "number" if self.kind is np.float32 else "whole number"
        return DataError(f"{origin.at(self.name, row)}: {value} is no {kind}; correct it or drop the column")


def _first(mask: pa.Array) -> int:
    return pc.index(mask, True).as_py() if pa.types.is_boolean(mask.type) else -1


def _microseconds(array: pa.Array) -> np.ndarray:
    zone = getattr(array.type, "tz", None)
    return array.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64()).to_numpy(zero_copy_only=False)


def _scaled(numbers: np.ndarray, per_second: int) -> np.ndarray:
    """int64 microseconds of integers or floats that count `per_second` to the second."""
    if numbers.dtype.kind == "f":
        return np.rint(numbers * (1e6 / per_second)).astype(np.int64)
    return numbers // (per_second // 10**6) if per_second > 10**6 else numbers * (10**6 // per_second)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _casts(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True
