"""What serving costs: HTTP and retrieval against an empty application, tokens through HTTP against the bare engine.

    rporec bench serve [--json]

Nothing is trained, since that does not change the cost: a catalogue of 5,000 items, a RecHead with its experts, a
tiny model of about 1 M parameters and one of about 10 M that writes 64 tokens. `fast` is `reason: false`. The empty
application has the same hops (proxy, FastAPI ingress, a batching deployment) on the same cluster and is asked in turns
with the real one. The bare engine is asked by as many coroutines as HTTP has clients; it and the reasoner's engine are
pinned to the last core in turns, and everything else has the rest.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from actors.cluster import connected, cores
from benchmarks.result import result
from benchmarks.reward import untrained_run
from rporec.config import Config, override, parse_config
from rporec.engine.vllm_start import engine_environment
from rporec.promotion import promote_best
from rporec.recipes.rporec import RPORec
from rporec.run import Run
from serve.launch import APPLICATION, deploy
from serve.served import Served

CLIENTS = 16
TOKENS = 64
ROUNDS = 3
SECONDS = 6.0  # of one measurement of throughput
REQUESTS = 150  # of one measurement of latency
CONFIG: dict[str, Any] = {
    "data": {"synthetic": {"series": 834, "volumes": 6, "users": 3000}},
    "sampling": {"max_tokens": TOKENS},
    "promotion": {"automatic": False},
}
TEN_MILLION = {"hidden": 320, "layers": 6, "heads": 10, "kv_heads": 5, "intermediate": 1024, "vocabulary": 4096}


class Question(BaseModel):
    history: list[str]
    k: int


QUICK = {"rounds": 1, "seconds": 3.0, "reasoned": ("large",)}


def run(
    rounds: int = ROUNDS, *, seconds: float = SECONDS, reasoned: Sequence[str] = ("tiny", "large")
) -> dict[str, Any]:
    """seconds: of one measurement of throughput; reasoned: the models that write."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny = _prepared(Path(scratch) / "tiny", parse_config(CONFIG))
        large = _prepared(Path(scratch) / "large", parse_config({**CONFIG, "tiny": TEN_MILLION}))
        with connected(tiny.config(), None, "bench-serve"):
            return asyncio.run(_measured(tiny, large, rounds, seconds, reasoned))


def _prepared(folder: Path, config: Config) -> Run:
    run = untrained_run(folder, config)
    for stage in ("data", "warmup", "stage1"):
        with run.stage(stage):
            pass
    promote_best(run)
    return run


async def _measured(tiny: Run, large: Run, rounds: int, duration: float, reasoned: Sequence[str]) -> dict[str, Any]:
    port = 8765
    url = f"http://127.0.0.1:{port}"
    core = max(os.sched_getaffinity(0)) if cores() > 1 else None
    settings = [f"serve.engine_core={core}"] if core is not None else []
    ratios: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    absolute: dict[str, Any] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        # What is not to write answers without reasoning alone, which `tiny` stands for.
        for name, one in (("tiny", tiny), ("large", large)):
            if name != "tiny" and name not in reasoned:
                continue
            served = Served(one, override(one.config(), settings))
            await asyncio.to_thread(deploy, served, "127.0.0.1", port, guarded=False, cuda=False)
            if name == "tiny":
                await asyncio.to_thread(serve.run, _empty(), name="empty", route_prefix="/empty")
                await _fast(http, url, one, rounds, duration, ratios, seconds, absolute)
                await asyncio.to_thread(serve.delete, "empty")
            if name in reasoned:
                await _reasoned(http, url, one, core, name, rounds, duration, ratios, absolute)
            await asyncio.to_thread(serve.delete, APPLICATION)
    serve.shutdown()
    return result("serve", ratios, seconds, {}, absolute=absolute)


# --- reason: false -------------------------------------------------------------------------------
def _empty() -> Any:
    app = FastAPI()

    @serve.deployment(ray_actor_options={"num_cpus": 0, "resources": {"serve": 1}}, max_ongoing_requests=64)
    class Answers:
        @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
        async def answer(self, numbers: list[int]) -> list[list[int]]:
            return [[number] * 10 for number in numbers]

    @serve.deployment(ray_actor_options={"num_cpus": 0, "resources": {"serve": 1}}, max_ongoing_requests=64)
    @serve.ingress(app)
    class Front:
        def __init__(self, answers: Any) -> None:
            self._answers = answers

        @app.post("/ask")
        async def ask(self, question: Question) -> list[int]:
            return await self._answers.answer.remote(question.k)

    return Front.bind(Answers.bind())


async def _fast(
    http: aiohttp.ClientSession,
    url: str,
    run: Run,
    rounds: int,
    duration: float,
    ratios: dict,
    seconds: dict,
    absolute: dict,
) -> None:
    histories = _histories(run)

    def real(number: int) -> dict[str, Any]:
        return {"history": histories[number % len(histories)], "k": 10, "reason": False}

    def empty(number: int) -> dict[str, Any]:
        return {"history": histories[number % len(histories)], "k": 10}

    ways = {
        "fast": lambda number: _post(http, f"{url}/v1/recommend", real(number)),
        "empty": lambda number: _post(http, f"{url}/empty/ask", empty(number)),
    }
    alone: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, ask in ways.items():
            took = [await _timed(ask, number) for number in range(REQUESTS)]
            rate = await _throughput(ask, CLIENTS, duration)
            if turn:
                alone[name] += took
                rates[name].append(rate)
    p50 = {name: float(np.median(took)) for name, took in alone.items()}
    ratios["fast_added_p50_ms"] = round((p50["fast"] - p50["empty"]) * 1e3, 2)
    share = np.median(np.array(rates["fast"]) / np.array(rates["empty"]))
    ratios["fast_share_of_throughput"] = round(float(share), 3)
    for name in ways:
        seconds[f"{name}_p50"] = p50[name]
        seconds[f"{name}_p99"] = float(np.percentile(alone[name], 99))
        absolute[f"{name}_requests_per_second"] = round(float(np.median(rates[name])), 1)


# --- reason: true --------------------------------------------------------------------------------
async def _reasoned(
    http: aiohttp.ClientSession,
    url: str,
    run: Run,
    core: int | None,
    name: str,
    rounds: int,
    duration: float,
    ratios: dict,
    absolute: dict,
) -> None:
    recipe = RPORec(run, run.config())
    items = recipe.dataset.catalog.index
    histories = _histories(run)
    prompts = [recipe.writer.prompt_ids([items[one] for one in history]) for history in histories]
    bare = ray.remote(_Bare).options(**_options(run.config())).remote(run, core)
    lengths = await bare.lengths.remote(prompts)
    full = [history for history, length in zip(histories, lengths, strict=True) if length == TOKENS]
    prompts = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length == TOKENS]
    assert len(full) >= CLIENTS, "the untrained model ends its completions early; change the seed"

    def body(number: int, stream: bool) -> dict[str, Any]:
        return {"history": full[number % len(full)], "k": 10, "timeout_ms": 600_000, "stream": stream}

    firsts: list[float] = []

    async def streamed(number: int) -> None:
        firsts.append(await _first_token(http, f"{url}/v1/recommend", body(number, True)))

    ways: dict[str, Callable[[], Awaitable[float]]] = {
        "bare": lambda: bare.tokens_per_second.remote(prompts, CLIENTS, duration),
        "whole": lambda: _tokens(lambda n: _post(http, f"{url}/v1/recommend", body(n, False)), duration),
        "streamed": lambda: _tokens(streamed, duration),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, measure in ways.items():
            rate = await measure()
            if turn:
                rates[way].append(rate)
            else:
                firsts.clear()
    ray.kill(bare)
    for way in ("whole", "streamed"):
        share = np.median(np.array(rates[way]) / np.array(rates["bare"]))
        ratios[f"{name}_{way}_share_of_tokens"] = round(float(share), 3)
    absolute[f"{name}_tokens_per_second"] = {way: round(float(np.median(rate)), 1) for way, rate in rates.items()}
    absolute[f"{name}_first_token_seconds_at_{CLIENTS}"] = round(float(np.median(firsts)), 4)
    alone = [await _first_token(http, f"{url}/v1/recommend", body(number, True)) for number in range(20)]
    absolute[f"{name}_first_token_seconds"] = round(float(np.median(alone)), 4)


async def _tokens(ask: Callable[[int], Awaitable[Any]], seconds: float) -> float:
    return TOKENS * await _throughput(ask, CLIENTS, seconds)


class _Bare:
    """The engine without HTTP, in a process of its own."""

    def __init__(self, run: Run, core: int | None) -> None:
        from rporec.engine.vllm import VllmEngine

        self.recipe = RPORec(run, run.config())
        config = run.config()
        self.engine = VllmEngine(run.warm_model, config.engine, context=self.recipe.context, seed=config.seed)
        if core is not None:
            self.engine.pin(core).result()

    async def lengths(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Tokens that the model writes for each prompt."""
        return [len(tokens) for tokens in await asyncio.gather(*(self._write(prompt) for prompt in prompts))]

    async def tokens_per_second(self, prompts: Sequence[Sequence[int]], clients: int, seconds: float) -> float:
        async def ask(number: int) -> None:
            await self._write(prompts[number % len(prompts)])

        return TOKENS * await _throughput(ask, clients, seconds)

    async def _write(self, prompt: Sequence[int]) -> np.ndarray:
        [written] = await asyncio.wrap_future(self.engine.submit(prompt, self.recipe.greedy_spec()))
        return written.token_ids


# --- asking --------------------------------------------------------------------------------------
async def _throughput(ask: Callable[[int], Awaitable[Any]], clients: int, seconds: float) -> float:
    """Requests per second that `clients` get which ask again as soon as they are answered."""
    numbers = itertools.count()
    began = time.perf_counter()
    done = 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await ask(next(numbers))
            done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - began)


async def _timed(ask: Callable[[int], Awaitable[Any]], number: int) -> float:
    began = time.perf_counter()
    await ask(number)
    return time.perf_counter() - began


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with http.post(url, json=body) as answer:
        await answer.read()
        assert answer.status == 200, await answer.text()


async def _first_token(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> float:
    """Seconds to the first piece of text; the stream is read to its end."""
    began = time.perf_counter()
    first, rest = 0.0, b""
    async with http.post(url, json=body) as answer:
        async for piece in answer.content.iter_any():
            first = first or time.perf_counter() - began
            rest += piece
    last = rest.strip().split(b"\n\n")[-1]
    assert last.startswith(b"event: result"), last
    assert json.loads(last.partition(b"data: ")[2])["fallback"] is None
    return first


def _histories(run: Run) -> list[list[str]]:
    dataset = RPORec(run, run.config()).dataset
    return [
        [dataset.catalog.ids[item] for item in dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]][-20:]
        for user in range(64)
    ]


def _options(config: Config) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "resources": {"serve": 1},
        "runtime_env": {"env_vars": engine_environment(config.engine)},
        "max_concurrency": 256,
    }
