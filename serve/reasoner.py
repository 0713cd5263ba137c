"""The reasoner: vLLM behind Ray Serve. It writes the chain of thought and the answer for one history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from ray import serve

from rporec.config import EngineConfig
from rporec.engine.types import Generated, Version
from rporec.engine.vllm import VllmEngine
from rporec.engine.weights import load_safetensors
from rporec.promotion import Promoted
from rporec.recipes.rporec import RPORec
from serve.messages import Thought
from serve.served import Served, still


class Model:
    """An engine that holds one version at a time, and how many requests it is answering."""

    def __init__(self, engine: VllmEngine, version: str) -> None:
        self.engine, self.version = engine, version
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __enter__(self) -> Model:
        self.running += 1
        self.idle.clear()
        return self

    def __exit__(self, *_: Any) -> None:
        self.running -= 1
        if not self.running:
            self.idle.set()


@serve.deployment
class Reasoner:
    """A request keeps the model that it began with, so that no completion is of two versions.

    A new version goes into the model that no request uses (`serve.engines: 2`); with one model alone
    new requests wait until the running ones have ended.
    """

    async def __init__(self, served: Served) -> None:  # type: ignore[misc]  # Serve awaits it
        self._served = served
        self._recipe = RPORec(served.run, served.config)
        self._catalog = served.growing(self._recipe.dataset)
        self._writer = self._recipe.writer
        self._spec = self._recipe.greedy_spec()
        first = served.promoted()
        count = served.config.serve.engines
        models = [Model(await asyncio.to_thread(self._engine, first, number), first.version) for number in range(count)]
        self._model, self._spare = models[0], models[-1]
        self._open = asyncio.Event()  # closed while the only model changes its version
        self._open.set()
        self._following = asyncio.create_task(served.follow(lambda: self._model.version, self._take))

    def _engine(self, version: Promoted, number: int) -> VllmEngine:
        config = self._recipe.config
        engine = VllmEngine(
            version.model,
            _shared(config.engine, config.serve.engines),
            context=self._recipe.context,
            seed=config.seed,
            version=Version.parse(version.version),
            name=f"reasoner engine {number}",
        )
        if config.serve.engine_core is not None:
            engine.pin(config.serve.engine_core).result()
        return engine

    # --- answering -----------------------------------------------------------------------------
    async def reason(self, history: np.ndarray, items: int) -> Thought:
        """The greedy completion for a history (item indices, oldest first) over a catalogue of `items` items."""
        prompt = self._prompt(history, items)
        await self._open.wait()
        with self._model as model:
            return await self._finish(model, model.engine.submit(prompt, self._spec))

    async def stream(self, history: np.ndarray, items: int) -> AsyncIterator[str | Thought]:
        """As `reason`: what is written as it grows, piece by piece, and then the whole."""
        prompt = self._prompt(history, items)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(text: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        await self._open.wait()
        with self._model as model:
            writing = model.engine.stream(prompt, self._spec, put)
            writing.add_done_callback(lambda _: put(None))
            finishing = asyncio.ensure_future(self._finish(model, writing))
            try:
                sent = 0
                while (text := await pieces.get()) is not None:
                    if len(text) > sent:
                        yield text[sent:]
                        sent = len(text)
                thought = await finishing
                if thought.text[sent:]:
                    yield thought.text[sent:]
                yield thought
            finally:
                finishing.cancel()

    async def _finish(self, model: Model, writing: Future[list[Generated]]) -> Thought:
        try:
            [written] = await asyncio.wrap_future(writing)
        except asyncio.CancelledError:
            model.engine.drop(writing)  # nobody waits any more: the client is gone, or its time is over
            raise
        return Thought(written.text, model.version)

    def _prompt(self, history: np.ndarray, items: int) -> list[int]:
        if items > len(self._writer.items.catalog):
            self._catalog.refresh()
            self._writer = self._writer.with_catalog(self._catalog.catalog)
        return self._writer.prompt_ids(history)

    # --- another version -----------------------------------------------------------------------
    async def _take(self, version: Promoted) -> None:
        tensors = await asyncio.to_thread(load_safetensors, version.model)
        model, alone = self._spare, self._spare is self._model
        if alone:
            self._open.clear()
        try:
            await model.idle.wait()
            await asyncio.wrap_future(model.engine.update_weights(Version.parse(version.version), tensors))
            model.version = version.version
            self._model, self._spare = model, self._model
        finally:
            self._open.set()

    async def check_health(self) -> None:
        """Raises when an engine has died, or nobody looks for versions any more: Serve then replaces this replica."""
        still(self._following)
        for model in {self._model, self._spare}:
            await asyncio.wrap_future(model.engine.alive())

    async def state(self) -> dict[str, Any]:
        """The version that new requests get, and what the engine is doing."""
        return {"version": self._model.version, "running": self._model.running, **self._model.engine.stats()}


def _shared(config: EngineConfig, engines: int) -> EngineConfig:
    """Each engine's part of a GPU, where the config does not say."""
    import torch

    if not torch.cuda.is_available():
        return config
    return config.model_copy(update={"args": {"gpu_memory_utilization": round(0.9 / engines, 2), **config.args}})
