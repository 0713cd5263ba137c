"""`rporec train --address`: a training as a Ray job, whose driver runs on the head and outlives whoever submitted it.

Code and config travel with the job; the run folder and the data are where all nodes see them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rporec.config import Config, ConfigError

PACKAGES = ("rporec", "actors", "serve", "benchmarks")
STOP_SECONDS = 600  # Ray kills a job that is told to stop after 3; a step and its checkpoint take longer

DETACHED = """detached; the training goes on as job {job}
  follow   ray job logs --follow --address {address} {job}
  look     rporec status {run}
  scale    rporec scale {run} --rollout-workers N   (on a node of the cluster)
  stop     ray job stop --address {address} {job}   (it finishes its step and writes a checkpoint)"""


def in_job() -> bool:
    """Whether this process is the driver of a Ray job, so that its cluster is the one to train on."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def submit(
    file: Path, config: Config, run: Path, address: str, words: Sequence[str], console: Console, *, follow: bool = True
) -> int:
    """Submit `rporec train FILE WORDS… --run RUN` and show what it says; Ctrl-C leaves it alone. Returns its status.

    address: HOST:PORT of Ray or "auto", from a node of the cluster; http://HOST:PORT of its dashboard from anywhere.
    Raises ConfigError when a job trains this run already, ConnectionError when the cluster does not take the job.
    """
    client = _client(address)
    for job in client.list_jobs():
        if not job.status.is_terminal() and (job.metadata or {}).get("run") == str(run):
            raise ConfigError(
                f"{run}: job {job.submission_id} trains it already; `ray job logs --follow "
                f"--address {address} {job.submission_id}` follows it"
            )
    name = f"rporec-{run.name}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder), file, config)
        try:
            client.submit_job(
                entrypoint=shlex.join(["python", "-m", "rporec.cli", "train", file.name, *words, "--run", str(run)]),
                submission_id=name,
                runtime_env={"working_dir": folder, "env_vars": _environment(console)},
                metadata={"run": str(run)},
            )
        except RuntimeError as error:
            raise ConnectionError(f"--address {address}: {error}") from None
    hints = DETACHED.format(job=name, address=address, run=run)
    console.print(f"job {name}; Ctrl-C leaves it alone", highlight=False, soft_wrap=True)
    try:
        asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        console.print(f"\n{hints}", highlight=False, markup=False, soft_wrap=True)
        return 0
    except (RuntimeError, OSError) as error:
        raise ConnectionError(f"--address {address}: lost touch ({error}); {hints}") from None
    done = client.get_job_info(name)
    if done.status == "STOPPED":
        return 130
    return done.driver_exit_code if done.driver_exit_code is not None else 1


def pack(folder: Path, file: Path, config: Config) -> None:
    """Copy what the job needs into `folder`: the packages as they are here, the config, the module of an own reward."""
    here = Path(__file__).parents[1]
    modules = [here / name for name in PACKAGES]
    if config.reward.custom is not None:
        modules.append(_source(config.reward.custom.partition(":")[0].partition(".")[0]))
    for module in modules:
        if module.is_dir():
            shutil.copytree(module, folder / module.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(module, folder)
    shutil.copy(file, folder)


def _source(module: str) -> Path:
    """The file or the folder that a module is imported from."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"reward.custom: no file of module {module!r} to send along")
    origin = Path(spec.origin)
    return origin.parent if spec.submodule_search_locations else origin


def _client(address: str) -> Any:
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() or "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read by Ray on import
    from ray.job_submission import JobSubmissionClient

    for quiet in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except RuntimeError as error:
        raise ConnectionError(f"--address {address}: {error}") from None


def _environment(console: Console) -> dict[str, str]:
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "COLUMNS": str(console.width)}


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
