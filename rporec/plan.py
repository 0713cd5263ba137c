"""What a config asks of a cluster: which nodes its roles would bring, whether they fit, and who would wait for whom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from rporec.config import Config, ConfigError
from rporec.engine.transfer import engine_gpus, engine_ranks
from rporec.files import read_lines
from rporec.run import Run

if TYPE_CHECKING:
    from rich.console import RenderableType

RECENT = 20  # learner steps that speeds are taken from


# --- what is asked for, and what there is ----------------------------------------------------
@dataclass(frozen=True)
class Ask:
    """Places of one kind: `least` when a command starts, `most` as far as the config lets it grow."""

    name: str
    role: str  # the resource of which each takes 1
    gpus: float  # that each takes besides, or its share of one
    least: int
    most: int

    @property
    def resources(self) -> dict[str, float]:
        return {self.role: 1, "GPU": self.gpus} if self.gpus else {self.role: 1}


@dataclass(frozen=True)
class Pool:
    """A node type: what one node has, and how many there are at least and at most."""

    name: str
    resources: Mapping[str, int]
    least: int
    most: int


@dataclass(frozen=True)
class Pools:
    head: str
    types: tuple[Pool, ...]
    workers: int  # nodes besides the head, at most

    @property
    def gpus(self) -> bool:
        """Whether some node type has any."""
        return any(pool.resources.get("GPU") for pool in self.types)


def asks(config: Config, *, cuda: bool) -> list[Ask]:
    """What training and serving take, as `actors` and `serve` ask for it; without `cuda` no GPU."""
    ranks = max(config.learners, config.head.workers)  # the RecHead is trained by the same role
    rollout, reward, serve = config.rollout_workers, config.reward_workers, config.serve
    others = (serve.ingresses, serve.retrievers)
    spread = engine_ranks(config.engine)
    return [
        Ask("rollout", "rollout", engine_gpus(config.engine) if cuda else 0, rollout.min, rollout.max),
        Ask("reward", "reward", config.reward.gpu_share if cuda else 0, reward.min, reward.max),
        Ask("learner", "learner", config.deepspeed.gpu_share if cuda else 0, ranks, ranks),
        Ask("serve: reasoner", "serve", spread if cuda else 0, serve.reasoners.min, serve.reasoners.max),
        Ask("serve: other", "serve", 0, sum(one.min for one in others), sum(one.max for one in others)),
    ]


def read_pools(path: Path) -> Pools:
    """The node types of a cluster file of `ray up`; ConfigError with one line for what is none."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    types = raw.get("available_node_types") if isinstance(raw, dict) else None
    if not isinstance(types, dict) or not types:
        raise ConfigError(f"{path}: no available_node_types; plan reads the cluster files of `ray up`")
    head, most = raw.get("head_node_type"), _count(path, "max_workers", raw.get("max_workers", 2))  # Ray's default
    if head not in types:
        raise ConfigError(f"{path}: head_node_type: {head} is none of {', '.join(map(str, types))}")
    return Pools(head, tuple(_pool(path, name, type, name == head, most) for name, type in types.items()), most)


def _pool(path: Path, name: str, type: Any, head: bool, most: int) -> Pool:
    key = f"available_node_types.{name}"
    resources = type.get("resources") if isinstance(type, dict) else None
    if not isinstance(resources, dict):
        raise ConfigError(f"{path}: {key}.resources: a mapping of names to whole numbers, as in rollout: 1")
    amounts = {what: _count(path, f"{key}.resources.{what}", amount) for what, amount in resources.items()}
    if head:
        return Pool(name, amounts, 1, 1)
    least = _count(path, f"{key}.min_workers", type.get("min_workers", 0))
    most = _count(path, f"{key}.max_workers", type.get("max_workers", most))
    if least > most:
        raise ConfigError(f"{path}: {key}: min_workers: {least} is more than max_workers: {most}")
    return Pool(name, amounts, least, most)


def _count(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{path}: {key}: {value!r} is no whole number of 0 or more, which Ray wants")
    return value


# --- whether it fits -------------------------------------------------------------------------
def place(pools: Pools, wanted: Iterable[tuple[Ask, int]]) -> tuple[Counter[str], Counter[str]]:
    """Nodes by type and places by name of ask, when so many of each are wanted at once.

    First fit on the nodes that stand, those that want GPUs first; else a new node of the type that has least to
    spare. Ray's autoscaler goes by utilisation and comes to the same where each role has a pool of its own.
    """
    nodes = Counter({pool.name: pool.least for pool in pools.types})
    free: list[dict[str, float]] = [dict(pool.resources) for pool in pools.types for _ in range(pool.least)]
    placed = Counter[str]()
    for ask, count in sorted(wanted, key=lambda one: -one[0].gpus):
        for _ in range(count):
            node = next((node for node in free if _holds(node, ask.resources)), None)
            if node is None:
                pool = _next_pool(pools, nodes, ask)
                if pool is None:
                    break
                nodes[pool.name] += 1
                node = dict(pool.resources)
                free.append(node)
            for what, amount in ask.resources.items():
                node[what] -= amount
            placed[ask.name] += 1
    return nodes, placed


def _holds(node: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(node.get(what, 0) >= amount - 1e-9 for what, amount in resources.items())


def _next_pool(pools: Pools, nodes: Counter[str], ask: Ask) -> Pool | None:
    if nodes.total() > pools.workers:  # the head is one of them
        return None
    able = [pool for pool in pools.types if nodes[pool.name] < pool.most and _holds(pool.resources, ask.resources)]
    return min(able, key=lambda pool: sum(pool.resources.values()), default=None)


# --- who waits for whom ----------------------------------------------------------------------
@dataclass(frozen=True)
class Speeds:
    """Seconds that a group costs: one rollout worker that is kept busy, and all learner ranks together."""

    rollout: float
    learner: float


Balance = Callable[[Config, Speeds, int], dict[str, float]]


def measured(run: Run, learners: int) -> Speeds:
    """From the last steps of a run, finished or not; `learners`: ranks that are planned. ConfigError before its second.

    Rollout: worker-seconds by groups written, of workers as busy as their slots were taken (`loads`). Learner: its
    clock without the wait for groups, in proportion to the ranks. The number of workers is the one that
    `status.json` has last, so a run that was scaled within these steps gives a wrong answer.
    """
    steps = read_lines(run.steps)[1:][-RECENT:]  # the first step includes the start
    written = sum(len(step.get("generation_seconds", ())) for step in steps)
    if not written:
        raise ConfigError(f"{run.folder}: too few learner steps to measure speeds by; give --rollout-seconds instead")
    config = run.config()
    actors = run.status().get("actors", [])
    workers = sum(actor["role"] == "rollout" for actor in actors) or config.rollout_workers.min
    seconds = [step["seconds"] for step in steps]
    busy = fmean(min(1.0, step.get("loads", {}).get("rollout", 1.0)) for step in steps)
    learning = fmean(one["total"] - one["wait"] for one in seconds) / config.groups_per_step
    return Speeds(
        rollout=workers * busy * sum(one["total"] for one in seconds) / written,
        learner=learning * config.learners / learners,
    )


# --- the plan --------------------------------------------------------------------------------
def plan(config: Config, pools: Pools, speeds: Speeds | None = None, balance: Balance | None = None) -> dict[str, Any]:
    """`{cuda, roles, nodes, fits, balance, advice}`, ready for JSON; see docs/cluster.md.

    balance: `actors.forecast.balance`, which needs Ray; without it or speeds there is none in the plan.
    """
    cuda = config.device == "cuda" or (config.device == "auto" and pools.gpus)
    all_asks = asks(config, cuda=cuda)
    first, begun = place(pools, [(ask, ask.least) for ask in all_asks])
    full, grown = place(pools, [(ask, ask.most) for ask in all_asks])
    roles = [
        {
            "role": ask.name,
            "gpus": ask.gpus,
            "start": {"wanted": ask.least, "placed": begun[ask.name]},
            "full": {"wanted": ask.most, "placed": grown[ask.name]},
        }
        for ask in all_asks
    ]
    nodes = {pool.name: {"start": first[pool.name], "full": full[pool.name], "most": pool.most} for pool in pools.types}
    workers = sorted({begun["rollout"], grown["rollout"]} - {0})
    return {
        "cuda": cuda,
        "roles": roles,
        "nodes": nodes,
        "fits": {
            "start": all(begun[ask.name] == ask.least for ask in all_asks),
            "full": all(grown[ask.name] == ask.most for ask in all_asks),
        },
        "balance": [balance(config, speeds, n) for n in workers] if speeds and balance else [],
        "advice": [
            *_room(pools, all_asks),
            *_gpus_at_start(config, pools),
            *(_workers(config, speeds) if speeds is not None else []),
        ],
    }


def _room(pools: Pools, all_asks: Iterable[Ask]) -> list[str]:
    """The keys that would let everything fit: what it takes when nothing is bounded."""
    wanted = [(ask, ask.most) for ask in all_asks]
    endless = sum(count for _, count in wanted) + sum(pool.least for pool in pools.types)
    unbounded = tuple(pool if pool.name == pools.head else replace(pool, most=endless) for pool in pools.types)
    nodes, placed = place(replace(pools, types=unbounded, workers=endless), wanted)
    lines = []
    for ask, count in wanted:
        if placed[ask.name] < count:
            one = ", ".join(f"{what}: {amount:g}" for what, amount in ask.resources.items())
            lines.append(f"{ask.name}: no node type has {{{one}}}")
    lines += [
        f"{pool.name}: max_workers: {nodes[pool.name]} (now {pool.most})"
        for pool in pools.types
        if nodes[pool.name] > pool.most
    ]
    if nodes.total() - 1 > pools.workers:
        lines.append(f"the whole cluster: max_workers: {nodes.total() - 1} (now {pools.workers})")
    return lines


def _gpus_at_start(config: Config, pools: Pools) -> list[str]:
    if (
        config.device != "auto"
        or not pools.gpus
        or any(pool.least for pool in pools.types if pool.resources.get("GPU"))
    ):
        return []
    return ["device: cuda, since no GPU node stands before a run asks for one, and one that sees none begins on CPU"]


def _workers(config: Config, speeds: Speeds) -> list[str]:
    if config.max_staleness == 0:
        return ["max_staleness: 0: rollout and learner take turns; with 1 or more they overlap"]
    enough, bounds = max(1, math.ceil(speeds.rollout / speeds.learner - 1e-9)), config.rollout_workers
    if bounds.max < enough:
        return [f"rollout_workers: the learner waits until there are {enough} (at most {bounds.max})"]
    if bounds.min > enough:
        return [f"rollout_workers: {enough} keep the learner busy; {bounds.min - enough} of {bounds.min} add nothing"]
    return [f"rollout_workers: {enough} keep the learner busy"]


def plan_table(planned: dict[str, Any]) -> RenderableType:
    """A plan for a console."""
    from rich.console import Group
    from rich.table import Table

    roles = Table("role", "GPUs each", "at the start", "at most", box=None, header_style="dim")
    for role in planned["roles"]:
        counts = [f"{role[when]['placed']} of {role[when]['wanted']}" for when in ("start", "full")]
        roles.add_row(role["role"], f"{role['gpus']:g}", *counts)
    nodes = Table("node type", "at the start", "at most", "allowed", box=None, header_style="dim")
    for name, counts in planned["nodes"].items():
        nodes.add_row(name, *(str(counts[when]) for when in ("start", "full", "most")))
    parts: list[Any] = [roles, "", nodes]
    if planned["balance"]:
        pace = Table("rollout workers", "step", "learner waits", "rollout waits", box=None, header_style="dim")
        for one in planned["balance"]:
            waits = [f"{one[key]:.0%}" for key in ("learner_waits", "rollout_waits")]
            pace.add_row(f"{one['workers']}", f"{one['step_seconds']:.3g} s", *waits)
        parts += ["", pace]
    return Group(*parts, *(["", *planned["advice"]] if planned["advice"] else []))
