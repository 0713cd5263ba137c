"""The feedback log: what processes append is seen by all of them, once, and never in halves."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from rporec.data import feedback
from rporec.data.feedback import FeedbackLog, Reaction
from rporec.files import FolderWatch

PARTS = 10


def reaction(user: str, number: int) -> Reaction:
    return Reaction(user, f"i{number}", 1_700_000_000 + number, "click")


def _talk(folder: Path, name: str, barrier, pipe) -> None:
    """Append PARTS parts and read in between; send all that was read."""
    log = FeedbackLog(folder)
    barrier.wait(60)
    found = []
    for number in range(PARTS):
        log.append([reaction(name, 2 * number), reaction(name, 2 * number + 1)])
        found += log.news()
    barrier.wait(60)
    pipe.send(found + log.news() + log.news())


def test_two_processes_see_every_event_of_both_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, ends, processes = spawn.Barrier(2), [], []
    for name in ("a", "b"):
        here, there = spawn.Pipe(duplex=False)
        processes.append(spawn.Process(target=_talk, args=(tmp_path / "feedback", name, barrier, there)))
        processes[-1].start()
        there.close()
        ends.append(here)
    found = [end.recv() for end in ends]
    for process in processes:
        process.join()
    wanted = [reaction(name, number) for name in ("a", "b") for number in range(2 * PARTS)]
    for seen in found:
        assert sorted(seen, key=lambda one: (one.user_id, one.timestamp)) == wanted


def test_events_come_in_the_order_of_their_parts_and_only_once(tmp_path):
    writer, reader = FeedbackLog(tmp_path / "feedback"), FeedbackLog(tmp_path / "feedback")
    assert reader.news() == []  # no folder yet
    events = [reaction("ü", number) for number in range(6)]
    for start in (0, 2, 4):
        writer.append(events[start : start + 2])
    assert reader.news() == events
    assert reader.news() == []
    assert FeedbackLog(tmp_path / "feedback").news() == events  # of a process that starts later


def test_a_part_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def half(table, path, **options):
        Path(path).write_bytes(b"PAR1")
        raise OSError("disk full")

    log = FeedbackLog(tmp_path / "feedback")
    with monkeypatch.context() as patch:
        patch.setattr(feedback.pq, "write_table", half)
        with pytest.raises(OSError, match="disk full"):
            log.append([reaction("u", 0)])
    assert list((tmp_path / "feedback").iterdir()) == []
    log.append([reaction("u", 1)])
    assert log.news() == [reaction("u", 1)]


def test_a_watch_misses_nothing_that_comes_within_the_same_tick(tmp_path, monkeypatch):
    folder, tick = tmp_path / "folder", 10**18
    watch = FolderWatch(folder)
    assert not watch.changed()
    folder.mkdir()
    monkeypatch.setattr("rporec.files.time.time_ns", lambda: tick + 4_000_000)
    for number in range(3):
        (folder / str(number)).touch()
        os.utime(folder, ns=(tick, tick))  # as a file system marks it whose clock is coarse
        assert watch.changed()


def test_a_watch_is_silent_about_a_folder_that_rests(tmp_path):
    watch = FolderWatch(tmp_path)
    os.utime(tmp_path, ns=(10**18, 10**18))
    assert [watch.changed() for _ in range(3)] == [True, False, False]
    (tmp_path / "new").touch()
    assert watch.changed()
