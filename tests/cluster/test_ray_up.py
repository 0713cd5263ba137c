"""A training on hosts of its own, by the commands of README's section "A cluster": launched, grown, hit, shrunk, served.

`tests/clusters/test_readme.py` holds on every commit that they are the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from hosts import Hosts, interpreter_folders, missing

from rporec.files import read_json, read_lines

pytestmark = [
    pytest.mark.cluster_hosts,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

ROOT = Path(__file__).parents[2]
HEAD, LEARNER, ROLLOUT, SECOND, REWARD, SERVE = range(6)
TYPES = {HEAD: "head", LEARNER: "learner", ROLLOUT: "rollout", SECOND: "rollout", REWARD: "reward", SERVE: "serve"}
GROUPS = 8
NOTHING = {"state": "", "step": 0, "actors": [], "deaths": []}  # before stage 2
CONFIG = f"""
name: demo
data: {{window: 8, synthetic: {{users: 240, series: 24, volumes: 4, genres: 4, studios: 6, length: 10}}}}
tiny: {{hidden: 64, heads: 2, kv_heads: 1, layers: 1, intermediate: 128, vocabulary: 512, context: 192}}
teacher: {{decision: true}}
warmup: {{steps: 240, batch_size: 16, lr: 6e-3}}
sampling: {{max_tokens: 40}}
head: {{epochs: 2, lr: 2e-3, dim: 32}}
max_staleness: 1
groups_per_step: {GROUPS}
steps: 100000  # until it is stopped
checkpoint_every: 20
max_eval_samples: 60
eval_samples: 0
rl: {{validate_every: 20, validate_samples: 32}}
serve: {{engines: 1}}
"""


@dataclass
class User:
    """Types the commands of the README, with the names of the test's own file, folder, config and ports."""

    hosts: Hosts
    shared: Path
    port: int
    job: str = ""

    @property
    def run(self) -> Path:
        return self.shared / "runs/demo"

    def start(self, command: str) -> subprocess.Popen:
        names = {
            "clusters/ssh.yaml": str(self.hosts.folder / "ssh.yaml"),
            "configs/demo.yaml": str(self.shared / "demo.yaml"),  # where the head sees it too
            "/shared": str(self.shared),
            "8265": str(self.port),
            "10.0.0.10": self.hosts.address(HEAD),
            "JOB": self.job,
        }
        command = re.sub("|".join(map(re.escape, names)), lambda name: names[name[0]], command)
        home = self.hosts.folder / "home"
        environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
        }
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}" if re.match(r"[a-z]+ ", command) else command],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def __call__(self, command: str, seconds: float = 240.0) -> str:
        """What a command prints that must succeed."""
        process = self.start(command)
        said, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{command}\n{said[-4000:]}"
        return said

    @property
    def status(self) -> dict:
        return read_json(self.run / "status.json", {})

    def wait(self, until, what: str, seconds: float = 300.0) -> dict:
        """The first status for which `until` holds."""
        deadline = time.monotonic() + seconds
        while not until(status := self.status or NOTHING):
            if time.monotonic() > deadline:
                log = self.hosts.shell(HEAD, "tail -n 40 /tmp/ray/session_latest/logs/monitor.log")
                pytest.fail(f"{what}: not within {seconds:.0f} s\n{json.dumps(status, indent=1)[:3000]}\n{log}")
            time.sleep(0.5)
        return status

    def goes_on(self, steps: int, seconds: float = 300.0) -> None:
        begun = self.status["step"]
        self.wait(lambda status: status["step"] >= begun + steps, f"{steps} more steps", seconds)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder, shared = tmp_path_factory.mktemp("hosts"), tmp_path_factory.mktemp("shared")
    (shared / "runs").mkdir()
    with Hosts(folder, interpreter_folders(), [shared]) as hosts:
        for index in TYPES:
            hosts.start(index)
        (folder / "ssh.yaml").write_text(yaml.safe_dump(_settings(hosts)))
        (shared / "demo.yaml").write_text(CONFIG)
        (folder / "home").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield User(hosts, shared, port)


def _settings(hosts):
    """clusters/ssh.yaml with these addresses, and the packages of this environment instead of an installation."""
    settings = yaml.safe_load((ROOT / "clusters" / "ssh.yaml").read_text())
    settings["provider"]["hosts"] = {hosts.address(index): type for index, type in TYPES.items()}
    settings["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    settings["idle_timeout_minutes"] = 1
    path = f"export RAY_AUTH_MODE=token PATH={sys.prefix}/bin:$PATH PYTHONPATH=$HOME/rporec"
    keep = [command for command in settings["setup_commands"] if command.startswith("chmod")]
    settings["setup_commands"] = [*keep, f"grep -qs rporec ~/.bashrc || echo '{path}' >> ~/.bashrc"]
    return settings


def alive(status: dict, role: str) -> list[str]:
    return [actor["node"] for actor in status["actors"] if actor["role"] == role and actor["state"] == "ALIVE"]


def test_a_training_on_hosts_of_its_own(user, step):
    hosts = user.hosts

    with step("ray up", "the head answers; its dashboard is on loopback and wants a token; no other node yet"):
        before = {index: hosts.processes(index) for index in TYPES}
        user("ray get-auth-token --generate")
        user("ray up --yes clusters/ssh.yaml")
        assert_guarded(hosts)
        assert not any(hosts.ray_processes(index) for index in TYPES if index != HEAD)
        tunnel = user.start("ray dashboard --port 8265 clusters/ssh.yaml")
        wait(lambda: answers("127.0.0.1", user.port), 60, "the dashboard's tunnel")

    with step("rporec train --address", "code and config travel; each role on a host of its own; Ctrl-C detaches"):
        train = user.start("rporec train configs/demo.yaml --run /shared/runs/demo --address http://127.0.0.1:8265")
        try:
            status = user.wait(
                lambda status: train.poll() is not None or (status["state"] == "RUNNING" and status["step"] >= 2),
                "stage 2",
                600,
            )
            assert train.poll() is None
        except (AssertionError, pytest.fail.Exception) as error:
            train.terminate()
            pytest.fail(f"{error}\n{train.communicate()[0][-4000:]}")
        train.send_signal(signal.SIGINT)
        said, _ = train.communicate(timeout=30)
        assert train.returncode == 0
        assert "detached; the training goes on as job" in said
        user.job = re.search(r"job (rporec-demo-[\w-]+)", said)[1]
        homes = [alive(status, role) for role in ("controller", "learner", "rollout", "reward")]
        assert [len(set(nodes)) for nodes in homes] == [1, 1, 1, 1]
        assert len(set(map(tuple, homes))) == 4
        user.goes_on(3)

    with step(
        "rporec scale --rollout-workers 2", "the autoscaler starts the second rollout host; a worker joins the run"
    ):
        assert not hosts.ray_processes(SECOND)
        user("ray exec clusters/ssh.yaml 'rporec scale /shared/runs/demo --rollout-workers 2'")
        status = user.wait(lambda status: len(set(alive(status, "rollout"))) == 2, "a second worker")
        assert hosts.ray_processes(SECOND)
        user.goes_on(3)

    with step("a rollout host loses its power", "the run goes on; the host, back again, is taken again; no group lost"):
        deaths = len(user.status["deaths"])
        hosts.kill(SECOND)
        user.wait(lambda status: len(status["deaths"]) > deaths, "the death is noticed")
        user.goes_on(3)
        hosts.start(SECOND)
        user.wait(lambda status: len(set(alive(status, "rollout"))) == 2, "a worker on the host that is back")

    with step("a rollout host is cut off for 20 s", "the run goes on meanwhile; a worker there writes on after it"):
        hosts.cut(SECOND)
        begun = time.monotonic()
        user.goes_on(2)
        time.sleep(max(0.0, begun + 20 - time.monotonic()))
        hosts.join(SECOND)
        worked = cpu_seconds(hosts, SECOND, "RolloutWorker")
        user.goes_on(3)
        wait(lambda: cpu_seconds(hosts, SECOND, "RolloutWorker") >= worked + 2, 240, "a worker there works")
        user.wait(lambda status: len(set(alive(status, "rollout"))) == 2, "both workers")

    with step("rporec scale --rollout-workers 1", "the worker finishes and leaves, then its host"):
        user("ray exec clusters/ssh.yaml 'rporec scale /shared/runs/demo --rollout-workers 1'")
        user.wait(lambda status: len(alive(status, "rollout")) == 1, "one worker")
        wait(lambda: not all(hosts.ray_processes(index) for index in (ROLLOUT, SECOND)), 180, "an idle host leaves")
        assert "RUNNING" in user("ray exec clusters/ssh.yaml 'rporec status /shared/runs/demo'")

    with step(
        "ray job stop", "it finishes its step and writes a checkpoint; every step once, every group accounted for"
    ):
        user("ray job stop --address http://127.0.0.1:8265 JOB")
        status = user.status
        assert status["state"] == "STOPPED"
        assert_whole(user.run, status)
        assert (user.run / f"checkpoints/step_{status['step']}").is_dir()

    with step("ray job submit … --resume", "from that checkpoint to its end, the table and the report"):
        more = status["step"] + 3
        (user.shared / "demo.yaml").write_text(CONFIG.replace("steps: 100000 ", f"steps: {more} "))
        said = user(
            "ray job submit --address http://127.0.0.1:8265 --working-dir . -- "
            "rporec train configs/demo.yaml --run /shared/runs/demo --resume",
            300,
        )
        assert "rporec_stage2" in said
        assert_whole(user.run, user.status)
        assert user.status["step"] == more
        assert (user.run / "report.html").exists()

    with step(
        "rporec serve",
        "asked from outside: a token is wanted, items with reasons come back; once stopped its port is closed",
    ):
        user("(umask 077; openssl rand -hex 32 > /shared/token)")
        user(
            "ray job submit --submission-id serving --no-wait --address http://127.0.0.1:8265 -- "
            "rporec serve /shared/runs/demo --host 0.0.0.0 serve.token_file=/shared/token"
        )
        wait(lambda: ready(f"http://{hosts.address(HEAD)}:8000/readyz"), 180, "the service")
        refused = httpx.post(f"http://{hosts.address(HEAD)}:8000/v1/recommend", json={"user_id": "u00000", "k": 3})
        assert refused.status_code == 401
        answer = json.loads(
            user(
                "curl -sS http://10.0.0.10:8000/v1/recommend "
                '--json \'{"user_id": "u00000", "k": 3, "timeout_ms": 20000}\' '
                '-H "Authorization: Bearer $(cat /shared/token)"'
            )
        )
        assert answer["fallback"] is None
        assert len(answer["items"]) == 3
        assert answer["cot"]
        user("ray job stop --address http://127.0.0.1:8265 serving")
        assert not answers(hosts.address(HEAD), 8000)

    with step("ray down", "every host has the processes that it had before, and no more"):
        os.killpg(tunnel.pid, signal.SIGTERM)  # as Ctrl-C would reach its SSH too, and what that runs on the head
        tunnel.wait(30)
        user("ray down --yes clusters/ssh.yaml")
        assert {index: hosts.processes(index) for index in TYPES} == before


def cpu_seconds(hosts: Hosts, index: int, name: str) -> int:
    """Of the processes on a host whose command has `name` in it."""
    lines = hosts.shell(index, "ps -eo cputimes=,args=").splitlines()
    return sum(int(line.split()[0]) for line in lines if name in line)


def assert_guarded(hosts):
    """The dashboard is on loopback, wants a token even there, and the token is for its owner alone."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((hosts.address(HEAD), 8265), 2)
    jobs = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/')"
    assert "401" in hosts.shell(HEAD, f'{sys.executable} -c "{jobs}" 2>&1 || true')
    assert hosts.shell(HEAD, "stat -c %a ~/.ray/auth_token").strip() == "600"


def assert_whole(run: Path, status: dict) -> None:
    """Every step stands once with all its groups; every admitted group was consumed, dropped with a reason, or waits."""
    steps = read_lines(run / "steps.jsonl")
    assert [record["step"] for record in steps] == list(range(status["step"]))
    groups = status["groups"]
    assert groups["CONSUMED"] == status["step"] * GROUPS
    waiting = sum(groups[state] for state in ("PENDING", "RUNNING", "GENERATED", "SCORED", "READY"))
    assert groups["CONSUMED"] + sum(groups["DROPPED"].values()) + waiting == status["admitted"]
    assert groups["DROPPED"].get("poisoned", 0) == 0
    assert max(record["staleness_max"] for record in steps) <= 1


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def ready(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def wait(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(1)
