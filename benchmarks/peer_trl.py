"""The same training here and under TRL, which is what RPORec's authors use: completions a second, in turns.

    rporec bench peer-trl [--json]

Same models, prompts, group sizes, lengths, reward, precision (float32) and cores; see `benchmarks.workload`. TRL
generates with `transformers.generate` and runs at one thread and at two, of which each ratio takes the better. Here
it is stage 2 as it is: controller, vLLM rollout worker, reward worker and learner on Ray, whose CPU time all counts.

TRL is installed once, in an environment of its own, which reads this one's packages behind its own: torch and
transformers are the same on both sides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.result import machine, result
from benchmarks.turns import Side, Turn, in_turns
from benchmarks.workload import LARGE, SMALL, Workload
from rporec.report.live import progress
from rporec.run import RunError

# The newest of November 2026, and the packages that it needs beyond ours; its trainers run on our transformers 5.
TRL = "1.16.0"
PACKAGES = (f"trl=={TRL}", "datasets==5.2.0", "multiprocess==0.70.19", "xxhash==4.1.0")

WORKLOADS = (
    Workload(
        name="stage2",
        shape=SMALL,
        prompt=256,
        lengths=(16, 256),
        groups=4,
        size=8,
        kl=0.05,
        thoughts=True,
        context=1024,
    ),
    Workload(name="recommendation_0.9M", shape=SMALL, prompt=256, lengths=(16, 128), groups=8, size=8, kl=0.05),
    Workload(name="recommendation_10M", shape=LARGE, prompt=256, lengths=(16, 128), groups=4, size=8, kl=0.05),
    Workload(name="plain", shape=SMALL, prompt=48, lengths=(64, 64), groups=16, size=4),
)
THREADS = (1, 2)  # of TRL
CORES = 2  # of either side
# While the other side is timed ours is stopped: Ray is not to take that for dead connections and make new ones.
PATIENT_RAY = {
    f"RAY_{name}_ms": "3600000"
    for name in (
        "grpc_keepalive_time",
        "grpc_keepalive_timeout",
        "grpc_client_keepalive_time",
        "grpc_client_keepalive_timeout",
        "health_check_period",
        "health_check_timeout",
    )
}
FILLING = 4  # steps until groups of every age are under way: then an asynchronous trainer runs evenly
ROUNDS, SECONDS = 3, 4.0  # turns of each side; a turn ends with the first step after so many seconds
PATIENCE = 600.0  # seconds for the first step, and for a turn
QUICK = {
    # Half the groups where TRL takes a quarter of a minute for a step.
    "workloads": [
        one.model_copy(update={"groups": 2}) if one.name in ("stage2", "recommendation_10M") else one
        for one in WORKLOADS
    ],
    "rounds": 2,
    "seconds": 1.0,
    "warming": 1,
}


def run(
    workloads: Sequence[Workload] = WORKLOADS, *, rounds: int = ROUNDS, seconds: float = SECONDS, warming: int = 2
) -> dict[str, Any]:
    """warming: steps of TRL before its first turn."""
    before, console = machine(), Console(stderr=True)
    ratios: dict[str, Any] = {}
    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}
    with progress("TRL's environment", total=1, console=console) as bar:
        python = environment()
        bar.update(1)
    with (
        tempfile.TemporaryDirectory(prefix="rporec-bench-") as scratch,
        progress("peer-trl", total=len(workloads), console=console) as bar,
    ):
        folders = {workload.name: Path(scratch) / workload.name for workload in workloads}
        prepare(folders, workloads)
        for number, workload in enumerate(workloads):
            bar.update(number, note=workload.name)
            turns = measure(workload, folders[workload.name], python, rounds, seconds, warming)
            ratios |= {f"{key}_{workload.name}": value for key, value in compare(turns, workload).items()}
            for name, taken in turns.items():
                steps = sum(turn.steps for turn in taken)
                wall[f"{name}_{workload.name}"] = sum(turn.wall for turn in taken) / steps
                cpu[f"{name}_{workload.name}"] = sum(turn.cpu for turn in taken) / steps
    return result("peer-trl", ratios, wall, cpu, machine=before, seconds_are="of a step")


def compare(turns: Mapping[str, Sequence[Turn]], workload: Workload) -> dict[str, Any]:
    """Completions a second of wall clock and of CPU: medians over turns, and of the quotients of each round."""
    found: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        rates = {
            name: [workload.completions * turn.steps / getattr(turn, clock) for turn in taken]
            for name, taken in turns.items()
        }
        ours = rates.pop("ours")
        best = max(rates, key=lambda name: median(rates[name]))
        pairs = [mine / theirs for mine, theirs in zip(ours, rates[best], strict=True)]
        found[f"{clock}_over_trl"] = round(median(pairs), 2)
        found[f"{clock}_pairs"] = [round(pair, 2) for pair in pairs]
        found[f"{clock}_rates"] = {"ours": round(median(ours), 2), best: round(median(rates[best]), 2)}
    return found


def measure(
    workload: Workload, folder: Path, python: Path, rounds: int, seconds: float, warming: int
) -> dict[str, list[Turn]]:
    """The turns of `ours` and of `trl_N` with N threads; folder: one that `prepare` filled."""
    cores = set(sorted(os.sched_getaffinity(0))[:CORES])
    run_folder = folder / "run"
    common = [str(run_folder), str(folder / "workload.json")]
    here = {"PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")]))}

    def trl(threads: int) -> Side:
        steps = folder / f"trl_{threads}.jsonl"
        env = {**here, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        command = [str(python), "-m", "benchmarks.trl_side", *common, str(steps)]
        return Side(f"trl_{threads}", command, env, steps, folder / f"trl_{threads}.log", cores)

    def ours() -> Side:
        command = [sys.executable, "-m", "benchmarks.our_side", *common]
        return Side("ours", command, here | PATIENT_RAY, run_folder / "steps.jsonl", folder / "ours.log", cores)

    with contextlib.ExitStack() as ends:
        sides: list[Side] = []
        for start in (ours, *(partial(trl, threads) for threads in THREADS)):
            side = start()
            ends.callback(side.end)
            side.warm_up(FILLING if side.name == "ours" else warming, PATIENCE)
            sides.append(side)
        return in_turns(sides, rounds=rounds, seconds=seconds, timeout=PATIENCE)


def prepare(folders: Mapping[str, Path], workloads: Sequence[Workload]) -> None:
    """Each one's model, data set and RecHead, in a process of their own: here nothing is to hold torch's memory."""
    for workload in workloads:
        folders[workload.name].mkdir(parents=True)
        (folders[workload.name] / "workload.json").write_text(workload.model_dump_json())
    command = [sys.executable, "-m", "benchmarks.workload", *map(str, folders.values())]
    done = subprocess.run(command, cwd=_root(), capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"rporec bench peer-trl: {' '.join(done.stderr[-600:].split())}")


def environment() -> Path:
    """The Python that has TRL; made at the first call, under $RPOREC_CACHE or ~/.cache/rporec.

    RunError with one line when uv is missing or the packages cannot be had.
    """
    cache = Path(os.environ.get("RPOREC_CACHE") or Path.home() / ".cache" / "rporec")
    folder = cache / f"peer-trl-{TRL}-{sysconfig.get_python_version()}"
    python, ready = folder / "bin" / "python", folder / "ready"
    ours = sysconfig.get_path("purelib")
    if ready.exists() and ready.read_text() == ours:
        return python
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise RunError("rporec bench peer-trl: needs uv to install TRL; `pip install uv`, or make setup")
    shutil.rmtree(folder, ignore_errors=True)
    _uv(uv, "venv", "--python", sys.executable, str(folder))
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # `.pth` adds a folder behind the environment's own packages.
    (packages / "rporec.pth").write_text(f"{ours}\n")
    _uv(uv, "pip", "install", "--python", str(python), "--no-deps", *PACKAGES)
    ready.write_text(ours)
    return python


def _uv(uv: str, *words: str) -> None:
    done = subprocess.run([uv, *words], capture_output=True, text=True)
    if done.returncode:
        raise RunError(
            f"rporec bench peer-trl: TRL {TRL} could not be installed (`uv {words[0]}` failed), which needs the "
            f"network once: {' '.join(done.stderr[-300:].split())}"
        )


def _root() -> Path:
    return Path(__file__).parent.parent
