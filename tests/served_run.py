"""`rporec serve` on a copy of the small trained run, two replicas each, for all tests that talk to it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from trained_run import Watched

READY = 240  # seconds until it must answer


@dataclass(frozen=True)
class ServedRun:
    url: str
    run: Path
    process: subprocess.Popen


@pytest.fixture(scope="session")
def served(trained: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRun]:
    run = tmp_path_factory.mktemp("serving") / "run"
    shutil.copytree(trained.folder, run)
    with serving(run, "serve.reasoners=2", "serve.retrievers=2") as service:
        yield service


@contextlib.contextmanager
def serving(run: Path, *words: str) -> Iterator[ServedRun]:
    """The command from its start to Ctrl-C; it must end by itself then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rporec.cli", "serve", str(run), "--port", str(port), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip
    said: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, said)
        yield ServedRun(url, run, process)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, "".join(said)[-3000:]


def _wait(process: subprocess.Popen, url: str, said: list[str]) -> None:
    until = time.monotonic() + READY
    while not any(url in line for line in said):
        assert process.poll() is None, "".join(said)[-3000:]
        assert time.monotonic() < until, "".join(said)[-3000:]
        time.sleep(0.2)
    assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200
