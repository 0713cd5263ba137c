"""The run directory and its files: what a crash leaves behind can be read, and resumed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rporec.config import ConfigError, parse_config
from rporec.files import append_line, read_json, read_lines, replacing, write_json
from rporec.run import Run
from rporec.status import read_status, status_table

CONFIG = parse_config({"steps": 3})

HOLD = """
import sys, time
from pathlib import Path
from rporec.run import Run
from rporec.status import read_status
with Run(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", CONFIG, resume=False)


# --- files -----------------------------------------------------------------------------------
def test_an_exception_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with contextlib.suppress(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_folder_and_no_temporary(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    with contextlib.suppress(KeyError), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("half")
        raise KeyError
    assert (path / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "model"
    for name in ("one", "two"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("held", [False, True])
def test_a_rename_waits_for_the_disk(tmp_path, disk, held):
    path = tmp_path / "model"
    if held:
        path.mkdir()
    with replacing(path) as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "weights").touch()
        (temporary / "link").symlink_to("nowhere")
    named = disk.index(f"rename {path}")
    assert {f"sync {one}" for one in (temporary, temporary / "deep", temporary / "deep/weights")} <= set(disk[:named])
    assert disk[-1] == f"sync {tmp_path}"


def test_a_mount_that_cannot_sync_folders_can_be_written_to(tmp_path, monkeypatch):
    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "a.json", {"new": 1})
    assert read_json(tmp_path / "a.json") == {"new": 1}


def test_a_block_that_wrote_nothing_keeps_the_old_folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_crashed_process_of_the_same_number_left_is_no_obstacle(tmp_path):
    path = tmp_path / "model"
    for left in (path, *(tmp_path / f".model.{os.getpid()}.{kind}" for kind in ("tmp", "old"))):
        left.mkdir()
        (left / "weights").touch()
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_left_out_and_hides_nothing_after_it(tmp_path):
    path = tmp_path / "steps.jsonl"
    assert read_lines(path) == []
    append_line(path, {"step": 0, "note": "käse\u2028\x85"})
    with path.open("ab") as file:
        file.write('{"step": 1, "note": "kä'.encode()[:-1])  # cut in the middle of a character
    assert read_lines(path) == [{"step": 0, "note": "käse\u2028\x85"}]
    append_line(path, {"step": 2})
    assert [record["step"] for record in read_lines(path)] == [0, 2]


def test_damaged_json_is_one_line_with_its_path(tmp_path):
    path = tmp_path / "stages.json"
    path.write_text('{"data": ')
    with pytest.raises(ConfigError, match=r"stages\.json: damaged") as fault:
        read_json(path)
    assert "\n" not in str(fault.value)


# --- run -------------------------------------------------------------------------------------
def test_a_new_run_keeps_its_config_and_opens_again(run):
    assert Run.open(run.folder).config() == CONFIG


def test_a_run_stays_where_it_is_when_a_worker_changes_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Run.create(Path("run"), CONFIG, resume=False)
    assert made == Run.open(Path("run")) == Run(tmp_path / "run")


def test_a_folder_that_holds_a_run_wants_resume(run):
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        Run.create(run.folder, CONFIG, resume=False)
    assert Run.create(run.folder, CONFIG, resume=True).config() == CONFIG


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(ConfigError, match="not empty and not a run"):
        Run.create(tmp_path, CONFIG, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        Run.create(tmp_path / "run", CONFIG, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"rl": {"lr": 1e-3}}, "rl.lr"),
        ({"lora": {"rank": 8}}, "lora"),
        ({"tiny": {"layers": 3}}, "tiny.layers"),
    ],
)
def test_resume_names_the_key_that_contradicts(run, change, key):
    with pytest.raises(ConfigError, match=f"with another {key} than"):
        Run.create(run.folder, parse_config({"steps": 3, **change}), resume=True)


def test_a_resumed_run_may_go_on_longer_and_on_more_machines(run):
    workers = {"rollout_workers": 4, "reward_workers": 2, "learners": 2}
    longer = parse_config({"steps": 30, "checkpoint_every": 5, "name": "x", **workers})
    assert Run.create(run.folder, longer, resume=True) == run


def test_what_ran_out_of_memory_or_patience_may_be_resumed_with_more_of_it(run):
    engine = {"max_num_seqs": 8, "kv_cache_mb": 64, "gpu_share": 0.5, "timeout": 600}
    calmer = parse_config({"steps": 3, "engine": engine, "reward": {"timeout": 600}})
    assert Run.create(run.folder, calmer, resume=True) == run


def test_a_key_that_came_after_the_run_began_is_no_contradiction(run):
    held = read_json(run.config_path)
    del held["rl"]["max_tries"]
    write_json(run.config_path, held)
    Run.create(run.folder, CONFIG, resume=True)


def test_a_run_that_another_process_trains_is_refused_until_that_one_is_gone(run):
    with subprocess.Popen([sys.executable, "-c", HOLD, run.folder], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with (
                pytest.raises(ConfigError, match=rf"process {holder.pid} on .* trains it; .*delete .*/lock"),
                run.locked(),
            ):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with run.locked():
        assert (run.folder / "lock").read_text().startswith(f"process {os.getpid()} on ")
    with run.locked():  # and after one that ended by itself
        pass


def test_storage_without_locks_can_be_trained_on(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run.locked():
        pass


def test_no_run_and_half_a_run_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="no such run"):
        Run.open(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"not a run directory \(no config\.json\)"):
        Run.open(tmp_path)


def test_a_config_of_another_version_names_its_file(run):
    write_json(run.config_path, {"step": 3})
    with pytest.raises(ConfigError, match=r"config\.json: step: unknown config key; did you mean steps"):
        run.config()


def test_a_stage_is_finished_when_its_block_ends_and_keeps_notes_and_cost(run):
    with run.stage("data") as notes:
        assert not run.finished("data")
        notes["users"] = 5
    entry = read_json(run.folder / "stages.json")["data"]
    assert entry["users"] == 5
    assert entry["seconds"] >= 0
    with pytest.raises(KeyError), run.stage("warmup"):
        raise KeyError
    assert run.finished("data")
    assert not run.finished("warmup")
    with pytest.raises(ConfigError, match="evaluate needs stage stage1"):
        run.require("stage1", "evaluate")


def test_paths_follow_what_was_made(run, tmp_path):
    assert run.data == run.folder / "data"
    write_json(run.folder / "data.json", {"path": str(tmp_path / "elsewhere")})
    assert run.data == tmp_path / "elsewhere"
    assert run.warm_model == run.backbone
    (run.folder / "warmup" / "model").mkdir(parents=True)
    assert run.warm_model == run.folder / "warmup" / "model"


# --- status ----------------------------------------------------------------------------------
def test_status_before_stage_2_names_the_stage_that_comes_next(run):
    assert read_status(run)["state"] == "before data"
    with run.stage("data"):
        pass
    status = read_status(run)
    assert status["state"] == "before warmup"
    assert json.loads(json.dumps(status))["groups"]["DROPPED"] == {}
    assert status_table(status).row_count > 0


def test_a_controller_that_fell_silent_is_lost_and_its_failure_is_shown(run):
    from rich.console import Console

    actor = {"role": "rollout", "name": "rollout-0", "node": "n", "pid": 1, "state": "ALIVE"}
    groups = {**dict.fromkeys(("PENDING", "RUNNING", "GENERATED", "SCORED", "READY", "CONSUMED"), 0), "DROPPED": {}}
    said = {"state": "RUNNING", "time": 0, "step": 2, "version": 2, "groups": groups, "actors": [actor]}
    deaths = [{"name": "reward-1", "pid": 7, "message": "killed [9]"}]
    write_json(run.folder / "status.json", {**said, "failure": "cannot open [/tmp/x]", "deaths": deaths})
    status = read_status(run)
    assert status["state"] == "LOST"
    assert [actor["state"] for actor in status["actors"]] == ["LOST"]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(status_table(status))
    assert "cannot open [/tmp/x]" in shown.get()
    assert "reward-1, pid 7: killed [9]" in shown.get()


def test_a_status_that_a_power_loss_took_is_none(tmp_path):
    run = Run.create(tmp_path / "run", parse_config({}), resume=False)
    assert run.status() == {}
    for torn in (b"", b'{"state": "RUN'):
        (run.folder / "status.json").write_bytes(torn)
        assert run.status() == {}
        assert read_status(run)["state"] == "before data"
    write_json(run.folder / "status.json", {"state": "RUNNING"}, lasting=False)
    assert run.status() == {"state": "RUNNING"}


@pytest.mark.parametrize("replaced", [True, False], ids=["halfway", "between the renames"])
def test_the_next_training_clears_up_after_one_that_was_killed_while_it_wrote_its_best_model(
    tmp_path: Path, replaced: bool
) -> None:
    """Of gigabytes, under the number of a process that does not come again."""
    run = Run(tmp_path)
    if replaced:
        run.best_model.mkdir()
        (run.best_model / "model").write_text("best")
    else:
        (tmp_path / ".best.123.old").mkdir()
        (tmp_path / ".best.123.old" / "model").write_text("best")
    (tmp_path / ".best.124.tmp").mkdir()
    (tmp_path / ".promoted.json.125.tmp").touch()  # `rporec promote` may be writing it now
    with run.locked():
        assert (run.best_model / "model").read_text() == "best"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".promoted.json.125.tmp", "best", "lock"]
