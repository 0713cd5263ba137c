"""`rporec serve`: the deployments of a run on the cluster that trains it, on another one, or on one started here."""

from __future__ import annotations

import ipaddress
import threading
from typing import Any

from rich.console import Console

from actors.cluster import connected
from actors.live import live_address
from rporec.config import Config, ConfigError
from rporec.promotion import promote_best, promoted
from rporec.run import Run
from serve.guard import TOKEN_VARIABLE, read_token
from serve.served import Served

APPLICATION = "rporec"


def serve_run(run: Run, config: Config, host: str, port: int, address: str | None, console: Console) -> None:
    """Deploy, say where, and wait for Ctrl-C; then take the deployments down."""
    guarded = not is_loopback(host)
    if guarded and read_token(config.serve) is None:
        raise ConfigError(
            f"--host {host} is reached from other machines: set {TOKEN_VARIABLE} or serve.token_file, "
            "or bind to 127.0.0.1"
        )
    if promoted(run) is None:
        promote_best(run)
    address = address or live_address(run)
    with connected(config, address, f"serve-{run.folder.name}") as cluster:
        with console.status("starting the deployments (vLLM takes a while)"):
            deploy(Served(run, config), host, port, guarded=guarded, cuda=cluster.cuda)
        console.print(f"http://{_written(host)}:{port}  serves {run.folder} (Ctrl-C stops it)")
        try:
            threading.Event().wait()
        finally:
            from ray import serve

            serve.delete(APPLICATION)
            if not serve.status().applications:
                serve.shutdown()  # the HTTP proxy as well


def deploy(served: Served, host: str, port: int, *, guarded: bool, cuda: bool) -> Any:
    """Deploy to the cluster that this process is connected to; returns when all replicas are healthy."""
    from ray import serve

    from serve.deployments import application

    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    return serve.run(application(served, guarded=guarded, cuda=cuda), name=APPLICATION, route_prefix="/")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host
