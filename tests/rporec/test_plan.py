"""`rporec plan`: the nodes that a config brings, what is lacking, and the balance from speeds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from actors.forecast import balance
from rporec import cli
from rporec.config import ConfigError, load_config, parse_config
from rporec.files import append_line, write_json
from rporec.plan import Speeds, measured, plan, plan_table, read_pools
from rporec.run import Run

ROOT = Path(__file__).parents[2]
FILE = {
    "head_node_type": "head",
    "max_workers": 9,
    "available_node_types": {
        "head": {"resources": {"CPU": 4}},
        "learner": {"resources": {"learner": 2}, "max_workers": 1},
        "rollout": {"resources": {"rollout": 2}, "min_workers": 1, "max_workers": 3},
        "reward": {"resources": {"reward": 4}, "max_workers": 1},
        "serve": {"resources": {"serve": 3}, "max_workers": 2},
    },
}


@pytest.fixture
def pools(tmp_path):
    """The node types of FILE, after `change`."""

    def read(change=lambda file: None):
        file = copy.deepcopy(FILE)
        change(file)
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(file))
        return read_pools(path)

    return read


def with_gpus(file):
    for name, count in (("learner", 2), ("rollout", 2), ("serve", 1)):
        file["available_node_types"][name]["resources"]["GPU"] = count


def placed(planned, when="full"):
    return {role["role"]: role[when]["placed"] for role in planned["roles"]}


def test_nodes_come_as_roles_need_them_and_no_more(pools):
    planned = plan(parse_config({"rollout_workers": {"min": 2, "max": 5}, "learners": 2}), pools())
    assert planned["fits"] == {"start": True, "full": True}
    assert not planned["cuda"]
    assert {name: (n["start"], n["full"]) for name, n in planned["nodes"].items()} == {
        "head": (1, 1),
        "learner": (1, 1),
        "rollout": (1, 3),
        "reward": (1, 1),
        "serve": (1, 1),
    }
    assert planned["advice"] == []


def test_what_does_not_fit_is_counted_and_the_keys_that_would_make_room_are_named(pools):
    config = parse_config({"rollout_workers": {"min": 1, "max": 9}, "learners": 4})
    planned = plan(config, pools())
    assert planned["fits"] == {"start": False, "full": False}  # the learner group is one piece
    assert placed(planned) == {"rollout": 6, "reward": 1, "learner": 2, "serve: reasoner": 1, "serve: other": 2}
    assert planned["advice"] == ["learner: max_workers: 2 (now 1)", "rollout: max_workers: 5 (now 3)"]

    def widen(file):
        file["available_node_types"]["learner"]["max_workers"] = 2
        file["available_node_types"]["rollout"]["max_workers"] = 5

    assert plan(config, pools(widen))["fits"]["full"]

    def fewer(file):
        widen(file)
        file["max_workers"] = 6

    assert plan(config, pools(fewer))["advice"][-1] == "the whole cluster: max_workers: 9 (now 6)"


def test_with_gpus_roles_take_them_beside_their_places(pools):
    config = parse_config({"engine": {"args": {"tensor_parallel_size": 2}}, "rollout_workers": 3})
    planned = plan(config, pools(with_gpus))
    assert planned["cuda"]
    assert planned["nodes"]["rollout"]["full"] == 3  # two places, but one engine takes both GPUs
    assert placed(planned)["serve: reasoner"] == 0  # its engine spreads as far, and serving nodes have one GPU
    assert "serve: reasoner: no node type has {serve: 1, GPU: 2}" in planned["advice"]

    def two_serve_gpus(file):
        with_gpus(file)
        file["available_node_types"]["serve"]["resources"]["GPU"] = 2

    assert placed(plan(config, pools(two_serve_gpus)))["serve: reasoner"] == 1


def test_a_reasoner_takes_whole_gpus_also_after_a_training_that_shared_one(pools):
    halves = parse_config({"engine": {"gpu_share": 0.5}})
    assert {role["role"]: role["gpus"] for role in plan(halves, pools(with_gpus))["roles"]}["serve: reasoner"] == 1


def test_two_roles_that_share_a_gpu_fit_on_one(pools):
    def one_gpu(file):
        file["available_node_types"]["rollout"]["resources"] |= {"rollout": 1, "learner": 1, "GPU": 1}
        del file["available_node_types"]["learner"]

    halves = {"device": "cuda", "engine": {"gpu_share": 0.5}, "deepspeed": {"gpu_share": 0.5}}
    planned = plan(parse_config(halves), pools(one_gpu))
    assert placed(planned)["rollout"] == placed(planned)["learner"] == 1
    assert planned["nodes"]["rollout"]["full"] == 1
    wholes = plan(parse_config({"device": "cuda"}), pools(one_gpu))
    assert wholes["nodes"]["rollout"]["full"] == 2


def test_reward_workers_take_the_share_of_a_gpu_that_they_are_given(pools):
    def reward_gpu(file):
        with_gpus(file)
        file["available_node_types"]["reward"] = {"resources": {"reward": 4, "GPU": 1}, "max_workers": 1}

    config = {"device": "cuda", "reward_workers": 3}
    assert placed(plan(parse_config(config), pools(reward_gpu)))["reward"] == 3
    assert placed(plan(parse_config(config | {"reward": {"gpu_share": 0.5}}), pools(reward_gpu)))["reward"] == 2
    lacking = plan(parse_config(config | {"reward": {"gpu_share": 0.5}}), pools(with_gpus))["advice"]
    assert "reward: no node type has {reward: 1, GPU: 0.5}" in lacking


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_configs_for_gpus_fit_on_as_many_as_their_names_say(pools, gpus):
    def one_node(file):
        everything = {"rollout": 9, "reward": 9, "learner": 9, "GPU": gpus}
        file["available_node_types"] = {"head": {"resources": everything}}

    config = load_config(ROOT / "configs" / f"gpu_{gpus}x.yaml")
    roles = placed(plan(config, pools(one_node)))
    wanted = config.rollout_workers.max, config.reward_workers.max, config.learners
    assert (roles["rollout"], roles["reward"], roles["learner"]) == wanted
    shares = config.engine.gpu_share, config.reward.gpu_share, config.deepspeed.gpu_share
    assert sum(share * count for share, count in zip(shares, wanted, strict=True)) == gpus


def test_a_cluster_whose_gpus_come_too_late_is_told(pools):
    def nothing_stands(file):
        with_gpus(file)
        file["available_node_types"]["rollout"]["min_workers"] = 0

    assert any("no GPU node stands" in line for line in plan(parse_config({}), pools(nothing_stands))["advice"])
    assert plan(parse_config({}), pools(with_gpus))["advice"] == []


def test_the_advice_is_as_many_workers_as_the_learner_can_use(pools):
    speeds = Speeds(rollout=2.0, learner=0.5)
    config = parse_config({"groups_per_step": 10, "rollout_workers": {"min": 1, "max": 6}})
    assert plan(config, pools(), speeds)["advice"] == ["rollout_workers: 4 keep the learner busy"]
    few = plan(parse_config({"rollout_workers": 3}), pools(), speeds)["advice"]
    assert few == ["rollout_workers: the learner waits until there are 4 (at most 3)"]
    many = plan(parse_config({"rollout_workers": 6}), pools(), speeds)["advice"]
    assert many == ["rollout_workers: 4 keep the learner busy; 2 of 6 add nothing"]
    on_policy = plan(parse_config({"max_staleness": 0, "rollout_workers": 2}), pools(), speeds)["advice"]
    assert "take turns" in on_policy[0]


def test_the_balance_is_what_the_controller_does_with_workers_of_these_speeds(pools):
    speeds, groups = Speeds(rollout=2.0, learner=0.5), 32
    config = parse_config({"groups_per_step": groups, "rollout_workers": {"min": 1, "max": 6}})
    one, six = plan(config, pools(), speeds, balance)["balance"]
    assert (one["workers"], six["workers"]) == (1, 6)
    # Never faster than the slower side; and a tail costs, but not as much again.
    assert groups * speeds.rollout * 0.9 <= one["step_seconds"] <= groups * speeds.rollout * 1.6
    assert groups * speeds.learner <= six["step_seconds"] <= groups * speeds.learner * 1.6
    assert one["learner_waits"] > 0.6
    assert six["learner_waits"] < one["learner_waits"]
    assert six["rollout_waits"] > one["rollout_waits"]
    turns = balance(parse_config({"groups_per_step": groups, "max_staleness": 0}), speeds, 2)
    assert turns["step_seconds"] >= 0.9 * groups * (speeds.rollout / 2 + speeds.learner)
    assert balance(config, speeds, 1) == one


@pytest.fixture
def run(tmp_path):
    """Three workers, half busy, wrote 20 groups in each of the steps of 10 s, of which the learner waited 6."""
    run = Run.create(tmp_path / "run", parse_config({"groups_per_step": 16, "learners": 2}), resume=False)
    for step in range(4):
        seconds = {"wait": 6.0, "total": 10.0} if step else {"wait": 500.0, "total": 600.0}
        line = {"step": step, "seconds": seconds, "generation_seconds": [2.5] * 20, "loads": {"rollout": 0.5}}
        append_line(run.steps, line)
    write_json(run.folder / "status.json", {"actors": [{"role": "rollout"}] * 3 + [{"role": "reward"}]})
    return run


def test_speeds_are_measured_from_a_run_without_its_start(run):
    speeds = measured(run, learners=2)
    assert speeds.rollout == pytest.approx(3 * 0.5 * 10 / 20)
    assert speeds.learner == pytest.approx(4 / 16)
    assert measured(run, learners=1).learner == pytest.approx(8 / 16)
    (run.folder / "status.json").unlink()
    assert measured(run, learners=2).rollout == pytest.approx(1 * 0.5 * 10 / 20)  # what its config says


def test_a_run_without_steps_has_no_speeds(run):
    run.steps.write_text(run.steps.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="too few learner steps"):
        measured(run, learners=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("available_node_types"), "no available_node_types; plan reads"),
        (lambda f: f.update(head_node_type="heat"), "head_node_type: heat is none of head, learner"),
        (lambda f: f["available_node_types"]["rollout"]["resources"].update(rollout=0.5), "0.5 is no whole number"),
        (lambda f: f["available_node_types"]["rollout"].update(max_workers=-1), "-1 is no whole number"),
        (lambda f: f["available_node_types"]["rollout"].update(min_workers=4), "min_workers: 4 is more than"),
        (lambda f: f["available_node_types"]["rollout"].pop("resources"), "rollout.resources: a mapping"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(pools, change, message):
    with pytest.raises(ConfigError, match=message) as refused:
        pools(change)
    assert "\n" not in str(refused.value)


def test_the_command(capsys, run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    demo, ssh = str(ROOT / "configs" / "demo.yaml"), str(ROOT / "clusters" / "ssh.yaml")

    def rporec(*words):
        status = cli.main(["plan", demo, *map(str, words)])
        return status, *capsys.readouterr()

    status, out, _ = rporec("--cluster", ssh, "--json", "--run", run.folder, "--learner-seconds", "0.1")
    assert (status, json.loads(out)["fits"]) == (0, {"start": True, "full": True})
    assert 48 * 0.75 * 0.9 <= json.loads(out)["balance"][0]["step_seconds"] <= 48 * 0.75 * 1.6
    assert rporec("--cluster", ssh, "learners=2")[0] == 2  # not even its start fits
    for words, message in (
        (["--cluster", tmp_path / "none"], "No such file"),
        (["--cluster", ssh, "--rollout-seconds", "1"], "go together"),
        (["--cluster", ssh, "--rollout-seconds", "0", "--learner-seconds", "1"], "more than 0"),
        (["--cluster", ssh, "--run", tmp_path / "none"], "no such run"),
    ):
        status, _, said = rporec(*words)
        assert status == 2
        assert message in said
        assert len(said.splitlines()) == 1


def test_the_table_has_every_role_node_and_advice(pools):
    from rich.console import Console

    console = Console(width=100)
    planned = plan(parse_config({"rollout_workers": 9}), pools(), Speeds(2.0, 0.5), balance)
    with console.capture() as shown:
        console.print(plan_table(planned))
    for part in ("serve: reasoner", "6 of 9", "allowed", "learner waits", "rollout: max_workers: 5 (now 3)"):
        assert part in shown.get()
