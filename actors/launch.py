"""What the commands of the CLI start: a training, an evaluation, on a cluster joined or started here."""

from __future__ import annotations

import zlib
from typing import Any

from rich.console import Console

from actors.cluster import connected, missing_roles
from actors.job import Job
from actors.stages import STAGES, evaluate_run, prepare_data
from rporec.config import Config
from rporec.run import Run


def train(run: Run, config: Config, stages: list[str], address: str | None, console: Console) -> None:
    """Run the stages that are asked for and not finished, in their order."""
    if "data" in stages and not run.finished("data"):
        prepare_data(run, config, console)
    missing = [name for name in STAGES if name in stages and not run.finished(name)]
    if not missing:
        console.print("nothing left to do; every stage that was asked for has finished")
        return
    _quiet()
    with connected(config, address, _namespace(run)) as cluster:
        job = Job(run, config, cluster, console)
        if lacking := missing_roles(job.placements()):
            console.print(
                f"the cluster lacks resources: {', '.join(lacking)}; this waits until nodes that declare them join "
                "(ray start --resources), or stop it with Ctrl-C"
            )
        for name in missing:
            console.rule(name)
            STAGES[name](job)


def _namespace(run: Run) -> str:
    """Of this run alone, however many share a cluster and a config's name."""
    return f"rporec-{run.folder.name}-{zlib.crc32(str(run.folder).encode()):08x}"


def _quiet() -> None:
    """Progress is this program's to show, not each library's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def evaluate(run: Run, config: Config, *, ablations: bool, address: str | None, console: Console) -> dict[str, Any]:
    _quiet()
    with connected(config, address, _namespace(run)) as cluster:
        return evaluate_run(Job(run, config, cluster, console), ablations=ablations)
