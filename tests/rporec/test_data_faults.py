"""Every fault in a source is one line that says where, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rporec.data import DataError, build, find_sources

ITEMS = "item_id,title\n" + "".join(f"i{n},Item {n}\n" for n in range(4))
HEADER = "user_id,item_id,timestamp"
GOOD = [f"u{n % 2},i{n % 4},{n}" for n in range(24)]


def csv(*rows: str, header: str = HEADER) -> str:
    return "\n".join([header, *GOOD, *rows]) + "\n"


# text of the interactions, text of the items, what the message holds
FAULTS = {
    "missing column": (csv(header="user_id,item,timestamp"), ITEMS, ["column 'item_id': missing", "'item'"]),
    "missing column of items": (csv(), ITEMS.replace("item_id", "id"), ["items.csv: column 'item_id': missing"]),
    "column twice": ("user_id,user_id,item_id,timestamp\nu,u,i1,5\n", ITEMS, ["column 'user_id'", "2 times"]),
    "null user": (csv(",i1,9"), ITEMS, ["row 25, column 'user_id': empty"]),
    "blank item": (csv("u1,  ,9"), ITEMS, ["row 25, column 'item_id': empty"]),
    "null time": (csv("u1,i1,"), ITEMS, ["row 25, column 'timestamp': empty"]),
    "no time": (csv("u1,i1,yesterday"), ITEMS, ["row 25, column 'timestamp': 'yesterday' is no time", "ISO-8601"]),
    "not a number": (csv("u1,i1,nan"), ITEMS, ["row 25, column 'timestamp'"]),
    "mixed times": (csv("u1,i1,2020-01-01"), ITEMS, ["column 'timestamp': mixes numbers and dates"]),
    "duplicate item": (csv(), ITEMS + "i2,Again\n", ["items.csv: row 5, column 'item_id': 'i2' stands there twice"]),
    "unknown item": (csv("u1,i9,9"), ITEMS, ["row 25, column 'item_id': 'i9' is not among the items"]),
    "one item": (csv(), "item_id,title\ni0,One\n", ["items.csv: 1 item"]),
    "no rows": (HEADER + "\n", ITEMS, ["interactions.csv: no interactions"]),
    "empty file": ("", ITEMS, ["interactions.csv: the file is empty"]),
    "empty items file": (csv(), "", ["items.csv: the file is empty"]),
    "too few values": (csv("u1,i1"), ITEMS, ["row 25: 2 values where the header names 3"]),
    "too many values": (csv("u1,i1,5,6"), ITEMS, ["row 25: 4 values"]),
    "items not UTF-8": (csv(), ITEMS.encode() + b"i4,caf\xe9\n", ["items.csv: row 5, column 'title': not UTF-8"]),
    "not UTF-8": (csv().encode() + b"caf\xe9,i1,5\n", ITEMS, ["row 25, column 'user_id': not UTF-8"]),
    "UTF-16": (csv().encode("utf-16"), ITEMS, ["the header is not UTF-8"]),
    "too few samples": ("\n".join([HEADER, *GOOD[:4]]), ITEMS, ["leaves valid without samples"]),
    "no whole number": (
        "\n".join([HEADER + ",seq", *(row + ",1" for row in GOOD), "u1,i1,5,x"]),
        ITEMS,
        ["row 25, column 'seq': 'x' is no whole number"],
    ),
}


def put(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_csv_is_one_line_and_leaves_nothing(tmp_path, name):
    interactions, items, wanted = FAULTS[name]
    sources = put(tmp_path / "interactions.csv", interactions), put(tmp_path / "items.csv", items)
    with pytest.raises(DataError) as fault:
        build(*sources, tmp_path / "out")
    message = str(fault.value)
    assert "\n" not in message
    for part in wanted:
        assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interactions.csv", "items.csv"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"user_id": "u1", "item_id":', "row 25: not valid JSON"),
        ("[1, 2]", "row 25: not an object"),
        ('{"item_id": "i1", "timestamp": 5}', "row 25, column 'user_id': empty"),
        ('{"user_id": "u1", "item_id": "i1", "timestamp": "soon"}', "column 'timestamp'"),
    ],
)
def test_a_fault_in_json_lines_names_its_row(tmp_path, line, wanted):
    rows = ['{"user_id": "%s", "item_id": "%s", "timestamp": %s}' % tuple(row.split(",")) for row in GOOD]  # noqa: UP031
    sources = put(tmp_path / "interactions.jsonl", "\n".join([*rows, line])), put(tmp_path / "items.csv", ITEMS)
    with pytest.raises(DataError, match=wanted):
        build(*sources, tmp_path / "out")


def test_an_unknown_split_label_is_named_with_its_row(tmp_path):
    rows = [f"{row},train" for row in GOOD] + ["u1,i1,50,validation"]
    sources = (
        put(tmp_path / "interactions.csv", "\n".join([HEADER + ",cut", *rows])),
        put(tmp_path / "items.csv", ITEMS),
    )
    with pytest.raises(DataError, match=r"row 25, column 'cut': unknown split 'validation'; use first, train"):
        build(*sources, tmp_path / "out", split="column:cut")
    with pytest.raises(DataError, match="column 'other': missing"):
        build(*sources, tmp_path / "out", split="column:other")


def test_a_parquet_fault_far_into_the_file_names_its_row(tmp_path):
    count = 300_000  # more than one batch
    table = pa.table(
        {
            "user_id": ["u"] * count,
            "item_id": pa.array(["i1"] * (count - 1) + [None]),
            "timestamp": pa.array(range(count)),
            "event": ["click", "impression"] * (count // 2 - 1) + ["click", "click"],
        }
    )
    pq.write_table(table, tmp_path / "interactions.parquet")
    sources = tmp_path / "interactions.parquet", put(tmp_path / "items.csv", ITEMS)
    with pytest.raises(DataError, match=r"interactions.parquet: row 300000, column 'item_id': empty"):
        build(*sources, tmp_path / "out")
    put(tmp_path / "interactions.parquet", "not parquet")
    with pytest.raises(DataError, match="no readable Parquet file"):
        build(*sources, tmp_path / "out")


# --- several sources ------------------------------------------------------------------------
def parts(folder: Path, *tables: list[dict]) -> Path:
    folder.mkdir()
    for number, rows in enumerate(tables):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:04d}.parquet")
    return folder


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ({"user_id": None}, r"0001.parquet: row 4, column 'user_id': empty"),
        ({"item_id": "i9"}, r"0001.parquet: row 4, column 'item_id': 'i9' is not among the items"),
        ({"timestamp": None}, r"0001.parquet: row 4, column 'timestamp': empty"),
        ({"seq": None}, r"0001.parquet: row 4, column 'seq': an empty value"),
        ({"cut": "tomorrow"}, r"0001.parquet: row 4, column 'cut': unknown split 'tomorrow'"),
    ],
)
def test_a_fault_in_a_part_is_told_with_the_parts_own_row(tmp_path, fault, wanted):
    good = {"user_id": "u", "item_id": "i1", "timestamp": 5, "seq": 1, "cut": "train", "event": "click"}
    shown = good | {"event": "impression", "item_id": "left out before anything is checked"}
    folder = parts(tmp_path / "log", [shown, good, good], [good, shown, shown, good | fault, good], [good])
    sources = [put(tmp_path / "old.csv", "\n".join([HEADER + ",cut", *(r + ",test" for r in GOOD)])), folder]
    with pytest.raises(DataError, match=wanted):
        build(sources, put(tmp_path / "items.csv", ITEMS), tmp_path / "out", split="column:cut")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_parts_and_a_file_given_twice_are_refused(tmp_path):
    items, log = put(tmp_path / "items.csv", ITEMS), put(tmp_path / "log.csv", csv())
    empty = parts(tmp_path / "empty")
    put(empty / ".0000.parquet.7.tmp", "half")
    with pytest.raises(DataError, match=r"empty: a folder without \*.parquet"):
        build([log, empty], items, tmp_path / "out")
    with pytest.raises(DataError, match=r"log.csv: given twice"):
        build([log, tmp_path / "empty" / ".." / "log.csv"], items, tmp_path / "out")
    with pytest.raises(DataError, match="no source"):
        build([], items, tmp_path / "out")


@pytest.mark.parametrize(
    ("live", "wanted"),
    [
        (
            [{"item_id": "i2", "title": "Other"}],
            r"0001.parquet: row 1, column 'title': 'i2' differs from .*items.csv: row 3",
        ),
        ([{"item_id": "i2", "title": "Item 2", "brand": "b"}], r"0001.parquet: row 1, column 'brand': 'i2' differs"),
        ([{"item_id": "i9", "title": 5}], r"0001.parquet: column 'title': int64, but string in .*items.csv"),
        ([{"item_id": None, "title": "x"}], r"0001.parquet: row 1, column 'item_id': empty"),
        ([{"item_id": "i9"}, {"item_id": "i9"}], r"0001.parquet: row 2, column 'item_id': 'i9' stands there twice"),
    ],
)
def test_items_that_contradict_each_other_are_named_with_both_files(tmp_path, live, wanted):
    folder = parts(tmp_path / "live", [{"item_id": "i8", "title": "Fine"}], live)
    with pytest.raises(DataError, match=wanted):
        build(put(tmp_path / "log.csv", csv()), [put(tmp_path / "items.csv", ITEMS), folder], tmp_path / "out")


def test_a_column_of_items_that_stands_twice_is_refused(tmp_path):
    items = put(tmp_path / "items.csv", "item_id,title,title\ni0,a,b\ni1,a,b\n")
    with pytest.raises(DataError, match="column 'title': stands there 2 times"):
        build(put(tmp_path / "log.csv", csv()), items, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"window": -1}, "window -1"),
        ({"k_core": -1}, "k-core -1"),
        ({"k_core": 1000}, "k-core 1000: 0 items remain"),
        ({"split": "random"}, "split 'random': use time"),
        ({"split": "time:8:0:2"}, "shares above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, wanted):
    sources = put(tmp_path / "interactions.csv", csv()), put(tmp_path / "items.csv", ITEMS)
    with pytest.raises(DataError, match=wanted):
        build(*sources, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_files_and_unknown_extensions_are_named(tmp_path):
    items = put(tmp_path / "items.csv", ITEMS)
    with pytest.raises(DataError, match=r"interactions.csv: no such file"):
        build(tmp_path / "interactions.csv", items, tmp_path / "out")
    with pytest.raises(DataError, match=r"unknown extension '.xlsx'; use one of .csv"):
        build(put(tmp_path / "log.xlsx", "x"), items, tmp_path / "out")
    with pytest.raises(DataError, match="no interactions file"):
        find_sources(tmp_path)


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    sources = put(tmp_path / "interactions.csv", csv()), put(tmp_path / "items.csv", ITEMS)
    out = tmp_path / "out"
    out.mkdir()
    build(*sources, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="exists and is not empty"):
        build(*sources, out)
    assert (out / "manifest.json").read_bytes() == before
