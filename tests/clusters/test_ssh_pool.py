"""The node provider for plain hosts, on folders that stand for hosts: its commands are run by a real shell in them."""

from __future__ import annotations

import copy
import os
import subprocess

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from clusters.ssh_pool import Ssh, SshPool, check_hosts

HOSTS = {"h0": "head", "r-1": "rollout", "r-2": "rollout", "l1": "learner"}
WORKERS = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
HEAD = {TAG_RAY_NODE_KIND: NODE_KIND_HEAD}


class Hosts:
    """A home folder for each; `ray` there writes down what it was asked."""

    def __init__(self, folder):
        self.folder, self.dead, self.asked = folder, set(), []
        for host in HOSTS:
            (folder / host).mkdir()
            (folder / host / ".bashrc").write_text(f"export PATH={folder}/bin:$PATH\n")
        (folder / "bin").mkdir()
        ray = folder / "bin" / "ray"
        ray.write_text('#!/bin/sh\necho "$@" >> ~/ray.log\n')
        ray.chmod(0o755)

    def __call__(self, host, command, text):
        self.asked.append(host)
        if host in self.dead:
            raise ConnectionError(f"{host}: no route")
        environment = {**os.environ, "HOME": str(self.folder / host)}
        done = subprocess.run(
            ["bash", "-c", command], input=text, capture_output=True, text=True, check=True, env=environment
        )
        return done.stdout

    def ray(self, host):
        log = self.folder / host / "ray.log"
        return log.read_text().split("\n")[:-1] if log.exists() else []


@pytest.fixture
def hosts(tmp_path):
    return Hosts(tmp_path)


def pool(hosts, cluster="c"):
    """A provider as a process that has just started has it."""
    return SshPool({"hosts": HOSTS, "head_node_type": "head"}, cluster, hosts)


def take(provider, type, count=1, kind=NODE_KIND_WORKER):
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: type}
    return [provider.internal_ip(id) for id in provider.create_node({}, tags, count)]


def test_nodes_get_hosts_of_their_type_and_no_more_than_there_are(hosts):
    provider = pool(hosts)
    assert take(provider, "learner") == ["l1"]
    assert sorted(take(provider, "rollout") + take(provider, "rollout")) == ["r-1", "r-2"]
    with pytest.raises(NodeLaunchException, match="1 more rollout wanted"):
        take(provider, "rollout")
    assert len(provider.non_terminated_nodes(WORKERS)) == 3
    assert len(provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: "rollout"})) == 2


def test_a_host_is_not_taken_before_it_has_been_stopped(hosts):
    provider = pool(hosts)
    take(provider, "learner")
    (node,) = provider.non_terminated_nodes({})
    run, refused = hosts.__call__, []

    def meanwhile(host, command, text):  # another thread of the autoscaler looks for a host
        if "ray stop" in command:
            with pytest.raises(NodeLaunchException):
                take(provider, "learner")
            refused.append(host)
        return run(host, command, text)

    provider._shell = meanwhile
    provider.terminate_node(node)
    assert refused == ["l1"]
    assert take(provider, "learner") == ["l1"]


def test_dead_hosts_are_passed_over_and_those_that_answer_are_taken_all_the_same(hosts):
    hosts.dead.add("r-1")
    provider = pool(hosts)
    with pytest.raises(NodeLaunchException, match="1 more rollout wanted"):
        take(provider, "rollout", count=2)
    assert [provider.internal_ip(id) for id in provider.non_terminated_nodes({})] == ["r-2"]
    hosts.dead.clear()
    assert take(provider, "rollout") == ["r-1"]  # it has come back


def test_a_process_that_starts_anew_finds_the_nodes_and_their_tags(hosts):
    first = pool(hosts)
    take(first, "head", kind=NODE_KIND_HEAD)
    take(first, "rollout")
    (node,) = first.non_terminated_nodes(WORKERS)
    first.set_node_tags(node, {"ray-node-status": "up-to-date"})
    again = pool(hosts)
    assert again.non_terminated_nodes(WORKERS) == [node]
    assert again.node_tags(node) == first.node_tags(node) == {
        **WORKERS,
        TAG_RAY_USER_NODE_TYPE: "rollout",
        "ray-node-status": "up-to-date",
    }  # fmt: skip
    assert again.is_running(node)
    assert take(again, "rollout") == ["r-2"]  # not the one that is taken


def test_who_wants_the_head_waits_for_no_other_host(hosts):
    take(pool(hosts), "head", kind=NODE_KIND_HEAD)
    hosts.asked.clear()
    assert len(pool(hosts).non_terminated_nodes(HEAD)) == 1
    assert hosts.asked == ["h0"]


def test_a_node_that_is_given_back_has_its_ray_stopped_and_its_host_is_free_under_a_new_id(hosts):
    provider = pool(hosts)
    take(provider, "learner")
    (node,) = provider.non_terminated_nodes({})
    provider.terminate_node(node)
    assert hosts.ray("l1") == ["stop --force"]
    assert provider.is_terminated(node)
    assert pool(hosts).non_terminated_nodes({}) == []
    provider.set_node_tags(node, {"ray-node-status": "update-failed"})  # its set-up ends late
    assert pool(hosts).non_terminated_nodes({}) == []
    take(provider, "learner")
    assert provider.non_terminated_nodes({}) != [node]


def test_teardown_finds_what_the_autoscaler_started_elsewhere(hosts):
    launcher, autoscaler = pool(hosts), pool(hosts)
    take(launcher, "head", kind=NODE_KIND_HEAD)
    assert launcher.non_terminated_nodes({}) != []  # it has looked at all hosts
    take(autoscaler, "rollout", count=2)
    hosts.dead.add("r-1")
    nodes = launcher.nodes_for_teardown(HEAD) + launcher.nodes_for_teardown(WORKERS)
    assert [launcher.internal_ip(id) for id in nodes] == ["h0", "r-2"]
    launcher.terminate_nodes(nodes)
    assert hosts.ray("h0") == hosts.ray("r-2") == ["stop --force"]
    assert launcher.nodes_for_teardown({}) == []
    hosts.dead.clear()  # too late for `ray down`, which finds it when called again
    assert [launcher.internal_ip(id) for id in launcher.nodes_for_teardown({})] == ["r-1"]


def test_a_node_whose_host_died_can_be_terminated(hosts):
    provider = pool(hosts)
    take(provider, "rollout", count=2)
    hosts.dead.add("r-1")
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []


def test_a_host_is_of_one_cluster_at_a_time(hosts):
    take(pool(hosts, "one"), "learner")
    other = pool(hosts, "other")
    assert other.nodes_for_teardown({}) == []
    with pytest.raises(NodeLaunchException):
        take(other, "learner")


def test_hosts_must_fit_the_types():
    config = {
        "provider": {"hosts": HOSTS},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"max_workers": 0},
            "rollout": {"max_workers": 2},
            "learner": {"max_workers": 1},
        },
    }
    check_hosts(config)
    wrong = copy.deepcopy(config)
    wrong["available_node_types"]["rollout"]["max_workers"] = 3
    with pytest.raises(ValueError, match=r"rollout: 3 wanted, and provider.hosts has 2"):
        check_hosts(wrong)
    wrong["provider"]["hosts"] = {**HOSTS, "h9": "rolout"}
    with pytest.raises(ValueError, match="h9 is a rolout, which is none of head, rollout, learner"):
        check_hosts(wrong)


def test_ssh_is_called_as_the_file_says_and_tells_a_dead_host_from_a_failing_command(tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > $0.args\ncat\neval "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shell = Ssh({"ssh_user": "me", "ssh_private_key": "~/k", "ssh_proxy_command": "nc gate"}, patience=2)
    assert shell("h", "true", "in") == "in"
    words = (tmp_path / "ssh.args").read_text()
    for part in ("-l me", f"-i {os.path.expanduser('~/k')}", "-o ProxyCommand=nc gate", "-o BatchMode=yes", "h true"):
        assert part in words
    with pytest.raises(subprocess.CalledProcessError):
        shell("h", "exit 3")
    with pytest.raises(ConnectionError):
        shell("h", "exit 255")
    with pytest.raises(ConnectionError, match="within 2 s"):
        shell("h", "sleep 20")
