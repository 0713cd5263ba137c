"""The three deployments as one Ray Serve application: ingress → reasoner, ingress → retriever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from actors.cluster import NO_GPU
from rporec.config import Config, Elastic
from rporec.data.feedback import FeedbackLog
from rporec.engine.transfer import engine_ranks
from rporec.engine.types import EngineError
from rporec.engine.vllm_start import engine_environment
from serve.app import build_app
from serve.guard import read_token
from serve.messages import Query, Ranked, Thought
from serve.reasoner import Reasoner
from serve.retriever import Retriever
from serve.schema import Readiness
from serve.served import Served
from serve.service import TRIES, Service, Unavailable

DEAD = (RayActorError, ReplicaUnavailableError, EngineError)
FULL = (BackPressureError, DeploymentUnavailableError)


class Deployments:
    """The other two deployments as the service calls them."""

    def __init__(self, reasoner: Any, retriever: Any) -> None:
        self._reasoner, self._retriever = reasoner, retriever

    async def reason(self, history: np.ndarray, items: int) -> Thought:
        return await _asked("the reasoner", lambda: self._reasoner.reason.remote(history, items))

    async def rank(self, query: Query) -> Ranked:
        return await _asked("the retriever", lambda: self._retriever.rank.remote(query))

    async def stream(self, history: np.ndarray, items: int) -> AsyncGenerator[str | Thought, None]:
        """Begun anew on another replica only as long as nothing has come out of it."""
        begun = False
        for _ in range(TRIES):
            pieces = self._reasoner.options(stream=True).stream.remote(history, items)
            try:
                async for piece in pieces:
                    begun = True
                    yield piece
                return
            except DEAD:
                if begun:
                    raise Unavailable("the reasoner was lost; ask again") from None
            except FULL:
                raise Unavailable("the reasoner has too many requests; ask again later") from None
            finally:
                pieces.cancel()  # nothing when it is over; else nobody listens any more
        raise Unavailable("the reasoner was lost; ask again")

    async def ready(self) -> Readiness:
        states = asyncio.gather(self._reasoner.state.remote(), self._retriever.state.remote())
        try:
            _, retriever = await asyncio.wait_for(states, 5.0)
        except (TimeoutError, *DEAD, *FULL):
            raise Unavailable("a deployment does not answer") from None
        return Readiness(status="ready", version=retriever["version"], items=retriever["items"])


async def _asked(who: str, ask: Callable[[], Any]) -> Any:
    """The answer of some replica; when one dies under the request another one is asked."""
    for _ in range(TRIES):
        response = ask()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # Serve would let it run on
            raise
        except DEAD:
            continue
        except FULL:
            raise Unavailable(f"{who} has too many requests; ask again later") from None
    raise Unavailable(f"{who} was lost {TRIES} times; ask again later")


@serve.deployment
@serve.ingress()
class Ingress:
    """`guarded`: refuse to start without a token, for a service that other machines reach."""

    def __init__(self, served: Served, guarded: bool, reasoner: Any, retriever: Any) -> None:
        config = served.config.serve
        token = read_token(config)
        if guarded and token is None:
            raise RuntimeError("no bearer token on this node; set serve.token_file or RPOREC_SERVE_TOKEN")
        dataset = served.dataset()
        others = Deployments(reasoner, retriever)
        growing, log = served.growing(dataset), FeedbackLog(served.run.feedback)
        self._service = Service(dataset, growing, log, others, timeout_ms=config.timeout_ms)
        self._app = build_app(self._service, others.ready, config, token)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def application(served: Served, *, guarded: bool, cuda: bool) -> Any:
    """What `serve.run` takes."""
    config = served.config
    settings = config.serve
    if settings.token_file is not None:  # replicas have other working directories
        absolute = settings.model_copy(update={"token_file": str(Path(settings.token_file).absolute())})
        served = replace(served, config=config.model_copy(update={"serve": absolute}))
    gpus = engine_ranks(config.engine) if cuda else 0  # whole ones, which its engines share: no `gpu_share` of a run
    reasoner = Reasoner.options(**_options(config, settings.reasoners, cuda, gpus=gpus))
    retriever = Retriever.options(**_options(config, settings.retrievers, cuda))
    # An ingress only waits: it must have room for what the others cannot take yet, and for those who ask how it is.
    waiting = settings.ongoing * (settings.reasoners.max + settings.retrievers.max) + 2 * settings.queued
    ingress = Ingress.options(**_options(config, settings.ingresses, cuda) | {"max_ongoing_requests": waiting})
    return ingress.bind(served, guarded, reasoner.bind(served), retriever.bind(served))


def _options(config: Config, replicas: Elastic, cuda: bool, gpus: int = 0) -> dict[str, Any]:
    settings = config.serve
    environment = engine_environment(config.engine, "cuda" if gpus else "cpu") | ({} if gpus else NO_GPU)
    count: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        half = max(1, settings.ongoing // 2)  # a replica at half of what it may take calls for another one
        scaling = {"min_replicas": replicas.min, "max_replicas": replicas.max, "target_ongoing_requests": half}
        count = {"autoscaling_config": scaling}
    return count | {
        "logging_config": {"enable_access_log": False},  # `Guard` has one, which tells nothing of users
        "max_ongoing_requests": settings.ongoing,
        "max_queued_requests": settings.queued,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": 20.0,
        "ray_actor_options": {
            "num_cpus": 0,
            "num_gpus": gpus,
            "resources": {"serve": 1},
            "runtime_env": {"env_vars": environment | {"PYTHONWARNINGS": "ignore"}},
        },
    }
