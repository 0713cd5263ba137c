"""Typed nodes on plain hosts with SSH, for `ray up`: Ray's own provider for such hosts knows only one type.

    provider:
      type: external
      module: clusters.ssh_pool.SshPool
      hosts: {10.0.0.10: head, 10.0.0.11: learner, 10.0.0.12: rollout, 10.0.0.13: rollout}

A node is a host that was taken. As in a cloud, its tags lie with it: in `~/.ray/pool_node.json` on the host,
from when it is taken until it is given back. There is no other state, hence none to lose: `ray up`, the autoscaler
on the head, one that was restarted, and `ray down` from another machine read the same. A host is of one cluster
at a time. Every host must be reached under its address from where `ray up` runs and from the head, which
counts itself in and must therefore reach itself as well.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

MARK = "~/.ray/pool_node.json"
READ = f"cat {MARK} 2>/dev/null || true"
WRITE = f"umask 077 && mkdir -p ~/.ray && cat > {MARK}.new && mv {MARK}.new {MARK}"
# In a shell like that of Ray's own commands: with what the set-up put on the PATH.
STOP = f"bash --login -i -c {shlex.quote('source ~/.bashrc; ray stop --force')}; rm -f {MARK}"

LOGGER = logging.getLogger(__name__)

# (host, command, standard input) -> standard output; ConnectionError when the host does not answer.
Shell = Callable[[str, str, str], str]


@dataclass(frozen=True)
class Ssh:
    """Runs commands as the section `auth` of a cluster file says: user, key, proxy."""

    auth: dict[str, str]
    patience: int = 60  # seconds of one command

    def __call__(self, host: str, command: str, text: str = "") -> str:
        argv = ["ssh", *self._options(), host, command]
        try:
            done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=self.patience)
        except subprocess.TimeoutExpired:
            raise ConnectionError(f"{host}: no answer within {self.patience} s") from None
        if done.returncode == 255:  # ssh's own; others are the command's
            raise ConnectionError(f"{host}: {done.stderr.strip()}")
        done.check_returncode()
        return done.stdout

    def _options(self) -> list[str]:
        # Host keys as Ray's own SSH has it: a host that was installed anew is not refused.
        options = ["BatchMode=yes", "ConnectTimeout=5", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
        options.append("LogLevel=ERROR")
        if proxy := self.auth.get("ssh_proxy_command"):
            options.append(f"ProxyCommand={proxy}")
        words = [word for option in options for word in ("-o", option)]
        if key := self.auth.get("ssh_private_key"):
            words += ["-o", "IdentitiesOnly=yes", "-i", os.path.expanduser(key)]
        if user := self.auth.get("ssh_user"):
            words += ["-l", user]
        return words


@dataclass
class Node:
    host: str
    tags: dict[str, str]


class SshPool(NodeProvider):
    """Ray's interface of a cloud; its autoscaler calls it from several threads.

    Node ids are `HOST-XXXXXXXX`, new whenever a host is taken: Ray keeps dead nodes in mind by their ids.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str, shell: Shell | None = None) -> None:
        super().__init__(provider_config, cluster_name)
        self._types: dict[str, str] = provider_config["hosts"]
        self._shell = shell or Ssh(provider_config.get("auth", {}))
        self._nodes: dict[str, Node] = {}
        self._asked: set[str] = set()  # hosts whose marks have been looked for
        self._leaving: set[str] = set()  # hosts that are being stopped: not to be taken before that is over
        self._lock = threading.RLock()  # of these three
        self._taking = threading.Lock()  # held for seconds; the autoscaler may read meanwhile

    # --- the cluster file --------------------------------------------------------------------
    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Hand the provider what it needs of other sections. Raises ValueError for hosts that do not fit the types."""
        check_hosts(cluster_config)
        provider = cluster_config["provider"]
        more = {"auth": cluster_config["auth"], "head_node_type": cluster_config["head_node_type"]}
        return {**cluster_config, "provider": {**provider, **more}}

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """On the head the key lies elsewhere and no proxy is in between; Ray has changed `auth` accordingly."""
        return {**cluster_config, "provider": {**cluster_config["provider"], "auth": cluster_config["auth"]}}

    # --- what there is -----------------------------------------------------------------------
    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        hosts: Iterable[str] = self._types
        if tag_filters.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD:  # `ray exec` need not wait for dead workers
            hosts = [host for host, type in self._types.items() if type == self.provider_config["head_node_type"]]
        self._ask([host for host in hosts if host not in self._asked])
        with self._lock:
            return [id for id, node in self._nodes.items() if tag_filters.items() <= node.tags.items()]

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """Whatever hosts say now: the autoscaler, on the head, took and gave back some since they were last asked."""
        with self._lock:
            self._nodes.clear()
        self._ask(list(self._types))
        return self.non_terminated_nodes(tag_filters)

    def _ask(self, hosts: list[str]) -> None:
        if not hosts:
            return
        with ThreadPoolExecutor(min(16, len(hosts))) as threads:
            marks = list(threads.map(self._mark, hosts))
        with self._lock:
            self._asked.update(hosts)
            for host, mark in zip(hosts, marks, strict=True):
                if mark is not None and mark.get("cluster") == self.cluster_name:
                    self._nodes.setdefault(mark["id"], Node(host, mark["tags"]))

    def _mark(self, host: str) -> dict[str, Any] | None:
        """What lies on a host; {} when it is free, None when it does not answer."""
        try:
            said = self._shell(host, READ, "")
        except ConnectionError as error:
            LOGGER.warning("left out: %s", error)
            return None
        try:
            return json.loads(said) if said.strip() else {}
        except ValueError:  # not from here
            return {"cluster": f"what {MARK} on {host} is of"}

    def is_running(self, node_id: str) -> bool:
        return node_id in self._nodes

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._lock:
            return dict(self._nodes[node_id].tags) if node_id in self._nodes else {}

    def internal_ip(self, node_id: str) -> str:
        return node_id.rpartition("-")[0]

    external_ip = internal_ip

    # --- taking and giving back --------------------------------------------------------------
    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Take `count` free hosts of the type in `tags`; NodeLaunchException when fewer than that answered."""
        type = tags[TAG_RAY_USER_NODE_TYPE]
        taken: dict[str, Any] = {}
        with self._taking:
            for host in (host for host, its in self._types.items() if its == type):
                if len(taken) == count:
                    break
                if (node := self._take(host, tags)) is not None:
                    taken[node] = {}
        if len(taken) < count:
            told = f"{count - len(taken)} more {type} wanted, and no free host of that type answers"
            raise NodeLaunchException("no host left", told, None)
        return taken

    def _take(self, host: str, tags: dict[str, str]) -> str | None:
        """The id of the new node; None when the host is taken or does not answer."""
        with self._lock:
            if host in self._leaving or any(node.host == host for node in self._nodes.values()):
                return None
        mark = self._mark(host)
        if mark is None:
            return None
        if mark.get("cluster", self.cluster_name) != self.cluster_name:
            LOGGER.warning("left out: %s is taken by %s", host, mark["cluster"])
            return None
        id, node = f"{host}-{secrets.token_hex(4)}", Node(host, dict(tags))
        try:
            self._write(id, node)
        except (ConnectionError, subprocess.CalledProcessError) as error:
            LOGGER.warning("left out: %s", error)
            return None
        with self._lock:
            self._nodes[id] = node
        return id

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._lock:
            node = self._nodes.get(node_id)
            if node is None:
                return  # given back while it was being set up
            node.tags.update(tags)
            node = Node(node.host, dict(node.tags))
        try:
            self._write(node_id, node)
        except (ConnectionError, subprocess.CalledProcessError) as error:
            LOGGER.warning("tags not kept: %s", error)

    def _write(self, id: str, node: Node) -> None:
        self._shell(node.host, WRITE, json.dumps({"cluster": self.cluster_name, "id": id, "tags": node.tags}))

    def terminate_node(self, node_id: str) -> dict[str, Any]:
        """Stop Ray on the host and free it. One that does not answer is forgotten: its raylet ends without the head."""
        with self._lock:
            node = self._nodes.pop(node_id, None)
            if node is None:
                return {node_id: {}}
            self._leaving.add(node.host)
        try:
            self._shell(node.host, STOP, "")
        except ConnectionError as error:
            LOGGER.warning("not stopped: %s", error)
        finally:
            with self._lock:
                self._leaving.discard(node.host)
        return {node_id: {}}

    def terminate_nodes(self, node_ids: list[str]) -> dict[str, Any]:
        with ThreadPoolExecutor(16) as threads:
            return {id: {} for gone in threads.map(self.terminate_node, node_ids) for id in gone}


def check_hosts(config: dict[str, Any]) -> None:
    """Raises ValueError with one line unless every host has a type that exists, and every type as many as it may have.

    config: a cluster file after Ray's own checks.
    """
    types, hosts = config["available_node_types"], config["provider"].get("hosts")
    if not isinstance(hosts, dict) or not hosts:
        raise ValueError("provider.hosts: a mapping of addresses to node types, as in 10.0.0.10: head")
    for host, type in hosts.items():
        if type not in types:
            raise ValueError(f"provider.hosts: {host} is a {type}, which is none of {', '.join(types)}")
    for name, type in types.items():
        wanted = 1 if name == config["head_node_type"] else type["max_workers"]
        there = sum(its == name for its in hosts.values())
        if there < wanted:
            raise ValueError(f"available_node_types.{name}: {wanted} wanted, and provider.hosts has {there}")
