"""A run that goes on somewhere: find its controller by `run.json` and talk to it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from actors.inspect import check_address
from rporec.config import ConfigError
from rporec.files import read_json
from rporec.run import Run


def live_address(run: Run) -> str | None:
    """Of the cluster on which the run trains now; None when it does not, or its cluster is gone."""
    live = read_json(run.folder / "run.json")
    if live is None:
        return None
    try:
        check_address(live["address"])
    except ConnectionError:
        return None
    _authenticate(live)
    return live["address"]


def _authenticate(live: dict[str, Any]) -> None:
    if live.get("auth"):
        os.environ.setdefault("RAY_AUTH_MODE", live["auth"])  # Ray reads it on import; the token is in the user's home


@contextlib.contextmanager
def controller_of(run: Run) -> Iterator[Any]:
    """The controller of a run whose stage 2 goes on; ConfigError when there is none."""
    live = read_json(run.folder / "run.json")
    if live is None:
        raise ConfigError(f"{run.folder}: no training is in stage 2 here, so there is nothing to change")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _authenticate(live)
    import ray

    gone = f"{run.folder}: its training is gone (no controller at {live['address']}); train with --resume"
    try:
        check_address(live["address"])
        ray.init(live["address"], namespace=live["namespace"], logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        raise ConfigError(gone) from None
    try:
        yield ray.get_actor(live["controller"])
    except ValueError:
        raise ConfigError(gone) from None
    finally:
        ray.shutdown()


def scale(run: Run, wanted: dict[str, int]) -> list[dict[str, Any]]:
    """Have `{role: workers}` from now on; returns the workers of those roles as the controller lists them."""
    with controller_of(run) as controller:
        import ray

        answers = ray.get([controller.scale.remote(role, count) for role, count in wanted.items()])
    return [worker for answer in answers for worker in answer]
