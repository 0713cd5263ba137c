"""The command line: bad input ends with status 2 and one line that says where and what to do, and leaves nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rporec import cli
from rporec.config import parse_config
from rporec.files import write_json
from rporec.run import Run

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
COMMANDS = (
    "data",
    "data build",
    "data synthetic",
    "data download",
    "train",
    "evaluate",
    "study",
    "status",
    "plan",
    "report",
    "export",
    "debug",
    "debug rollouts",
    "debug rewards",
    "debug learner",
    "doctor",
)

ITEMS = "item_id,title\n" + "".join(f"i{n},Item {n}\n" for n in range(4))
HEADER = "user_id,item_id,timestamp\n"
ROWS = "".join(f"u{n % 2},i{n % 4},{n}\n" for n in range(24))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; the process's own handler of SIGTERM comes back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def rporec(here, capsys):
    """Run the command in this process: (exit status, stdout, stderr)."""

    def command(*words: str | Path) -> tuple[int, str, str]:
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def refused(rporec, here):
    """The one line of a command that must fail, which may not touch the working directory."""

    def command(*words: str | Path) -> str:
        before = tree(here)
        status, _, said = rporec(*words)
        assert status == 2
        assert len(said.splitlines()) == 1, said
        assert said.startswith("rporec")
        assert tree(here) == before
        return said

    return command


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def run(here):
    """A run that began and finished no stage."""
    return Run.create(here / "run", parse_config({"name": "demo", "steps": 3}), resume=False)


# --- help and usage ----------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(rporec, command):
    status, said, _ = rporec(*command.split(), "--help")
    assert status == 0
    assert said.startswith(f"usage: rporec {command}".strip())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", "the following arguments are required: COMMAND; see rporec --help"),
        ("serv", "invalid choice: 'serv'"),
        ("train", "rporec train: the following arguments are required: CONFIG.yaml; see rporec train --help"),
        ("data build --items i.csv --out d", "the following arguments are required: --interactions"),
        ("data build --window ten", "argument --window: invalid int value: 'ten'"),
        ("train c.yaml --sped 3", "unrecognized arguments: --sped"),
        ("status run more", "unrecognized arguments: more"),
    ],
)
def test_wrong_usage_is_one_line(refused, words, wanted):
    assert wanted in refused(*words.split())


def test_the_installed_command_ends_as_the_function_does(here):
    done = subprocess.run(
        [sys.executable, "-m", "rporec.cli", "status", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "rporec: nowhere: no such run; `rporec train CONFIG --run nowhere` makes one\n"


def test_debug_keeps_the_traceback(here):
    with pytest.raises(ValueError, match="no such run"):
        cli.main(["status", "nowhere", "--debug"])


# --- train: config -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["group_sizes=8"], "group_sizes: unknown config key; did you mean group_size?"),
        (["rl.lrr=1"], "rl.lrr: unknown config key; did you mean lr?"),
        (["steps=-1"], "steps: "),
        (["rl.correction=none"], "rl.correction: none needs max_staleness: 0"),
        (["teacher.kind=openai", "teacher.model=m"], "teacher.kind: openai needs teacher.base_url"),
        (["tiny.hidden=128", "tiny.heads=8", "tiny.kv_heads=2"], "tiny: hidden / heads is 16"),
        (["reward.custom=nowhere"], "reward.custom: 'nowhere' is not module:function"),
        (["reward.custom=no_such_module:f"], "reward.custom: cannot import 'no_such_module'"),
        (["reward.custom=json:no_such_function"], "reward.custom: module 'json' has no function"),
        (["data.path=nowhere"], "nowhere: no such folder; it should hold interactions.* and items.*"),
        (["seed"], "'seed': an override is key=value"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_anything_starts(refused, overrides, wanted):
    assert wanted in refused("train", DEMO, *overrides)


def test_credentials_in_a_url_are_neither_kept_nor_repeated(refused):
    said = refused("train", DEMO, "--data", "https://me:secret@127.0.0.1/log")
    assert "data.path: the URL holds credentials" in said
    assert "secret" not in said


def test_a_config_file_that_cannot_be_read_is_named(refused, here):
    assert "none.yaml: no such config file" in refused("train", "none.yaml")
    (here / "list.yaml").write_text("- a\n- b\n")
    assert "list.yaml: a config is a mapping of keys, not a list" in refused("train", "list.yaml")
    (here / "torn.yaml").write_text("rl: {lr: 1")
    assert "torn.yaml: not valid YAML" in refused("train", "torn.yaml")
    assert "Is a directory" in refused("train", here)


def test_overrides_may_stand_behind_options(refused):
    assert "sed: unknown config key" in refused("train", DEMO, "--run", "x", "steps=1", "--stages", "data", "sed=1")


# --- train: run and stages ---------------------------------------------------------------------
def test_a_run_folder_is_never_overwritten(refused, run, here):
    assert "run: holds a run already; add --resume" in refused("train", DEMO, "--run", "run")
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").touch()
    assert "mine: not empty and not a run" in refused("train", DEMO, "--run", "mine")
    assert "new: no run to resume here" in refused("train", DEMO, "--run", "new", "--resume")


def test_a_run_that_trains_is_left_as_it_is(refused, run, here):
    with run.locked():
        said = refused("train", run.config_path, "--run", "run", "--resume", "--stages", "data")
    assert "trains it; stop that one or wait for its end" in said


def test_resume_with_a_contradiction_names_the_key(refused, run):
    assert "--resume with another backbone than" in refused(
        "train", DEMO, "--run", "run", "--resume", "backbone=x/y", "reward.faithfulness=0"
    )


def test_stages_are_known_and_in_reach(refused, run):
    assert "--stages: 'stage3' is none of data, warmup, stage1, stage2, evaluate" in refused(
        "train", DEMO, "--stages", "data,stage3"
    )
    assert "--stages: stage1 needs warmup, which runs/demo has not finished" in refused(
        "train", DEMO, "--stages", "data,stage1"
    )
    assert "stage2 needs data, which run has not" in refused("train", DEMO, "--run", "run", "--stages", "stage2")


def test_an_address_where_no_cluster_answers_is_refused_at_once(refused):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert f"--address {address}: no Ray cluster answers there" in refused("train", DEMO, "--address", address)
    assert "write HOST:PORT" in refused("train", DEMO, "--address", "cluster")


def test_the_data_stage_alone_needs_no_cluster_and_can_be_resumed(rporec, here):
    small = ["data.synthetic.users=60", "data.synthetic.series=6"]
    status, _, said = rporec("train", DEMO, "--run", "run", "--stages", "data", *small)
    assert (status, said) == (0, "")
    assert Run.open(here / "run").finished("data")
    assert "nothing left to do" in rporec("train", DEMO, *small, "--run", "run", "--resume", "--stages", "data")[1]


def test_a_run_of_data_alone_is_evaluated_without_a_cluster(here, rporec, refused):
    small = ["data.synthetic.users=60", "data.synthetic.series=8", "data.synthetic.genres=4"]
    assert rporec("train", DEMO, *small, "--run", "run", "--stages", "data")[0] == 0
    assert "evaluate.baselines: 'rulez' is none of all, none, " in refused("evaluate", "run", "--baselines", "rulez")
    said = refused("evaluate", "run", "rl.lr=1e-3", "--baselines", "popularity")
    assert "run: evaluate takes no other rl.lr than the run's, which shaped what it learned" in said
    assert rporec("evaluate", "run", "--baselines", "popularity,rules")[0] == 0
    summary = json.loads((here / "run" / "metrics.json").read_text())
    methods = summary["conventions"]["exclude_history"]["methods"]
    assert set(methods) == {"popularity", "rules", "oracle"}
    assert 0 < methods["rules"]["coverage@10"] <= 1
    assert summary["baselines"]["rules"]["tried"] == 45
    assert set(summary["conventions"]["all"]["by_popularity"]) == {"head", "middle", "tail"}


# --- study -------------------------------------------------------------------------------------
def test_a_study_that_cannot_be_made_is_refused_before_anything_starts(refused):
    assert "study: say CONFIG.yaml, or --tables" in refused("study", "--seed", "0")
    assert "--tables takes no CONFIG.yaml" in refused("study", DEMO, "--tables", "there")
    assert "there: no results of a study here" in refused("study", "--tables", "there")
    assert "sed: unknown config key" in refused("study", DEMO, "--seed", "0", "sed=1")
    assert "nowhere: no such folder" in refused("study", DEMO, "--data", "nowhere")


# --- the other commands on runs ----------------------------------------------------------------
@pytest.mark.parametrize("command", ["evaluate", "status", "report", "export --out o"])
def test_no_run_and_half_a_run_are_refused(refused, here, command):
    name, *options = command.split()
    assert "nowhere: no such run" in refused(name, "nowhere", *options)
    (here / "half").mkdir()
    (here / "half" / "stages.json").write_text("{}")
    assert "half: not a run directory (no config.json)" in refused(name, "half", *options)


@pytest.mark.parametrize(("command", "stage"), [("evaluate", "data"), ("export --out o", "stage1")])
def test_a_run_that_has_not_come_so_far_says_so(refused, run, command, stage):
    name, *options = command.split()
    assert f"{name} needs stage {stage}, which has not finished" in refused(name, "run", *options)


@pytest.mark.parametrize("command", ["evaluate", "status", "export --out o"])
def test_a_damaged_file_of_a_run_is_named(refused, run, command):
    (run.folder / "stages.json").write_text('{"data": {"sec')
    name, *options = command.split()
    assert "stages.json: damaged, not valid JSON" in refused(name, "run", *options)


def test_export_never_overwrites(refused, run, here):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").touch()
    assert "out: exists and is not empty; choose another --out" in refused("export", "run", "--out", "out")


def test_status_of_a_young_run(rporec, run):
    status, said, _ = rporec("status", "run", "--json")
    assert status == 0
    assert json.loads(said)["state"] == "before data"
    assert "before data" in rporec("status", "run")[1]


# --- data --------------------------------------------------------------------------------------
FAULTS = {
    "missing column": (HEADER.replace("item_id", "item") + ROWS, ITEMS, "interactions.csv: column 'item_id': missing"),
    "null key": (HEADER + ROWS + ",i1,9\n", ITEMS, "interactions.csv: row 25, column 'user_id': empty"),
    "no time": (HEADER + ROWS + "u1,i1,soon\n", ITEMS, "row 25, column 'timestamp': 'soon' is no time"),
    "duplicate item": (HEADER + ROWS, ITEMS + "i2,Again\n", "items.csv: row 5, column 'item_id': 'i2' stands there"),
    "unknown item": (HEADER + ROWS + "u1,i9,9\n", ITEMS, "row 25, column 'item_id': 'i9' is not among the items"),
    "empty split": (HEADER + "u0,i0,0\nu0,i1,1\n", ITEMS, "leaves train without samples"),
    "one item": (HEADER + ROWS, "item_id,title\ni0,One\n", "items.csv: 1 item; a catalogue needs at least two"),
    "not UTF-8": (HEADER + ROWS, ITEMS.encode() + b"i4,caf\xe9\n", "items.csv: row 5, column 'title': not UTF-8"),
}


def put(folder: Path, interactions: str, items: str | bytes) -> list[str]:
    (folder / "interactions.csv").write_text(interactions)
    (folder / "items.csv").write_bytes(items if isinstance(items, bytes) else items.encode())
    return ["--interactions", "interactions.csv", "--items", "items.csv", "--out", "built"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_data_is_one_line_with_its_place(refused, here, name):
    interactions, items, wanted = FAULTS[name]
    assert wanted in refused("data", "build", *put(here, interactions, items))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--window 0", "window 0: use at least 1"),
        ("--k-core -1", "k-core -1: use 0 for none"),
        ("--split random", "'random'"),
        ("--items none.csv", "none.csv: no such file"),
        ("--out .", "exists and is not empty"),
    ],
)
def test_a_bad_option_of_data_build_is_named(refused, here, options, wanted):
    assert wanted in refused("data", "build", *put(here, HEADER + ROWS, ITEMS), *options.split())


def test_good_data_are_built_and_counted(rporec, here):
    status, said, complaints = rporec("data", "build", *put(here, HEADER + ROWS, ITEMS))
    assert (status, complaints) == (0, "")
    assert "built: 2 users, 4 items, 24 interactions" in said


def test_several_sources_are_built_and_what_is_no_choice_is_told(rporec, here):
    words = put(here, HEADER + ROWS, ITEMS)
    (here / "more.csv").write_text("user_id,item_id,timestamp,event\nu1,i4,90,click\nu2,i4,91,dislike\n")
    (here / "more_items.csv").write_text("item_id,title,genre\ni4,Item 4,g\n")
    more = ["--interactions", "more.csv", "--items", "items.csv", "more_items.csv"]
    status, said, complaints = rporec("data", "build", *words[:2], *more, *words[-2:])
    assert (status, complaints) == (0, "")
    assert "built: 2 users, 5 items, 25 interactions" in said
    assert "left out: 1 dislike" in said


def test_the_embedded_world_is_written_whole_or_not_at_all(rporec, refused, here):
    small = ["data.synthetic.users=40", "data.synthetic.series=5"]
    status, said, _ = rporec("data", "synthetic", "--out", "world", *small)
    assert status == 0
    assert "world/source: raw files; world/data: 40 users" in said
    (here / "half" / "data").mkdir(parents=True)
    (here / "half" / "data" / "mine").touch()
    assert "half/data: exists and is not empty" in refused("data", "synthetic", "--out", "half", *small)
    assert "unknown config key" in refused("data", "synthetic", "--out", "other", "sed=1")


def test_an_unknown_public_data_set_is_refused_without_a_look_at_the_net(refused):
    assert "movielens" in refused("data", "download", "movilens-100k", "--out", "there")


def test_a_path_that_cannot_be_written_is_one_line(refused, here):
    words = put(here, HEADER + ROWS, ITEMS)
    words[-1] = "items.csv/built"
    assert "items.csv" in refused("data", "build", *words)


# --- what goes wrong later -----------------------------------------------------------------------
class FromActor(ValueError):
    """As Ray raises what an actor raised: a subclass of the cause's class that carries the cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback\nof another process")
        self.cause = cause


def test_a_config_error_in_an_actor_is_one_line_and_a_bug_keeps_its_traceback(rporec, run, monkeypatch):
    from rporec import status
    from rporec.config import ConfigError

    monkeypatch.setattr(status, "read_status", lambda _: (_ for _ in ()).throw(FromActor(ConfigError("rl.lr: no"))))
    assert rporec("status", "run") == (2, "", "rporec: rl.lr: no\n")
    monkeypatch.setattr(status, "read_status", lambda _: (_ for _ in ()).throw(FromActor(ValueError("a bug"))))
    with pytest.raises(FromActor):
        cli.main(["status", "run"])


def test_a_signal_ends_the_command_with_130(rporec, run, monkeypatch):
    from rporec import status

    monkeypatch.setattr(status, "read_status", lambda _: signal.raise_signal(signal.SIGTERM))
    assert rporec("status", "run") == (130, "", "rporec: stopped\n")


def test_doctor_ends_with_2_where_nothing_can_run(rporec, monkeypatch):
    from rporec import doctor

    finding = {"name": "torch", "value": "missing", "verdict": "fail", "advice": "make setup"}
    for can_run, status in ((True, 0), (False, 2)):
        report = {"can_run": can_run, "findings": [finding]}
        monkeypatch.setattr(doctor, "examine", lambda address, report=report: report)
        assert rporec("doctor", "--json")[:2] == (status, json.dumps(report) + "\n")
        found = rporec("doctor")
        assert found[0] == status
        assert "make setup" in found[1]


def test_a_run_remembers_where_its_data_lie(rporec, here):
    """`--data` with a built data set copies nothing."""
    rporec("data", "build", *put(here, HEADER + ROWS, ITEMS))
    status, _, said = rporec("train", DEMO, "--data", "built", "--run", "run", "--stages", "data")
    assert (status, said) == (0, "")
    assert Run.open(here / "run").data == here / "built"
    write_json(here / "run" / "stages.json", {})
    assert not Run.open(here / "run").finished("data")
