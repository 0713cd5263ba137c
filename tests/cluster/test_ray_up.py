"""`ray up` on hosts with SSH: the head stands, nodes come when a role asks and go when it rests, `ray down` leaves nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosts import Hosts, interpreter_folders, missing

pytestmark = [
    pytest.mark.cluster_hosts,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

ROOT = Path(__file__).parents[2]
HEAD, ROLLOUTS = 0, (1, 2)
ASK = """
import ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=0, resources={"rollout": 1})
class Worker:
    def where(self):
        return ray.util.get_node_ip_address()

workers = [Worker.remote() for _ in range(2)]
print("at", *sorted(ray.get([worker.where.remote() for worker in workers])), flush=True)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(folder, interpreter_folders(), []) as hosts:
        for index in (HEAD, *ROLLOUTS):
            hosts.start(index)
        yield hosts


@pytest.fixture(scope="module")
def ray(hosts):
    """Run `ray WORD clusters/ssh.yaml …` as a user does, with the addresses and the set-up of these hosts."""
    file = hosts.folder / "ssh.yaml"
    file.write_text(yaml.safe_dump(_settings(hosts)))
    home = hosts.folder / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_UP_enable_autoscaler_v2": "1",
    }

    def run(word, *words, seconds=240.0):
        done = subprocess.run(
            ["ray", word, file, *words],
            cwd=ROOT, env=environment, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, stdout=subprocess.DEVNULL)
    return run


def _settings(hosts):
    settings = yaml.safe_load((ROOT / "clusters" / "ssh.yaml").read_text())
    addresses = {hosts.address(HEAD): "head", **{hosts.address(index): "rollout" for index in ROLLOUTS}}
    settings["provider"]["hosts"] = addresses
    settings["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    for name in ("learner", "reward", "serve"):
        del settings["available_node_types"][name]
    settings["max_workers"] = 2
    settings["idle_timeout_minutes"] = 0.2
    path = (
        f"export RAY_AUTH_MODE=token PATH={sys.prefix}/bin:$PATH PYTHONPATH=$HOME/rporec AUTOSCALER_UPDATE_INTERVAL_S=1"
    )
    keep = [command for command in settings["setup_commands"] if command.startswith("chmod")]
    settings["setup_commands"] = [*keep, f"grep -qs rporec ~/.bashrc || echo '{path}' >> ~/.bashrc"]
    return settings


def assert_guarded(hosts):
    """The dashboard is on loopback, wants a token even there, and the token is for its owner alone."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((hosts.address(HEAD), 8265), 2)
    jobs = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/')"
    assert "401" in hosts.shell(HEAD, f'{sys.executable} -c "{jobs}" 2>&1 || true')
    assert hosts.shell(HEAD, "stat -c %a ~/.ray/auth_token").strip() == "600"


def wait(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(1)


def test_nodes_come_and_go_and_nothing_is_left(hosts, ray):
    ray("up", "--yes", "--no-config-cache")
    assert hosts.ray_processes(HEAD)
    assert_guarded(hosts)
    assert not any(hosts.ray_processes(index) for index in ROLLOUTS)  # nobody asked yet
    hosts.shell(HEAD, f"cat > ask.py <<'END'\n{ASK}\nEND")
    said = ray("exec", "python ask.py")
    assert "at " + " ".join(hosts.address(index) for index in ROLLOUTS) in said
    wait(lambda: not any(hosts.ray_processes(index) for index in ROLLOUTS), 120, "idle nodes leave")
    assert hosts.ray_processes(HEAD)
    hosts.kill(ROLLOUTS[0])  # a dead host is passed over
    hosts.shell(HEAD, "sed -i 's/range(2)/range(1)/' ask.py")
    assert f"at {hosts.address(ROLLOUTS[1])}" in ray("exec", "python ask.py")
    hosts.start(ROLLOUTS[0])
    ray("down", "--yes")
    for index in (HEAD, *ROLLOUTS):
        assert hosts.ray_processes(index) == []
