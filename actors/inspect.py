"""Whether a Ray cluster is there, and what it offers: for `--address` and `rporec doctor`."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

ROLES = ("rollout", "reward", "learner", "serve")


def check_address(address: str, timeout: float = 5.0, *, dashboard: bool = False) -> None:
    """Raises ConnectionError unless something listens at `HOST:PORT`; Ray itself would wait ten minutes.

    "auto", the cluster that runs on this machine, is left to Ray. dashboard: its URL is an address too.
    """
    if address == "auto":
        return
    place = re.fullmatch(r"(?:https?://)?([^/]+):(\d+)/?" if dashboard else r"([^/]+):(\d+)", address)
    if place is None:
        also = ", http://HOST:PORT of its dashboard," if dashboard else ","
        raise ConnectionError(f"--address {address}: write HOST:PORT{also} or auto for the cluster on this machine")
    try:
        socket.create_connection((place[1].strip("[]"), int(place[2])), timeout).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConnectionError(f"--address {address}: no Ray cluster answers there ({reason})") from None


def describe(address: str) -> dict[str, Any]:
    """`{"nodes": [{"name", "resources": {name: amount}}], "roles": {role: {"total", "free"}}}` of live nodes.

    Memory is in GiB. Raises ConnectionError when no cluster answers at `address`, RuntimeError when it
    runs another version of Ray or Python.
    """
    check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        total, free = ray.cluster_resources(), ray.available_resources()
    finally:
        ray.shutdown()
    return {
        "nodes": [{"name": node["NodeName"], "resources": _readable(node["Resources"])} for node in nodes],
        "roles": {role: {"total": total.get(role, 0.0), "free": free.get(role, 0.0)} for role in ROLES},
    }


def _readable(resources: dict[str, float]) -> dict[str, float]:
    """Without the names that Ray gives each node, bytes as GiB."""
    kept = {name: amount for name, amount in sorted(resources.items()) if not name.startswith(("node:", "accelerator"))}
    return {
        name: round(amount / 2**30, 1) if name in ("memory", "object_store_memory") else amount
        for name, amount in kept.items()
    }
