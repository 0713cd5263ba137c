"""A whole node is lost under load, with its workers and the rows that lay in its object store."""

from __future__ import annotations

import pytest
from live_run import assert_whole

pytestmark = pytest.mark.chaos

# Rows of these small groups would travel inside messages and be lost with no node; so they go to the stores.
STORED = {"max_direct_call_object_size": 256}


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "include_dashboard": False,
            "resources": {"learner": 1, "rollout": 1, "reward": 1},
            "object_store_memory": 200 * 2**20,
            "_system_config": STORED,
        },
    )
    yield cluster
    cluster.shutdown()


def test_a_lost_node_takes_no_group_with_it(stage2, cluster) -> None:
    def add():
        return cluster.add_node(
            num_cpus=2, resources={"rollout": 1, "reward": 1}, object_store_memory=200 * 2**20, wait=True
        )

    run = stage2("steps=150", "rollout_workers=2", "reward_workers=2", "--address", cluster.address, "--attached")
    run.wait(lambda status: status["actors"] != [])  # the command and its controller are on the first node
    node = add()
    status = run.at_step(3)
    assert len({one["node"] for one in status["actors"] if one["role"] == "rollout"}) == 2
    cluster.remove_node(node, allow_graceful=False)
    status = run.wait(lambda status: {"rollout", "reward"} <= {death["role"] for death in status["deaths"]})
    run.at_step(status["step"] + 5)  # with the workers that are left
    add()
    run.wait(
        lambda status: (
            sum(one["role"] in ("rollout", "reward") and one["state"] == "ALIVE" for one in status["actors"]) == 4
        )
    )
    status = run.finish()
    assert_whole(run, status, steps=150)
    assert status["groups"]["DROPPED"].get("poisoned", 0) == 0
