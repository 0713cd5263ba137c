"""What a built data set promises, whatever it was built from."""

from __future__ import annotations

import csv
import json
import tempfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rporec.data import Catalog, DataError, Dataset, build, find_sources, is_built
from rporec.data.added_items import GrowingCatalog
from rporec.data.feedback import FeedbackLog, Reaction
from rporec.data.order import stable_order

ITEMS = [{"item_id": f"i{n}", "title": f"Item {n}", "brand": None} for n in range(6)]
SPLITS = ("train", "valid", "test")


def write(folder: Path, rows: list[dict], kind: str, items: list[dict] = ITEMS) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, table in (("interactions", rows), ("items", items)):
        path = folder / f"{stem}.{kind}"
        paths.append(path)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(table), path)
        elif kind in ("csv", "tsv"):
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]), delimiter="," if kind == "csv" else "\t")
                writer.writeheader()
                writer.writerows(table)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return paths[0], paths[1]


def row(user: object, item: object, time: object, **more: object) -> dict:
    return {"user_id": user, "item_id": item, "timestamp": time, **more}


def log(users: int = 3, length: int = 6) -> list[dict]:
    return [row(f"u{u}", f"i{(u + t) % 6}", 100 * t + u) for t in range(length) for u in range(users)]


def make(folder: Path, rows: list[dict], kind: str = "parquet", items: list[dict] = ITEMS, **options) -> Dataset:
    return build(*write(folder / "raw", rows, kind, items), folder / "out", **options)


def content(dataset: Dataset) -> tuple:
    arrays = ("offsets", "items", "timestamps", "sample_user", "sample_row", "sample_split")
    return dataset.user_ids, dataset.catalog.ids, *(getattr(dataset, name).tolist() for name in arrays)


rows_of_a_log = st.lists(
    st.tuples(st.sampled_from(["a", "B", "ü", "10", "9"]), st.integers(0, 5), st.integers(0, 8), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=30, deadline=None)
@given(drawn=rows_of_a_log, window=st.integers(1, 5), seq=st.booleans())
def test_time_split_is_chronological_and_histories_hold_the_past_alone(drawn, window, seq):
    rows = [row(u, f"i{i}", t, **({"seq": s} if seq else {})) for u, i, t, s in drawn]
    # The definition, written down naively: rows in order of (user, time, seq, place in the file).
    order = sorted(range(len(rows)), key=lambda n: (rows[n]["user_id"], rows[n]["timestamp"], rows[n].get("seq", 0), n))
    past: dict[str, list[int]] = {}
    samples = []
    for n in order:
        user = rows[n]["user_id"]
        before = past.setdefault(user, [])
        if before:
            key = (rows[n]["timestamp"], user, len(before))
            samples.append((key, list(before), int(rows[n]["item_id"][1:])))
        before.append(int(rows[n]["item_id"][1:]))
    samples.sort(key=lambda sample: sample[0])
    n = len(samples)
    with tempfile.TemporaryDirectory() as name:
        if n < 10 and not (n * 8 // 10 and n * 9 // 10 > n * 8 // 10 and n > n * 9 // 10):
            with pytest.raises(DataError, match="without samples"):
                make(Path(name), rows, window=window)
            return
        dataset = make(Path(name), rows, window=window)
    assert [len(dataset.split(s)) for s in SPLITS] == [n * 8 // 10, n * 9 // 10 - n * 8 // 10, n - n * 9 // 10]
    assert np.concatenate([dataset.split(s) for s in SPLITS]).tolist() == list(range(n))
    assert [items.tolist() for items in dataset.seen_of(range(n))] == [before for _, before, _ in samples]
    for sample, ((time, user, _), before, target) in enumerate(samples):
        assert dataset.seen(sample).tolist() == before
        assert dataset.history(sample).tolist() == before[-window:]
        assert dataset.targets([sample])[0] == target
        assert dataset.times([sample])[0] == time
        assert dataset.user_ids[dataset.sample_user[sample]] == user
        assert dataset.owner[dataset.sample_row[sample]] == dataset.sample_user[sample]


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3)), max_size=30))
def test_stable_order_sorts_as_lexsort_over_the_whole_integer_range(pairs):
    first, last = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    assert stable_order(first, last).tolist() == np.lexsort((first, last)).tolist()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_format_gives_the_same_data_set(tmp_path, kind):
    rows = [row(i["user_id"], i["item_id"], i["timestamp"], seq=n, rating=2.5) for n, i in enumerate(log())]
    items = [{**item, "title": f'{item["title"]}, "quoted"\nand on two lines'} for item in ITEMS]
    wanted = make(tmp_path / "a", rows, "parquet", items)
    found = make(tmp_path / "b", rows, kind, items)
    assert content(found) == content(wanted)
    assert found.catalog.text(3) == wanted.catalog.text(3)
    assert wanted.catalog.text_columns == found.catalog.text_columns == ["title"]


def test_ids_match_whether_they_are_numbers_or_text(tmp_path):
    items = [{"item_id": str(n), "title": f"t{n}"} for n in range(6)]
    rows = [row(7, n % 6, 100 + n) for n in range(20)]
    as_text = [row("7", str(r["item_id"]), r["timestamp"]) for r in rows]
    wanted = content(make(tmp_path / "text", as_text, items=items))
    assert content(make(tmp_path / "int", rows, items=items)) == wanted
    assert content(make(tmp_path / "json", rows, "jsonl", items)) == wanted
    mixed = [*rows[:5], *as_text[5:]]
    assert content(make(tmp_path / "mixed", mixed, "jsonl", items)) == wanted
    floats = [row(7.0, float(r["item_id"]), float(r["timestamp"])) for r in rows]
    assert content(make(tmp_path / "float", floats, items=items)) == wanted


def test_leading_zeros_of_an_id_survive_csv(tmp_path):
    items = [{"item_id": "007", "title": "Bond"}, {"item_id": "7", "title": "Seven"}]
    rows = [row("u", "007" if n % 2 else "7", n) for n in range(20)]
    assert make(tmp_path, rows, "csv", items).catalog.ids == ["007", "7"]


@pytest.mark.parametrize("unit", [10**3, 10**6, 10**9])
def test_milli_micro_and_nanoseconds_are_recognised(tmp_path, unit):
    seconds = [1_600_000_000 + n for n in range(20)]
    rows = [row("u", f"i{n % 6}", s * unit + 1) for n, s in enumerate(seconds)]
    assert make(tmp_path, rows).timestamps.tolist() == seconds


@pytest.mark.parametrize(
    ("notation", "kind"),
    [
        (lambda t: t.replace(tzinfo=None).isoformat(), "csv"),
        (lambda t: t.replace(tzinfo=None).isoformat() + "Z", "jsonl"),
        (lambda t: t.astimezone(timezone(timedelta(hours=2))).isoformat(sep=" "), "csv"),
        (lambda t: t.replace(tzinfo=None), "parquet"),
        (lambda t: t.astimezone(timezone(timedelta(hours=-5))), "parquet"),
        (lambda t: str(t.timestamp()), "csv"),
    ],
)
def test_dates_are_read_as_utc_unless_they_say_otherwise(tmp_path, notation, kind):
    times = [1_600_000_000 + n for n in range(20)]
    rows = [row("u", f"i{t % 6}", notation(datetime.fromtimestamp(t, UTC))) for t in times]
    assert make(tmp_path, rows, kind).timestamps.tolist() == times


def test_seq_breaks_ties_and_the_order_of_the_file_where_there_is_none(tmp_path):
    rows = [row("u", f"i{n % 6}", 5, seq=-n) for n in range(20)]
    assert make(tmp_path / "seq", rows).items.tolist() == [n % 6 for n in reversed(range(20))]
    plain = [{k: v for k, v in r.items() if k != "seq"} for r in rows]
    assert make(tmp_path / "file", plain).items.tolist() == [n % 6 for n in range(20)]


def test_leave_one_out_takes_the_last_of_each_user(tmp_path):
    dataset = make(tmp_path, log(users=3, length=5), split="leave-one-out")
    for name, place in (("test", 4), ("valid", 3)):
        rows = dataset.sample_row[dataset.split(name)]
        assert sorted(rows - dataset.offsets[dataset.sample_user[dataset.split(name)]]) == [place] * 3
    assert len(dataset.split("train")) == 6


def test_split_column_decides_and_an_interaction_without_a_past_is_no_sample(tmp_path):
    labels = ["train", "train", "first", "valid", "test", "test"]
    rows = [row("u", f"i{n}", n, cut=label) for n, label in enumerate(labels)]
    dataset = make(tmp_path, rows, split="column:cut")
    assert dataset.sample_split.tolist() == [1, 0, 2, 3, 3]
    assert dataset.manifest["counts"]["samples"] == {"first": 1, "train": 1, "valid": 1, "test": 2}
    assert dataset.manifest["settings"]["labels_without_history"]["train"] == 1


def test_k_core_is_iterated_and_shrinks_the_catalogue(tmp_path):
    # i5 has two rows, one by a user who leaves with it: only a second round finds that out.
    rows = [r for r in log(users=4, length=6) if r["item_id"] != "i5"]
    rows += [row("x", "i5", 1), row("u0", "i5", 2)]
    dataset = make(tmp_path, rows, k_core=2)
    assert "x" not in dataset.user_ids
    assert dataset.catalog.ids == [f"i{n}" for n in range(5)]
    counts = np.bincount(dataset.items)
    assert counts.min() >= 2
    assert np.diff(dataset.offsets).min() >= 2


def test_attributes_of_any_type_pass(tmp_path):
    items = pa.table(
        {
            "item_id": pa.array([f"i{n}" for n in range(6)]).dictionary_encode(),
            "nothing": pa.nulls(6),
            "blank": ["", "None", None, " ", "", ""],
            "price": [1.5] * 6,
            "tags": [["a", "b"]] * 6,
            "genre": pa.array(["x", "y", "x", "y", None, "x"]).dictionary_encode(),
            "title": [f"T{n}" for n in range(6)],
        }
    )
    paths = write(tmp_path / "raw", log(), "parquet")
    pq.write_table(items, paths[1])
    catalog = build(*paths, tmp_path / "out").catalog
    assert catalog.text_columns == ["title", "genre"]
    assert (catalog.text(0), catalog.text(4)) == ("T0 | x", "T4")
    assert catalog.value("blank", 1) == ""
    assert catalog.value("nothing", 0) == ""
    assert catalog.index["i3"] == 3
    assert len(catalog) == 6
    assert catalog.table.column("tags")[0].as_py() == ["a", "b"]
    catalog.write(tmp_path / "copy.parquet")
    assert Catalog.read(tmp_path / "copy.parquet").table == catalog.table


def test_an_item_without_title_is_called_by_its_id(tmp_path):
    catalog = make(tmp_path, log(), items=[{"item_id": f"i{n}", "brand": "b"} for n in range(6)]).catalog
    assert catalog.title(2) == "i2"
    assert catalog.text(2) == "b"


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first, second = (make(tmp_path / name, log()).manifest for name in "ab")
    assert first == second
    assert first["outputs"]["samples.parquet"]["bytes"] > 0
    assert len(first["inputs"]["items"][0]["sha256"]) == 64


# --- several sources ------------------------------------------------------------------------
def put(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@settings(max_examples=30, deadline=None)
@given(drawn=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 4)), min_size=30, max_size=40))
def test_parts_of_a_folder_and_files_behind_it_make_the_data_set_of_one_file(drawn):
    rows = [row(f"u{u}", f"i{i}", t) for u, i, t in drawn]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = folder / "parts"
        for number, start in enumerate(range(0, 20, 5)):
            put(parts / f"{number:04d}.parquet", rows[start : start + 5])
        for hidden in (".0000.parquet", "0000.parquet.tmp"):  # one that is being written
            (parts / hidden).write_bytes(b"half")
        more, items = write(folder / "more", rows[20:], "jsonl")
        whole = make(folder / "whole", rows)
        found = build([parts, more], str(items), folder / "out")
        assert content(found) == content(whole)
        assert [source.get("parts") for source in found.manifest["inputs"]["interactions"]] == [4, None]


def test_each_file_has_its_own_unit_of_time_and_optional_columns(tmp_path):
    seconds = [1_600_000_000 + n for n in range(20)]
    old = put(tmp_path / "old.parquet", [row("u", "i0", s * 1000, seq=n, rating=4.0) for n, s in enumerate(seconds)])
    new = put(tmp_path / "new.parquet", [row("u", "i1", s) for s in seconds])
    third = put(tmp_path / "third.parquet", [row("u", "i2", s, seq=100) for s in seconds])
    dataset = build([old, new, third], write(tmp_path, log(), "csv")[1], tmp_path / "out")
    assert dataset.timestamps.tolist() == [s for s in seconds for _ in range(3)]
    assert dataset.items.tolist() == [0, 1, 2] * 20  # without seq: behind the file before it
    ratings = pq.read_table(tmp_path / "out" / "interactions.parquet").column("rating").to_numpy()
    np.testing.assert_array_equal(ratings, [4, np.nan, np.nan] * 20)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_what_a_user_refused_or_was_only_shown_is_no_choice(tmp_path, kind):
    # The first row says nothing, as JSON does that leaves out what is null: the others' words count all the same.
    words = [None, "click", "dislike", "impression", "impression", "purchase"]
    rows = [row("u", f"i{n % 6}", n, event=words[n % 6]) for n in range(60)]
    interactions, items = write(tmp_path / "raw", rows, kind)
    if kind == "jsonl":
        lean = [{name: value for name, value in r.items() if value is not None} for r in rows]
        interactions.write_text("".join(json.dumps(r) + "\n" for r in lean))
    dataset = build(interactions, items, tmp_path / "out")
    assert dataset.manifest["counts"]["left_out"] == {"dislike": 10, "impression": 20}
    assert dataset.items.tolist() == [0, 1, 5] * 10
    assert len(dataset.catalog) == 6


def test_items_of_several_sources_are_one_catalogue(tmp_path):
    shop = write(tmp_path, log(), "parquet", [{**item, "year": 1990, "note": None} for item in ITEMS])[1]
    live = tmp_path / "live"
    put(live / "00000000.parquet", [{"item_id": "new", "title": "New", "note": "live"}])
    put(live / "00000001.parquet", [{"item_id": "i3", "title": "Item 3", "brand": None, "year": 1990}])  # a copy
    rows = put(tmp_path / "more.parquet", [row("u9", item, n) for n, item in enumerate(["new", "i1"])])
    catalog = build([tmp_path / "interactions.parquet", rows], [shop, live], tmp_path / "out").catalog
    assert catalog.ids == [*(f"i{n}" for n in range(6)), "new"]
    assert catalog.table.column("year").to_pylist() == [1990] * 6 + [None]
    assert catalog.text(6) == "New | live"


def test_a_week_of_serving_closes_the_loop(tmp_path):
    """What serving appended, read back by `build` as it lies there."""
    interactions, items = write(tmp_path / "raw", log(), "parquet")
    (tmp_path / "raw" / "world.json").write_text("{}")
    catalog = build(interactions, items, tmp_path / "first").catalog
    GrowingCatalog(catalog, tmp_path / "items").add("live", {"title": "Live"})
    feedback = FeedbackLog(tmp_path / "feedback")
    feedback.append([Reaction("u0", "i2", 9_999, "dislike"), Reaction("u0", "live", 10_000, "like")])
    feedback.append([Reaction("newcomer", "i1", 10_001, "click")])
    again = build([interactions, tmp_path / "feedback"], [items, tmp_path / "items"], tmp_path / "next")
    assert again.catalog.ids == [*catalog.ids, "live"]
    assert again.user_ids == ["newcomer", "u0", "u1", "u2"]
    assert again.catalog.ids[again.items[again.offsets[2] - 1]] == "live"
    assert again.manifest["counts"]["left_out"] == {"dislike": 1}
    assert again.manifest["counts"]["interactions"] == 20
    # A synthetic world's ceiling is known for its own interactions alone.
    assert [(tmp_path / name / "world.json").exists() for name in ("first", "next")] == [True, False]


def test_sources_are_found_by_name(tmp_path):
    paths = write(tmp_path, log(), "csv")
    assert find_sources(tmp_path) == paths
    assert not is_built(tmp_path)
    paths[0].with_suffix(".parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="several interactions files"):
        find_sources(tmp_path)


def test_a_half_written_or_newer_folder_is_named(tmp_path):
    dataset = make(tmp_path, log())
    folder = dataset.root
    assert is_built(folder)
    (folder / "samples.parquet").rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"half written, samples\.parquet is missing"):
        Dataset.load(folder)
    (tmp_path / "aside").rename(folder / "samples.parquet")
    manifest = dataset.manifest | {"schema_version": 99}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="schema version 99"):
        Dataset.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="half written"):
        Dataset.load(folder)
