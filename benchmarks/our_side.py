"""Stage 2 on a workload, for the run's `steps` or until it is ended: the real controller, vLLM rollout worker, reward worker and learner.

    python -m benchmarks.our_side RUN WORKLOAD.json

Started by `rporec bench peer-trl` and `benchmarks.gpu_smoke`; `RUN/steps.jsonl` grows by a line with every step.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.workload import Dealt, Workload
from rporec.files import read_json
from rporec.run import Run, RunError


def main(folder: Path, workload: Workload) -> None:
    import ray

    from actors.controller import Controller
    from actors.launch import on_cluster
    from actors.learner import rl_loop
    from actors.placement import RayPlacement

    run, config = Run(folder), Run(folder).config()
    with on_cluster(run, config, None, Console(stderr=True), "rollout", "reward", "learner") as job:
        actor: Any = ray.remote(num_cpus=0, max_concurrency=1000)(Controller).options(name="controller")
        controller = actor.remote(run, config, RayPlacement(job.cluster), Dealt(run, config, workload))
        started = controller.start.remote()

        def watch() -> None:
            if ray.wait([started], timeout=0)[0]:
                ray.get(started)
            if (status := read_json(run.folder / "status.json", {})).get("state") == "FAILED":
                raise RunError(f"stage 2 failed: {status['failure']}")

        spec = {"run": run, "config": config, "cores": job.learner_cores()}
        job.fit(rl_loop, spec, "stage2", config.learners, watch, alone=False)
        ray.get(controller.stop.remote())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the cluster is taken down
    main(Path(sys.argv[1]), Workload.read(Path(sys.argv[2])))
