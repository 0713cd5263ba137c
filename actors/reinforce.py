"""Stage 2 from the launcher's side: the controller and the learner group are started, watched and ended."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import checkpoints
from actors.cluster import last_words, log_of
from actors.controller import Controller
from actors.job import Job
from actors.learner import rl_loop
from actors.placement import RayPlacement
from rporec.engine.transfer import choose_transfer
from rporec.files import read_lines, write_json
from rporec.report.live import LiveTable, say
from rporec.run import RunError

DEATH = "{role} {name} (pid {pid}) on node {node:.12} died: {message}; {cause}its log there: {log}"

# Seconds after which a collective of the learner has stalled: its ranks start anew from the newest checkpoint.
STALL = 1800
# Times that Ray starts a controller anew whose process ended; each goes on from the newest checkpoint.
CONTROLLER_RESTARTS = 10


def reinforce(job: Job) -> None:
    """The asynchronous loop: controller, rollout, reward and learner actors.

    Ctrl-C ends it after the step under way, with a checkpoint. Raises RunError when it cannot go on,
    ConfigError when the newest checkpoint cannot be gone on with.
    """
    run, config = job.run, job.config
    checkpoints.check(run, config)
    with run.stage("stage2") as notes:
        if config.steps == 0:
            notes["skipped"] = "steps: 0"
            return
        come = config.device == "cuda" and not job.cluster.local  # as many as roles ask for, a GPU for each
        gpus = math.inf if come else ray.cluster_resources().get("GPU", 0)
        transfer = choose_transfer(config, cuda=job.cluster.cuda, gpus=gpus)
        if transfer.line:
            say(job.console, transfer.line)
        config = config.model_copy(update={"weight_transfer": transfer.kind})
        job = replace(job, config=config)
        actor = ray.remote(num_cpus=0, max_concurrency=1000, max_restarts=CONTROLLER_RESTARTS)(Controller)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not on a spot node
        controller = actor.options(name="controller", scheduling_strategy=here).remote(
            run, config, RayPlacement(job.cluster)
        )
        write_json(
            run.folder / "run.json",
            {
                "address": job.cluster.address,
                "namespace": job.cluster.namespace,
                "controller": "controller",
                "auth": os.environ.get("RAY_AUTH_MODE"),  # Ray sets it in this process
                "pid": os.getpid(),
            },
        )
        auth = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
        processes = f"{auth}RAY_ADDRESS={job.cluster.address} ray list actors"
        say(job.console, f"its processes: {processes}; what it does: rporec status")
        try:
            _train(job, controller)
        finally:
            ray.kill(controller)
            (run.folder / "run.json").unlink(missing_ok=True)
        status = run.status()
        notes |= {key: status[key] for key in ("groups", "best", "cpu_seconds")}
        notes["validation"] = {record["version"]: record["ndcg@10"] for record in read_lines(run.validation)}
        steps = read_lines(run.steps)
        notes |= {
            "reward": [one["reward_mean"] for one in steps],
            "advantage_share": [one["advantage_share"] for one in steps],
        }
        notes["reward_parts"] = {
            name: [one["reward_parts"][name] for one in steps] for name in steps[-1]["reward_parts"]
        }


def _train(job: Job, controller: Any) -> None:
    config = job.config
    with LiveTable(config.steps, config.max_staleness, job.console) as table:
        watch = Watch(job, controller, table)

        def interrupted() -> None:
            job.console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
            try:
                ray.get(controller.interrupt.remote())
            except RayActorError:
                raise KeyboardInterrupt from None  # it is restarting: what it knows is in its checkpoint

        spec = {"run": job.run, "config": config, "cores": job.learner_cores()}
        try:
            job.fit(
                rl_loop,
                spec,
                "stage2",
                config.learners,
                watch,
                alone=False,
                restarts=-1,  # the controller says when it is enough
                timeout=STALL,
                interrupted=interrupted,
            )
        except KeyboardInterrupt:
            ray.get(controller.stop.remote())
            raise
        ray.get(controller.stop.remote())
        watch()


class Watch:
    """Called again and again: shows where the loop is, tells of deaths, raises when it has failed."""

    def __init__(self, job: Job, controller: Any, table: LiveTable) -> None:
        self.job, self.controller, self.table = job, controller, table
        self.began = time.time()
        self.started = controller.start.remote()
        self.told = self.began  # when the last death or notice was that has been told of; older ones were, before

    def __call__(self) -> None:
        run = self.job.run
        status = run.status()
        validation = read_lines(run.validation)
        self.table.update(status, status.get("last_step") or None, validation[-1] if validation else None)
        told = [(one["time"], _obituary(one)) for one in status.get("deaths", [])]
        told += [(one["time"], one["message"]) for one in status.get("notices", [])]
        for moment, line in sorted(told):
            if moment > self.told:
                say(self.job.console, line)
                self.told = moment
        if status.get("state") == "FAILED" and status["time"] >= self.began:  # not the last word of a resumed run
            pid = next(actor["pid"] for actor in status["actors"] if actor["role"] == "controller")
            raise RunError(f"stage 2 failed: {status['failure']}; the controller's log: {log_of(pid)}")
        self._still_there()

    def _still_there(self) -> None:
        """Raises what kept a worker from starting, or RunError when the controller is gone for good."""
        ready, _ = ray.wait([self.started], timeout=0)
        if not ready:
            return
        try:
            ray.get(self.started)
        except ActorUnavailableError:
            pass  # Ray is restarting it
        except (ActorDiedError, RayTaskError) as error:
            raise RunError(f"stage 2 failed: {last_words(error)}") from None
        self.started = self.controller.start.remote()  # nothing to do, unless it was restarted meanwhile


def _obituary(death: dict[str, Any]) -> str:
    cause = f"probable cause: {death['cause']}; " if death["cause"] else ""
    return DEATH.format(**{**death, "cause": cause})
