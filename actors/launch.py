"""What the commands of the CLI start: a training, an evaluation, on a cluster joined or started here."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from actors.cluster import connected
from actors.stages import STAGES, Job, check_stages, evaluate_run, prepare_data
from rporec.config import Config, ConfigError
from rporec.run import Run


def train(run: Run, config: Config, stages: list[str], address: str | None, console: Console) -> None:
    """Run the stages that are asked for and not finished, in their order."""
    check_stages(stages)
    if "data" in stages and not run.finished("data"):
        prepare_data(run, config, console)
    missing = [name for name in STAGES if name in stages and not run.finished(name)]
    if not missing:
        console.print("nothing left to do; every stage that was asked for has finished")
        return
    before = ["data", *STAGES][: ["data", *STAGES].index(missing[0])]
    for name in before:
        if name not in stages and not run.finished(name):
            raise ConfigError(f"{run.folder}: stage {missing[0]} needs stage {name}, which has not finished")
    _quiet()
    with connected(config, address, namespace=f"rporec-{config.name}") as cluster:
        job = Job(run, config, cluster, console)
        for name in missing:
            console.rule(name)
            STAGES[name](job)


def _quiet() -> None:
    """Progress is this program's to show, not each library's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def evaluate(run: Run, config: Config, *, ablations: bool, address: str | None, console: Console) -> dict[str, Any]:
    _quiet()
    with connected(config, address, namespace=f"rporec-{config.name}") as cluster:
        return evaluate_run(Job(run, config, cluster, console), ablations=ablations)
