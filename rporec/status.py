"""What a run is doing now, from the controller's last word in `status.json`."""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape
from rich.table import Table

from rporec.files import read_json, read_lines
from rporec.run import STAGES, Run

SILENT = 30.0  # seconds after which a controller that should be writing is taken for dead
STATES = ("PENDING", "RUNNING", "GENERATED", "SCORED", "READY", "CONSUMED")


def read_status(run: Run) -> dict[str, Any]:
    """`{state, step, version, groups, actors, stages, …}`; see `rporec status --json`.

    `state` is STARTING, RUNNING, FINISHED, STOPPED or FAILED in stage 2, LOST for a run whose controller
    fell silent, and the name of the stage that comes next where stage 2 has not begun.
    """
    stages = read_json(run.folder / "stages.json", {})
    status = run.status()
    if not status:
        pending = next((stage for stage in STAGES if stage not in stages), None)
        status = {"state": f"before {pending}" if pending else "FINISHED", "step": 0, "version": 0, "actors": []}
        status["groups"] = {**dict.fromkeys(STATES, 0), "DROPPED": {}}
    elif status["state"] in ("STARTING", "RUNNING") and time.time() - status["time"] > SILENT:
        status["state"] = "LOST"
        status["actors"] = [{**actor, "state": "LOST"} for actor in status["actors"]]
    steps = read_lines(run.steps)
    return {**status, "stages": stages, "last_step": steps[-1] if steps else {}}


def status_table(status: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("state", str(status["state"]))
    table.add_row(
        "stages", ", ".join(f"{name} ({cost['seconds']:.0f} s)" for name, cost in status["stages"].items()) or "–"
    )
    table.add_row("step", f"{status['step']}, version {status['version']}")
    groups = status["groups"]
    table.add_row("groups", ", ".join(f"{state.lower()} {groups[state]:,}" for state in STATES))
    table.add_row("dropped", ", ".join(f"{reason} {n:,}" for reason, n in groups["DROPPED"].items()) or "none")
    for actor in status["actors"]:
        table.add_row(
            actor["role"], f"{actor['name']}: {actor['state']}, pid {actor['pid']}, node {actor['node'][:12]}"
        )
    for death in status.get("deaths", [])[-3:]:
        table.add_row("died", f"{death['name']}, pid {death['pid']}: {escape(death['message'])}")
    if status.get("failure"):
        table.add_row("failure", escape(status["failure"]))
    return table
