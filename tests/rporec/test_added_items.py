"""Items added while serving: the same index in every process, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from rporec.data import Catalog, DataError, added_items
from rporec.data.added_items import GrowingCatalog

BASE = Catalog(
    pa.table({"item_id": ["i0", "i1", "i2"], "title": ["A", "B", "C"], "genre": ["x", None, "y"], "year": [1, 2, None]})
)
ADDED = 20


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "items"


def _add(folder: Path, name: str, barrier, pipe) -> None:
    """Add ADDED items; send the index of each, and the catalogue when both processes have ended."""
    catalog = GrowingCatalog(BASE, folder)
    barrier.wait(60)
    places = {f"{name}{n}": catalog.add(f"{name}{n}", {"title": f"{name} {n}"}) for n in range(ADDED)}
    barrier.wait(60)
    catalog.refresh()
    pipe.send((places, catalog.catalog.table.to_pylist()))


def test_two_processes_agree_on_the_index_of_every_item(folder):
    spawn = multiprocessing.get_context("spawn")
    barrier, ends, processes = spawn.Barrier(2), [], []
    for name in ("a", "b"):
        here, there = spawn.Pipe(duplex=False)
        processes.append(spawn.Process(target=_add, args=(folder, name, barrier, there)))
        processes[-1].start()
        there.close()
        ends.append(here)
    (first, rows), (second, other_rows) = (end.recv() for end in ends)
    for process in processes:
        process.join()
    assert rows == other_rows
    places = first | second
    assert sorted(places.values()) == list(range(len(BASE), len(BASE) + 2 * ADDED))
    assert all(rows[place]["item_id"] == item_id for item_id, place in places.items())
    assert len(rows) == len(BASE) + 2 * ADDED
    assert len(list(folder.iterdir())) == 2 * ADDED  # no temporary is left


def test_an_item_has_its_attributes_and_is_there_after_a_restart(folder):
    catalog = GrowingCatalog(BASE, folder)
    other = GrowingCatalog(BASE, folder)
    assert catalog.add("i9", {"title": "Ä", "genre": "z"}) == 3
    for one in (catalog, GrowingCatalog(BASE, folder)):
        assert one.catalog.table.to_pylist()[3] == {"item_id": "i9", "title": "Ä", "genre": "z", "year": None}
        assert one.catalog.index["i9"] == 3
    assert len(other.catalog) == 3  # as of its last refresh
    assert other.refresh()
    assert other.catalog.ids == catalog.catalog.ids


@pytest.mark.parametrize(
    ("item_id", "attributes", "wanted"),
    [
        ("i1", {}, "'i1' is in the catalogue already"),
        ("live", {}, "'live' is in the catalogue already"),
        (" ", {}, "item_id: empty"),
        ("new", {"colour": "red"}, "no text column 'colour'; it has genre, title"),
        ("new", {"year": "1999"}, "no text column 'year'"),
        ("new", {"item_id": "i5"}, "no text column 'item_id'"),
    ],
)
def test_what_contradicts_the_catalogue_is_refused_and_leaves_nothing(folder, item_id, attributes, wanted):
    catalog = GrowingCatalog(BASE, folder)
    GrowingCatalog(BASE, folder).add("live", {})  # by another process, which `catalog` has not read yet
    with pytest.raises(DataError, match=wanted):
        catalog.add(item_id, attributes)
    assert [path.name for path in folder.iterdir()] == ["00000000.parquet"]


def _die_before_the_link(folder: Path) -> None:
    added_items.os.link = lambda *paths: os._exit(9)
    GrowingCatalog(BASE, folder).add("lost", {})


def test_a_crash_before_the_link_leaves_an_item_that_is_not_there(folder):
    process = multiprocessing.get_context("spawn").Process(target=_die_before_the_link, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.suffix for path in folder.iterdir()] == [".tmp"]
    catalog = GrowingCatalog(BASE, folder)
    assert catalog.catalog.ids == BASE.ids
    assert catalog.add("lost", {}) == 3


def test_threads_that_read_at_once_take_an_item_once(folder, monkeypatch):
    GrowingCatalog(BASE, folder).add("live", {})
    catalog = GrowingCatalog(BASE, folder.with_name("elsewhere"))
    catalog.folder, read = folder, added_items.pq.read_table

    def slowly(*args, **options):
        time.sleep(0.05)
        return read(*args, **options)

    monkeypatch.setattr(added_items.pq, "read_table", slowly)
    threads = [threading.Thread(target=catalog._read_now) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert catalog.catalog.ids == [*BASE.ids, "live"]
