"""Which version serves: never a worse one by itself, always one whose files are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rporec.config import ConfigError, parse_config
from rporec.files import replacing, write_json
from rporec.promotion import KEPT, better, promote, promote_best, promoted, roll_back
from rporec.run import Run


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "run")


def make(folder: Path, **config) -> Run:
    """A run after stage 1."""
    run = Run.create(folder, parse_config(config), resume=False)
    write(run.warm_model, "warm")
    write(run.head(), "head")
    with run.stage("stage1"):
        pass
    return run


def write(folder: Path, text: str) -> Path:
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text(text)
    return folder


def give(run: Run, version: str, ndcg: float | None) -> None:
    """Promote a version whose weights are its name."""
    promote(run, version, write(run.folder / "made", version), ndcg)


def serving(run: Run) -> tuple[str, str, str]:
    """Version, weights and head that serve."""
    one = promoted(run)
    assert one is not None
    return one.version, (one.model / "weights").read_text(), (one.head / "weights").read_text()


def test_only_more_than_all_before_is_better(run):
    assert better(run, 0.1)  # nothing serves yet
    give(run, "0.1", 0.5)
    assert [better(run, ndcg) for ndcg in (0.4, 0.5, 0.51)] == [False, False, True]
    give(run, "0.2", 0.6)
    roll_back(run)  # to 0.1; what was better than it is still known
    assert [better(run, ndcg) for ndcg in (0.55, 0.6, 0.61)] == [False, False, True]
    for number in range(KEPT):  # by hand, and so many that the folder of the best one is gone
        give(run, f"1.{number}", 0.2)
    assert [better(run, ndcg) for ndcg in (0.55, 0.6, 0.61)] == [False, False, True]


def test_an_unknown_ndcg_is_exceeded_by_any(run):
    promote_best(run)
    assert better(run, 0.0)


def test_a_gain_must_exceed_the_least_gain(tmp_path):
    run = make(tmp_path / "run")
    give(run, "0.1", 0.5)
    assert [better(run, ndcg, 0.25) for ndcg in (0.6, 0.75, 0.76)] == [False, False, True]


def test_the_newest_folders_are_kept_and_going_back_ends_with_them(run):
    assert promoted(run) is None
    with pytest.raises(ConfigError, match="no earlier promotion"):
        roll_back(run)
    names = [f"0.{number}" for number in range(KEPT + 2)]
    for number, name in enumerate(names):
        give(run, name, number / 10)
        assert serving(run) == (name, name, "head")
    assert sorted(path.name for path in (run.folder / "promoted").iterdir()) == names[2:]
    for name in reversed(names[2:-1]):
        assert roll_back(run).version == name
        assert serving(run) == (name, name, "head")
    with pytest.raises(ConfigError, match="no earlier promotion"):
        roll_back(run)
    assert serving(run) == (names[2], names[2], "head")


def test_a_version_that_is_promoted_again_is_the_newest_and_keeps_what_is_known_of_it(run):
    for name, ndcg in (("0.1", 0.5), ("0.2", 0.3)):
        give(run, name, ndcg)
    promote(run, "0.1", write(run.folder / "made", "other weights"), None)
    assert serving(run) == ("0.1", "0.1", "head")
    assert not better(run, 0.4)
    assert roll_back(run).version == "0.2"
    with pytest.raises(ConfigError):
        roll_back(run)


def test_what_was_promoted_outlives_the_best_model_it_was_made_of(run):
    write(run.best_model, "first")
    write_json(run.folder / "best.json", {"attempt": 0, "version": 5, "ndcg@10": 0.4})
    assert promote_best(run).version == "0.5"
    write(run.best_model, "second")
    assert serving(run) == ("0.5", "first", "head")
    write_json(run.folder / "best.json", {"attempt": 1, "version": 7, "ndcg@10": 0.5})
    assert promote_best(run).version == "1.7"
    assert serving(run) == ("1.7", "second", "head")
    assert roll_back(run).version == "0.5"
    assert serving(run) == ("0.5", "first", "head")


def test_without_stage_2_the_model_before_it_serves_and_without_stage_1_none(run, tmp_path):
    promote_best(run)
    assert serving(run) == ("0.0", "warm", "head")
    with pytest.raises(ConfigError, match="promote needs stage stage1"):
        promote_best(Run.create(tmp_path / "new", parse_config({}), resume=False))


def test_a_folder_of_links_is_promoted_with_what_they_lead_to(run, tmp_path):
    """As the hub's cache keeps models: a snapshot of relative links into a folder of blobs."""
    write(tmp_path / "hub" / "blobs", "from the hub")
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "weights").symlink_to("../../blobs/weights")
    promote(run, "0.0", snapshot, None)
    assert serving(run) == ("0.0", "from the hub", "head")


def test_a_model_that_cannot_be_copied_changes_nothing(run):
    give(run, "0.1", 0.5)
    with pytest.raises(FileNotFoundError):
        promote(run, "0.2", run.folder / "none", 0.9)
    assert serving(run) == ("0.1", "0.1", "head")
    assert [path.name for path in (run.folder / "promoted").iterdir()] == ["0.1"]
