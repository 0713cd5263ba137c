"""A built data set: who took which item when, and the samples (history -> next item) with their split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rporec.config import Convention
from rporec.data.catalog import Catalog
from rporec.data.errors import DataError

SCHEMA_VERSION = 1
SPLITS = ("first", "train", "valid", "test")  # by their code in `sample_split`
FILES = ("items.parquet", "users.parquet", "interactions.parquet", "samples.parquet")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A sample is an int: the position in the `sample_*` arrays, sorted by (timestamp, user_id, order in the user).

    Every interaction with at least one before it is a sample; those of split "first" are context only.
    """

    root: Path | None
    manifest: dict[str, Any]
    catalog: Catalog
    user_ids: list[str]
    offsets: np.ndarray  # int64 [U + 1]: rows offsets[u]:offsets[u + 1] are of user u
    items: np.ndarray  # int32 [I] item, rows sorted by (user, timestamp, seq)
    timestamps: np.ndarray  # int64 [I] seconds since 1970 UTC
    sample_user: np.ndarray  # int32 [n]
    sample_row: np.ndarray  # int64 [n] row of the target in `items`
    sample_split: np.ndarray  # int8 [n], see SPLITS
    window: int  # items of a history

    @classmethod
    def load(cls, folder: Path | str) -> Dataset:
        """Open what `build` wrote. Raises DataError when the folder is no data set, an older one, or half written."""
        folder = Path(folder)
        manifest = _manifest(folder)
        rows = _read(folder / "interactions.parquet")
        samples = _read(folder / "samples.parquet")
        users = _read(folder / "users.parquet")
        counts = users["interactions"].to_numpy()
        return cls(
            root=folder,
            manifest=manifest,
            catalog=Catalog.read(folder / "items.parquet"),
            user_ids=users["user_id"].to_pylist(),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            items=rows["item"].to_numpy(),
            timestamps=rows["timestamp"].to_numpy(),
            sample_user=samples["user"].to_numpy(),
            sample_row=samples["row"].to_numpy(),
            sample_split=samples["split"].to_numpy(),
            window=manifest["settings"]["window"],
        )

    @cached_property
    def owner(self) -> np.ndarray:
        """int32 [I] user of each row."""
        return np.repeat(np.arange(len(self.user_ids), dtype=np.int32), np.diff(self.offsets))

    def split(self, name: Literal["train", "valid", "test"]) -> np.ndarray:
        """int64 sample numbers of a split, in time order."""
        return np.flatnonzero(self.sample_split == SPLITS.index(name))

    def targets(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [len(samples)] target items."""
        return self.items[self.sample_row[samples]]

    def times(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [len(samples)] seconds of the targets."""
        return self.timestamps[self.sample_row[samples]]

    def history(self, sample: int) -> np.ndarray:
        """int32 items: the last `window` ones before the target, oldest first."""
        row = self.sample_row[sample]
        start = self.offsets[self.sample_user[sample]]
        return self.items[max(start, row - self.window) : row]

    def seen(self, sample: int) -> np.ndarray:
        """int32 items: ALL that the user took before the target, oldest first."""
        return self.items[self.offsets[self.sample_user[sample]] : self.sample_row[sample]]

    def seen_of(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """`seen` of each of the samples."""
        return [self.seen(sample) for sample in samples]

    def excluded_of(self, samples: Sequence[int] | np.ndarray, convention: Convention) -> list[np.ndarray] | None:
        """What leaves the ranking of each of the samples, as `rporec.evaluation.ranking.ranks` takes it."""
        return self.seen_of(samples) if convention == "exclude_history" else None


def is_built(folder: Path | str) -> bool:
    """Whether the folder holds a data set that `build` finished."""
    return (Path(folder) / "manifest.json").is_file()


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; build a data set with `rporec data build`")
    if not is_built(folder):
        if any((folder / name).is_file() for name in ("users.parquet", "samples.parquet")):
            raise DataError(f"{folder}: half written, manifest.json is missing; delete the folder and build it again")
        raise DataError(f"{folder}: no data set, manifest.json is missing; build one with `rporec data build`")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        sizes = {name: manifest["outputs"][name]["bytes"] for name in FILES}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder / 'manifest.json'}: not a manifest; delete the folder and build it again") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{folder}: schema version {version}, this program reads {SCHEMA_VERSION}; build it again")
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            state = "has another size than the manifest says" if path.is_file() else "is missing"
            raise DataError(f"{folder}: half written, {name} {state}; delete the folder and build it again")
    return manifest


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable Parquet file ({error}); delete the folder and build it again") from None
