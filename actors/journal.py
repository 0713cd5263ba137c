"""What stage 2 tells: steps.jsonl, validation.jsonl, TensorBoard, and who died."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

import numpy as np

from actors.cluster import log_of, probable_cause
from rporec.files import append_line, cut_lines, write_json
from rporec.report.tensorboard import Scalars
from rporec.rl.rollout_schema import GroupMeta
from rporec.run import Run

DEATHS = 100  # that status.json keeps, and as many notices


class Journal:
    """Files that people and reports read. Nothing in the loop depends on what stands here but `best`."""

    def __init__(self, run: Run, groups_per_step: int) -> None:
        self.run, self.groups_per_step = run, groups_per_step
        self.board = Scalars(run.folder / "tensorboard")
        self.best: dict[str, Any] = {}
        self.last_step: dict[str, Any] = {}
        self.deaths: deque[dict[str, Any]] = deque(maxlen=DEATHS)
        self.notices: deque[dict[str, Any]] = deque(maxlen=DEATHS)
        self.learner_cpu: dict[int, float] = {}  # of rank 0, by attempt
        self.seen = Counter[str]()  # "tokens", and groups "scored" and "flat", since the last learner step
        self.reward_seconds = 0.0  # since then, summed over reward workers
        self._generation: list[float] = []  # seconds of each group written since then
        self._probes: list[np.ndarray] = []
        self._brought: list[float] = []  # seconds of each version brought into a worker since then
        self._stepped = time.monotonic()

    def generated(self, tokens: int, seconds: float) -> None:
        """A rollout worker has returned a group, `seconds` after it was leased to it."""
        self.seen["tokens"] += tokens
        self._generation.append(round(seconds, 4))

    def probed(self, differences: np.ndarray) -> None:
        """|log p engine − log p learner| on the probes, [T], when an engine had taken a version."""
        self._probes.append(differences)

    def brought(self, seconds: float) -> None:
        """A rollout worker has other weights, `seconds` after the call that brought them began."""
        self._brought.append(seconds)

    def step(self, metrics: dict[str, Any], groups: list[GroupMeta], dropped: dict[str, int], judges: int) -> None:
        """One learner step: what rank 0 measured, what was known of its groups, and of the time since the last."""
        now = time.monotonic()
        elapsed, self._stepped = now - self._stepped, now
        gaming = _mean_of([meta.gaming for meta in groups])
        gaming["flat_groups"] = self.seen["flat"] / max(1, self.seen["scored"])
        self.last_step = {
            **metrics,
            "format": sum(meta.format for meta in groups) / max(1, len(groups)),
            "tokens_per_second": round(self.seen["tokens"] / elapsed, 1),
            "generation_seconds": self._generation,
            "weights_seconds": round(sum(self._brought) / len(self._brought), 4) if self._brought else None,
            "reward_worker_busy": round(self.reward_seconds / elapsed / max(1, judges), 4),
            "probe_mismatch": self._probe_mismatch(),
            "dropped": dropped,
            "gaming": gaming,
        }
        self.learner_cpu[metrics["attempt"]] = metrics["cpu_seconds"]
        self.seen.clear()
        self._generation, self._brought = [], []
        self.reward_seconds = 0.0
        append_line(self.run.steps, self.last_step)
        self.board.write(metrics["step"], self.last_step)

    def _probe_mismatch(self) -> dict[str, float] | None:
        """Of the engines that took a version since the last step; None when none did."""
        if not self._probes:
            return None
        differences = np.concatenate(self._probes)
        self._probes.clear()
        return {"mean": float(differences.mean()), "max": float(differences.max())}

    def validated(self, record: dict[str, Any]) -> bool:
        """A validation; True when it is the best so far."""
        append_line(self.run.validation, record)
        self.board.write(record["version"], {"validation": record})
        return not self.best or record["ndcg@10"] > self.best["ndcg@10"]

    def saved_best(self, record: dict[str, Any]) -> None:
        self.best = record
        write_json(self.run.folder / "best.json", record)

    def died(self, role: str, name: str, pid: int, node: str, message: str) -> None:
        death = {"time": time.time(), "role": role, "name": name, "pid": pid, "node": node}
        self.deaths.append({**death, "message": message, "cause": probable_cause(message), "log": log_of(pid)})

    def notice(self, message: str) -> None:
        """Something that whoever watches should know, though the run goes on as well."""
        self.notices.append({"time": time.time(), "message": message})

    def cut(self, step: int) -> None:
        """Forget what was logged of `step` and later ones."""
        for path in (self.run.steps, self.run.validation):
            cut_lines(path, step)

    def status(self) -> dict[str, Any]:
        """What was last written; {} before the first time."""
        return self.run.status()

    def remember(self) -> dict[str, Any]:
        """Ray has restarted the controller after its process died: what was told must not be told again."""
        earlier = self.status()
        self.deaths.extend(earlier.get("deaths", []))
        me = next((actor for actor in earlier.get("actors", []) if actor["role"] == "controller"), None)
        if me is not None:
            self.died("controller", "controller", me["pid"], me["node"], "its process ended")
        return earlier

    def write_status(self, status: dict[str, Any]) -> None:
        write_json(self.run.folder / "status.json", status, lasting=False)  # each second, in the controller's loop


def _mean_of(records: list[Any]) -> dict[str, float]:
    keys = {key for record in records for key in record}
    return {key: sum(r[key] for r in records if key in r) / sum(key in r for r in records) for key in sorted(keys)}
