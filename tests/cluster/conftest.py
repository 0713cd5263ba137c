"""What `make test-cluster` did, as a table: step, seconds, what was checked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

ROWS: list[tuple[str, float, str]] = []


@pytest.fixture(scope="session")
def step():
    """`with step(NAME, CHECKED):` is a row of the table once the block has passed."""

    @contextlib.contextmanager
    def timed(name: str, checked: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        ROWS.append((name, time.monotonic() - began, checked))
        print(f"{name}: {ROWS[-1][1]:.0f} s", flush=True)

    return timed


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("cluster")
        width = max(len(name) for name, _, _ in ROWS)
        for name, seconds, checked in ROWS:
            terminalreporter.write_line(f"{name:<{width}} {seconds:5.0f} s  {checked}")
        terminalreporter.write_line(f"{'all':<{width}} {sum(seconds for _, seconds, _ in ROWS):5.0f} s")
