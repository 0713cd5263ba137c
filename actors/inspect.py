"""What a running Ray cluster offers, for `rporec doctor --address`."""

from __future__ import annotations

import logging
import os
from typing import Any

ROLES = ("rollout", "reward", "learner", "serve")


def describe(address: str) -> dict[str, Any]:
    """`{"nodes": [{"name", "resources": {name: amount}}], "roles": {role: {"total", "free"}}}` of live nodes.

    Memory is in GiB. Raises ConnectionError when no cluster answers at `address`, RuntimeError when it
    runs another version of Ray or Python.
    """
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
