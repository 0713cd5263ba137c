"""From columns as they come to arrays of codes and seconds, batch by batch, so that no string outlives its batch."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rporec.data.errors import DataError, at


class IdColumn:
    """Collects ids as int32 codes into their distinct values; 12, 12.0 and "12" are one id."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._chunks: list[pa.DictionaryArray] = []

    def add(self, array: pa.Array, first_row: int) -> None:
        """`first_row` counts from 1. Raises DataError for a null or blank id and for text that is not UTF-8."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            raise self._empty(first_row + _first(array.is_null()))
        encoded = array.dictionary_encode()
        if pa.types.is_null(array.type) or not len(array):
            return
        values = self._strings(encoded.dictionary)
        blank = pc.equal(pc.utf8_trim_whitespace(values), "")
        if pc.any(blank).as_py():
            raise self._empty(first_row + _first(pc.equal(encoded.indices, _first(blank))))
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

    def _empty(self, row: int) -> DataError:
        return DataError(f"{at(self.path, self.name, row)}: empty; give every row a value or drop the row")

    def _strings(self, values: pa.Array) -> pa.Array:
        if pa.types.is_floating(values.type) and pc.all(pc.equal(values, pc.round(values))).as_py():
            values = values.cast(pa.int64())
        try:
            strings = values.cast(pa.string())
            strings.validate(full=True)
        except pa.ArrowNotImplementedError:
            raise DataError(f"{at(self.path, self.name)}: ids of type {values.type}; use strings or integers") from None
        except pa.ArrowInvalid:
            raise DataError(f"{at(self.path, self.name)}: not UTF-8; convert the file to UTF-8") from None
        return strings


class TimeColumn:
    """Collects timestamps as int64 microseconds since 1970 UTC.

    Numbers are seconds; where the largest magnitude of the file is >= 1e11 they are milliseconds, >= 1e14
    microseconds, >= 1e17 nanoseconds (1e11 seconds would be the year 5138). ISO-8601 text and Arrow timestamps
    without a zone are UTC.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._chunks: list[np.ndarray] = []
        self._numbers: list[int] = []  # the chunks whose unit is not known yet

    def add(self, array: pa.Array, first_row: int) -> None:
        """`first_row` counts from 1. Raises DataError for a null or a value that is no time."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if array.null_count:
            raise self._fault(None, first_row + _first(array.is_null()))
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = self._from_text(pc.utf8_trim_whitespace(array), first_row)
        if pa.types.is_temporal(array.type) and not pa.types.is_time(array.type):
            self._chunks.append(_microseconds(array))
            return
        if pa.types.is_decimal(array.type):
            array = array.cast(pa.float64())
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            raise DataError(f"{at(self.path, self.name)}: type {array.type}; use seconds or ISO-8601 text")
        numbers = array.cast(pa.float64() if pa.types.is_floating(array.type) else pa.int64()).to_numpy(
            zero_copy_only=False
        )
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            row = int(np.argmax(~np.isfinite(numbers)))
            raise self._fault(numbers[row], first_row + row)
        self._numbers.append(len(self._chunks))
        self._chunks.append(numbers)

    def finish(self) -> np.ndarray:
        """int64 [rows] microseconds."""
        peak = max((float(np.abs(self._chunks[i]).max(initial=0)) for i in self._numbers), default=0.0)
        per_second = 1 if peak < 1e11 else 10**3 if peak < 1e14 else 10**6 if peak < 1e17 else 10**9
        for i in self._numbers:
            chunk = self._chunks[i]
            if chunk.dtype.kind == "f":
                self._chunks[i] = np.rint(chunk * (1e6 / per_second)).astype(np.int64)
            elif per_second > 10**6:
                self._chunks[i] = chunk // (per_second // 10**6)
            else:
                self._chunks[i] = chunk * (10**6 // per_second)
        chunks, self._chunks, self._numbers = self._chunks, [], []
        return np.concatenate(chunks) if chunks else np.empty(0, np.int64)

    def _from_text(self, texts: pa.Array, first_row: int) -> pa.Array:
        for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            try:
                return texts.cast(kind)
            except pa.ArrowInvalid:
                continue
        # Mixed notations, or a fault; whichever, value by value.
        dates = []
        for row, text in enumerate(texts.to_pylist(), first_row):
            try:
                date = datetime.fromisoformat(text)
            except ValueError:
                if _is_number(text):
                    continue
                raise self._fault(text, row) from None
            dates.append(date if date.tzinfo else date.replace(tzinfo=UTC))
        if len(dates) != len(texts):
            raise DataError(f"{at(self.path, self.name)}: mixes numbers and dates; write all in one notation")
        return pa.array(dates, pa.timestamp("us", "UTC"))

    def _fault(self, value: object, row: int) -> DataError:
        problem = "empty" if value is None or value == "" else f"{value!r} is no time"
        return DataError(f"{at(self.path, self.name, row)}: {problem}; use seconds since 1970 or ISO-8601")


class NumberColumn:
    """Collects numbers; `kind` int64 refuses nulls and fractions, float32 turns nulls and blanks into NaN."""

    def __init__(self, path: Path, name: str, kind: type[np.int64] | type[np.float32]) -> None:
        self.path, self.name, self.kind = path, name, kind
        self._chunks: list[np.ndarray] = []

    def add(self, array: pa.Array, first_row: int) -> None:
        """`first_row` counts from 1. Raises DataError for a value that is no number of that kind."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = pc.utf8_trim_whitespace(array)
            array = pc.replace_with_mask(array, pc.equal(array, ""), pa.scalar(None, array.type))
        wanted = pa.float64() if self.kind is np.float32 else pa.int64()
        if wanted == pa.int64() and array.null_count:
            raise self._fault("an empty value", first_row + _first(array.is_null()))
        try:
            self._chunks.append(array.cast(wanted).to_numpy(zero_copy_only=False).astype(self.kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise next(
                self._fault(repr(value.as_py()), row)
                for row, value in enumerate(array, first_row)
                if not _casts(value, wanted)
            ) from None

    def finish(self) -> np.ndarray:
        """[rows] of `kind`."""
        chunks, self._chunks = self._chunks, []
        return np.concatenate(chunks) if chunks else np.empty(0, self.kind)

    def _fault(self, value: str, row: int) -> DataError:
        kind = "number" if self.kind is np.float32 else "whole number"
        return DataError(f"{at(self.path, self.name, row)}: {value} is no {kind}; correct it or drop the column")


def _first(mask: pa.Array) -> int:
    return pc.index(mask, True).as_py() if pa.types.is_boolean(mask.type) else -1


def _microseconds(array: pa.Array) -> np.ndarray:
    zone = getattr(array.type, "tz", None)
    return array.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64()).to_numpy(zero_copy_only=False)


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
