"""`ray up`, scaling and `ray down` of clusters/aws.yaml: moto's server is AWS, hosts with SSH stand at its addresses.

What the machines are asked to be like: tests/clusters/test_aws.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import boto3
import pytest
import yaml
from hosts import NETWORK, Hosts, interpreter_folders, missing

pytestmark = [
    pytest.mark.cluster_hosts,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

ROOT = Path(__file__).parents[2]
SETTINGS = yaml.safe_load((ROOT / "clusters" / "aws.yaml").read_text())
REGION = SETTINGS["provider"]["region"]
ROLE = "ray-autoscaler-v1"
SUBNET = f"{NETWORK}.16/28"
FIRST = 10  # index of the host with the first address that AWS gives away there: it keeps four for itself
ASK = """
import sys
import ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=0)
class Worker:
    def where(self):
        return ray.util.get_node_ip_address()

workers = [Worker.options(resources={role: 1}).remote() for role in sys.argv[1:]]
print("at", *sorted(ray.get([worker.where.remote() for worker in workers])), flush=True)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts"), interpreter_folders(), []) as hosts:
        for index in range(FIRST, FIRST + 4):
            hosts.start(index)
        yield hosts


@pytest.fixture(scope="module")
def aws(hosts):
    """The variables with which Ray finds this AWS."""
    from moto.server import ThreadedMotoServer  # Flask's proxies break whoever looks through all modules, as vLLM does

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it has a line for every request
    server = ThreadedMotoServer(f"{NETWORK}.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    server.stop()


def client(aws, name):
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client(name, REGION, endpoint_url=aws["AWS_ENDPOINT_URL"], **keys)


@pytest.fixture(scope="module")
def ec2(aws):
    return client(aws, "ec2")


@pytest.fixture(scope="module")
def ray(hosts, aws, ec2):
    """Run `ray WORD clusters/aws.yaml …` as a user does who has prepared the account."""
    vpc = ec2.create_vpc(CidrBlock=f"{NETWORK}.0/24")["Vpc"]["VpcId"]
    ec2.create_subnet(VpcId=vpc, CidrBlock=SUBNET)
    group = ec2.create_security_group(GroupName="rporec", Description="rporec", VpcId=vpc)["GroupId"]
    # As a `ray up` before this one has left it: Ray waits half a minute when it makes the role.
    iam = client(aws, "iam")
    iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName=ROLE)
    iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
    # The key that the hosts know, instead of one that Ray would make.
    name = f"ray-autoscaler_{REGION}"
    ec2.import_key_pair(KeyName=name, PublicKeyMaterial=hosts.key.with_suffix(".pub").read_bytes())
    home = hosts.folder / "home"
    (home / ".ssh").mkdir(parents=True)
    shutil.copy(hosts.key, home / ".ssh" / f"{name}.pem")
    file = hosts.folder / "aws.yaml"
    file.write_text(yaml.safe_dump(_settings(aws, group)))
    environment = {
        **os.environ,
        **aws,
        "HOME": str(home),
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
    }

    def run(word, *words, seconds=480.0):
        done = subprocess.run(
            ["ray", word, file, *words],
            cwd=ROOT, env=environment, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, stdout=subprocess.DEVNULL)
    return run


def _settings(aws, group):
    """The file with the user's group, for hosts that stand for the containers on the machines."""
    settings = yaml.safe_load((ROOT / "clusters" / "aws.yaml").read_text().replace("SECURITY_GROUP", group))
    settings["provider"]["use_internal_ips"] = True
    settings["idle_timeout_minutes"] = 0.2
    settings["auth"]["ssh_user"] = "root"
    del settings["docker"], settings["available_node_types"]["reward"]["docker"]
    settings["initialization_commands"] = settings["head_setup_commands"] = []
    environment = {
        **aws,  # a head on AWS has its role instead
        "RAY_AUTH_MODE": "token",
        "PATH": f"{sys.prefix}/bin:$PATH",
        "PYTHONPATH": "$HOME/rporec",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    line = "export " + " ".join(f"{name}={value}" for name, value in environment.items())
    keep = [command for command in settings["setup_commands"] if command.startswith("chmod")]
    settings["setup_commands"] = [*keep, f"grep -qs rporec ~/.bashrc || echo '{line}' >> ~/.bashrc"]
    return settings


def nodes(ec2, *states):
    """How many instances there are by type of node, type of machine and market."""
    answer = ec2.describe_instances(
        Filters=[{"Name": "instance-state-name", "Values": states or ["pending", "running"]}]
    )
    return Counter(
        (tag["Value"], one["InstanceType"], one.get("InstanceLifecycle", "on demand"))
        for group in answer["Reservations"]
        for one in group["Instances"]
        for tag in one["Tags"]
        if tag["Key"] == "ray-user-node-type"
    )


def test_nodes_come_and_go_and_down_ends_them(hosts, ec2, ray, step):
    def kind(name):
        market = "spot" if name in ("rollout", "reward") else "on demand"
        return name, SETTINGS["available_node_types"][name]["node_config"]["InstanceType"], market

    head, *others = (FIRST + more for more in range(4))
    with step("AWS (moto): ray up", "one machine, the head, of the type that the file names"):
        ray("up", "--yes", "--no-config-cache")
        assert nodes(ec2) == Counter([kind("head")])
    with step("AWS (moto): nodes", "come when roles ask, of the types and markets that the file names, and are ended"):
        hosts.shell(head, f"cat > ask.py <<'END'\n{ASK}\nEND")
        said = ray("exec", "python ask.py learner rollout reward")
        assert "at " + " ".join(hosts.address(index) for index in others) in said
        deadline = time.monotonic() + 240
        while nodes(ec2) != Counter([kind("head")]):
            assert time.monotonic() < deadline, "idle nodes stay"
            time.sleep(1)
        assert nodes(ec2, "terminated") == Counter(map(kind, ("learner", "rollout", "reward")))
    with step("AWS (moto): ray down", "every machine is ended"):
        ray("down", "--yes")
        assert nodes(ec2, "terminated") == Counter(map(kind, ("head", "learner", "rollout", "reward")))
