"""`rporec train --address`: a training as a Ray job, whose driver runs on the head and outlives whoever submitted it.

Code and config travel with the job; the run folder and the data are where all nodes see them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import shlex
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cluster import last_words
from rporec.config import Config, ConfigError
from rporec.report.live import say
from rporec.run import RunError

PACKAGES = ("rporec", "actors", "serve")
STOP_SECONDS = 600  # Ray kills a job that is told to stop after 3; a step and its checkpoint take longer
PATIENCE = 60  # seconds

DETACHED = """detached; the training goes on as job {job}
  follow   RAY_AUTH_MODE=token ray job logs --follow --address {address} {job}
  stop     RAY_AUTH_MODE=token ray job stop --address {address} {job}   (stage 2 finishes its step and writes a checkpoint)
  look     rporec status {run}                        (where {run} is seen;
  scale    rporec scale {run} --rollout-workers N      on a node of the cluster: ray exec FILE '...')"""


def in_job() -> bool:
    """Whether this process is the driver of a Ray job, so that its cluster is the one to train on."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def submit(file: Path, config: Config, run: Path, address: str, words: Sequence[str], console: Console) -> int:
    """Submit `rporec train FILE WORDS… --run RUN` and show what it says; Ctrl-C leaves it alone. Returns its status.

    address: HOST:PORT of Ray or "auto", from a node of the cluster; http://HOST:PORT of its dashboard from anywhere.
    Raises ConfigError when a job trains this run already, ConnectionError when the cluster cannot be reached or does
    not take the job, RunError when the job ended without a word of its own.
    """
    with _told(f"--address {address}: the cluster takes no job"):
        client = _client(address)
        job = _name(client, run, address)
        with tempfile.TemporaryDirectory() as folder:
            pack(Path(folder), file, config)
            say(console, f"job {job}; Ctrl-C leaves it alone")
            _submit(
                client,
                entrypoint=shlex.join(["python", "-m", "rporec.cli", "train", file.name, *words, "--run", str(run)]),
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": _environment(console)},
                metadata={"run": str(run)},
            )
    hints = DETACHED.format(job=job, address=address, run=run)
    try:
        with _told(f"--address {address}: lost touch; {hints}"):
            asyncio.run(_follow(client, job))
            done = client.get_job_info(job)
    except KeyboardInterrupt:
        say(console, f"\n{hints}")
        return 0
    if done.driver_exit_code is None and done.status != "STOPPED":
        raise RunError(f"job {job} is {done.status}: {done.message}")
    return 130 if done.status == "STOPPED" else done.driver_exit_code


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever goes wrong between here and the cluster, as a ConnectionError that says `what`."""
    from aiohttp import ClientError
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, RayError, ClientError) as error:  # of tokens, sockets, proxies, the server
        raise ConnectionError(f"{what} ({last_words(error)})") from None


def _name(client: Any, run: Path, address: str) -> str:
    """Of the next job of this run: Ray refuses the same name twice, so of two that come at once one is refused."""
    earlier = [job for job in client.list_jobs() if (job.metadata or {}).get("run") == str(run)]
    for job in earlier:
        if not job.status.is_terminal():
            raise ConfigError(
                f"{run}: job {job.submission_id} trains it already; `ray job logs --follow "
                f"--address {address} {job.submission_id}` follows it"
            )
    return f"rporec-{run.name}-{zlib.crc32(str(run).encode()):08x}-{len(earlier)}"


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
    return JobSubmissionClient(address)


def _submit(client: Any, **job: Any) -> None:
    """Asks again for a while: a head that has just started is there before it takes jobs."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def _environment(console: Console) -> dict[str, str]:
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "COLUMNS": str(console.width)}


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
