"""`rporec serve`: the deployments of a run on the cluster that trains it, on another one, or on one started here."""

from __future__ import annotations

import ipaddress
import time
from typing import Any

from rich.console import Console

from actors.cluster import awaited, connected, last_words
from actors.inspect import check_address
from actors.live import live_address
from rporec.config import Config, ConfigError
from rporec.engine.transfer import engine_ranks
from rporec.promotion import make_servable
from rporec.report.live import say
from rporec.run import Run, RunError
from serve.guard import TOKEN_VARIABLE, read_token
from serve.served import Served

APPLICATION = "rporec"
LOOK_EVERY = 5.0  # seconds between two looks at the cluster
SILENT = 6  # looks in a row that find no answer until it counts as gone: one connection may fail under load
SERVE_LOGS = "its log is in /tmp/ray/session_latest/logs/serve, on its node"


def serve_run(run: Run, config: Config, host: str, port: int, address: str | None, console: Console) -> None:
    """Deploy, say where, and wait for Ctrl-C; then take the deployments down."""
    token = read_token(config.serve)
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} is reached from other machines: set {TOKEN_VARIABLE} or serve.token_file, "
            "or bind to 127.0.0.1"
        )
    make_servable(run)
    address = address or live_address(run)
    with connected(config, address, f"serve-{run.folder.name}") as cluster:
        _check_free(host, port)
        serving = config.serve
        replicas = serving.ingresses.min + serving.reasoners.min + serving.retrievers.min
        if line := awaited({"serve": replicas}):
            say(console, line)
        import ray  # not before it is joined: on import it reads how its cluster authenticates

        needed = engine_ranks(config.engine) * serving.reasoners.min if cluster.cuda else 0
        if (free := ray.available_resources().get("GPU", 0)) < needed:  # a training here holds what it has to its end
            say(console, f"waits for GPUs: {free:g} of {needed} free")
        try:
            with console.status("starting the deployments (vLLM takes a while)"):
                deploy(Served(run, config), host, port, guarded=token is not None, cuda=cluster.cuda)
            console.print(f"http://{_written(host)}:{port}  serves {run.folder} (Ctrl-C stops it)")
            _until_gone(cluster.address, run)
        finally:
            _take_down(cluster.address)


def _check_free(host: str, port: int) -> None:
    """Raises ConfigError when this cluster serves something already, or elsewhere."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    if APPLICATION in serve.status().applications:
        raise ConfigError(
            "this cluster serves a run already; stop that `rporec serve` first, or its job; if neither is there any "
            "more, `serve shutdown --yes` on the head"
        )
    listening = client.http_config
    if (listening.host, listening.port) != (host, port):
        raise ConfigError(
            f"Ray Serve listens at {listening.host}:{listening.port} on this cluster; give --host and --port to match"
        )


def _until_gone(address: str, run: Run) -> None:
    """Returns never; raises RunError when the cluster has ended, as that of a training does with it."""
    silent = 0
    while silent < SILENT:
        time.sleep(LOOK_EVERY)
        try:
            check_address(address)
            silent = 0
        except ConnectionError:
            silent += 1
    raise RunError(f"{run.folder}: the cluster that served it has ended; `rporec serve` starts another")


def _take_down(address: str) -> None:
    from ray import serve

    try:
        check_address(address)
    except ConnectionError:
        return  # its cluster took it along
    serve.delete(APPLICATION)
    if not serve.status().applications:
        serve.shutdown()  # the HTTP proxy as well


def deploy(served: Served, host: str, port: int, *, guarded: bool, cuda: bool) -> Any:
    """Deploy to the cluster that this process is connected to; returns when all replicas are healthy.

    Raises RunError when some cannot be started.
    """
    from ray import serve

    from serve.deployments import application

    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    made = application(served, guarded=guarded, cuda=cuda)
    try:
        return serve.run(made, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:  # Serve's own, which names deployments and no reasons
        raise RunError(f"{served.run.folder}: {_failure() or last_words(error)}; {SERVE_LOGS}") from error


def _failure() -> str:
    """What the deployments that failed to start died of."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    failed = {
        name: deployment.message
        for name, deployment in (application.deployments if application else {}).items()
        if deployment.status == "DEPLOY_FAILED"
    }
    return "; ".join(f"{name} did not start: {last_words(RuntimeError(said))}" for name, said in failed.items())


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host
