"""The thread of an engine: it steps while there is work and serves commands between steps.

Whatever touches the engine (a request, new weights, an abort) is a command, so nothing happens in
the middle of a step and no lock guards the model. Commands are served in the order in which they
came, all that wait before the next step begins.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rporec.engine.types import EngineError


class StepLoop:
    """Runs `step` as long as `working()`; calls `ended(error)` once, when it will never step again.

    It ends on `close`, on an exception in `step`, or on an EngineError in a command; any other
    exception of a command is its caller's alone. Every future that it gave out and that is open
    then raises the EngineError, except those of commands already served: they are `ended`'s.
    """

    def __init__(
        self,
        name: str,
        *,
        step: Callable[[], None],
        working: Callable[[], bool],
        ended: Callable[[EngineError], None],
    ) -> None:
        self.name = name
        self._paused = False
        self.busy_seconds = 0.0
        self._step, self._working, self._ended = step, working, ended
        self._commands: queue.Queue[tuple[Callable[[Future], None], Future] | None] = queue.Queue()
        self._gate = threading.Lock()  # no command is queued after the last one was taken out
        self._end: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Future:
        """Run `function` between two steps; the future has its result."""
        return self.command(lambda future: future.set_result(function()))

    def command(self, command: Callable[[Future], None]) -> Future:
        """Run `command(future)` between two steps; it answers the future, then or in a later step."""
        future = open_future()
        with self._gate:
            if self._end is None:
                self._commands.put((command, future))
                return future
        future.set_exception(self._end)
        return future

    def pause(self) -> Future[None]:
        """Serve commands without stepping, until `resume`."""
        return self.call(lambda: self._pause(True))

    def resume(self) -> Future[None]:
        return self.call(lambda: self._pause(False))

    def close(self) -> None:
        """End after the commands queued so far; returns when the thread has. Safe to call twice."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        end = EngineError(f"{self.name} is closed")
        try:
            while self._serve():
                began = time.perf_counter()
                self._step()
                self.busy_seconds += time.perf_counter() - began
        except Exception as error:
            end = EngineError(f"{self.name} died: {one_line(error)}; probable cause: {engine_cause(error)}")
            end.__cause__ = error
        with self._gate:
            self._end = end
            while not self._commands.empty():
                if (item := self._commands.get()) is not None:
                    item[1].set_exception(end)
        self._ended(end)

    def _pause(self, paused: bool) -> None:
        self._paused = paused

    def _serve(self) -> bool:
        """Serve what waits, blocking while there is nothing to step; False once closed."""
        while True:
            try:
                item = self._commands.get(block=self._paused or not self._working())
            except queue.Empty:
                return True
            if item is None:
                return False
            command, future = item
            try:
                command(future)
            except Exception as error:
                future.set_exception(error)
                if isinstance(error, EngineError):
                    raise


def open_future() -> Future:
    """A future that its reader cannot cancel under the engine's hands."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


def one_line(error: BaseException) -> str:
    """An exception as one line."""
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, EngineError) else f"{type(error).__name__}: {first}".rstrip(": ")


def out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    signs = ("out of memory", "outofmemory", "available memory", "free memory", "kv cache")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def engine_cause(error: BaseException) -> str:
    if out_of_memory(error):
        return "no memory left; lower engine.max_num_seqs or engine.kv_cache_mb"
    if "cuda" in str(error).lower():
        return "the GPU failed; look at nvidia-smi and the system log of its node"
    return "a fault in the engine; its log has the traceback"
