"""vLLM in this process, stepped by a thread of its own (`rporec.engine.step_loop`).

Requests are seeded one by one: the same spec gives the same completion. The arithmetic of a step
depends in its last bits on what else is in the batch, so identical samples need an identical
batch, or the luck of no draw within 1e-6 of a boundary.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rporec.config import EngineConfig
from rporec.engine.decoder import Decoder
from rporec.engine.step_loop import StepLoop, one_line
from rporec.engine.transfer import engine_ranks
from rporec.engine.trie import check_room, load_trie, search
from rporec.engine.types import (
    FIRST_VERSION,
    EngineError,
    Generated,
    GenerationAborted,
    ItemSpec,
    SamplingSpec,
    Spec,
    Version,
)
from rporec.engine.vllm_search import VllmSearch
from rporec.engine.vllm_start import NUCLEUS, start_llm
from rporec.engine.weights import Described, check_fit, expected_shapes

# vLLM keeps the context of a forward pass in a global of the process: of several engines one steps at a time.
_STEPPING = threading.Lock()
TEXT_EVERY = 0.05  # seconds: quicker than people read, and decoding costs the engine little


@dataclass(eq=False)
class _Request:
    """A prompt that is being completed: `starts[i]` are (version, first token) of completion i.

    `finish` turns vLLM's output into the future's result, or into None while others share the future.
    `on_text` hears of the text so far, at most every `TEXT_EVERY` seconds.
    """

    future: Future
    finish: Callable[[Any, _Request], Any]
    starts: list[list[tuple[Version, int]]]
    on_text: Callable[[str], None] | None = None
    heard: float = 0.0


class VllmEngine:
    """An `Engine`. Construction blocks until the model is loaded; raises EngineError.

    It takes CUDA where torch sees it. `args` of the config override what is set here.
    """

    def __init__(
        self,
        model_dir: Path | str,
        config: EngineConfig,
        *,
        context: int,
        seed: int,
        version: Version = FIRST_VERSION,
        name: str = "engine",
    ) -> None:
        self.version, self.name, self.context = version, name, context
        self._keeps_cache = config.in_flight == "keep"
        self._spread = engine_ranks(config) > 1
        self._expected = expected_shapes(model_dir)
        with _STEPPING:
            self._llm = start_llm(model_dir, config, context=context, seed=seed, name=name)
        self._core = self._llm.llm_engine
        self.decoder = Decoder(model_dir)
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._has_nucleus = NUCLEUS in (self._core.vllm_config.model_config.logits_processors or ())
        self._labelled = _labels_tokens(self._core)
        if self._labelled:
            self._core.set_weight_version(str(version))

        self._requests: dict[str, _Request] = {}
        self._submitted = self._tokens = 0
        self._loop = StepLoop(name, step=self._step, working=self._core.has_unfinished_requests, ended=self._fail_all)

    # --- what callers use ----------------------------------------------------------------------
    def submit(self, prompt_ids: Sequence[int], spec: Spec) -> Future[list[Generated]]:
        """One request of n completions, so that they share the prompt's cache, or one search; see `Engine.submit`."""
        ids = [int(token) for token in prompt_ids]
        if isinstance(spec, ItemSpec):
            return self._loop.command(lambda future: self._search(future, ids, spec))
        params = self._sampling_params(spec)
        return self._loop.command(lambda future: self._add(future, ids, params, self._completions))

    def stream(
        self, prompt_ids: Sequence[int], spec: SamplingSpec, on_text: Callable[[str], None]
    ) -> Future[list[Generated]]:
        """As `submit` of one completion; `on_text`, called on the engine's thread, hears of the text so far."""
        ids = [int(token) for token in prompt_ids]
        params = self._sampling_params(spec, growing=True)
        return self._loop.command(lambda future: self._add(future, ids, params, self._completions, on_text))

    def drop(self, future: Future) -> Future[int]:
        """Stop the requests of one future, which raises GenerationAborted; returns how many there were."""
        return self._loop.call(lambda: self._drop(future))

    def score(self, sequences: Sequence[Sequence[int]]) -> Future[list[np.ndarray]]:
        """Teacher-forced log-probabilities under the current weights; see `Engine.score`."""
        rows = [[int(token) for token in sequence] for sequence in sequences]
        return self._loop.command(lambda future: self._add_scoring(future, rows))

    def update_weights(self, version: Version, tensors: Iterable[tuple[str, Any]]) -> Future[dict[str, Any]]:
        """Take new weights before the next step; running generations go on, see `engine.in_flight`.

        The future gives {"seconds", "in_flight"}. Weights that do not fit are refused with
        WeightsError and change nothing; a failure half-way ends the engine, whose weights are then
        neither the old nor the new ones.
        """
        pairs = [(name, _as_torch(tensor)) for name, tensor in tensors]
        if self._spread:  # they go to other processes, and a view is pickled with all of the buffer that it is of
            pairs = [(name, tensor.clone()) for name, tensor in pairs]
        shapes = {name: tuple(tensor.shape) for name, tensor in pairs}
        return self._loop.call(lambda: self._update(version, shapes, {"tensors": pairs}))

    def join(self, address: str, port: int, world: int) -> Future[None]:
        """Enter an NCCL group of `world` ranks, the learner's and one for each GPU of this engine.

        Blocks the engine until all are there. A group that it was in before is left.
        """
        group = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world}
        return self._loop.call(lambda: self._llm.init_weight_transfer_engine({"init_info": {"group": group}}))

    def receive_weights(self, version: Version, described: Sequence[Described]) -> Future[dict[str, Any]]:
        """As `update_weights`, with the tensors that the learner broadcasts to the group, in that order."""
        names, dtypes, shapes = zip(*described, strict=True)
        broadcast = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        shape_of = dict(zip(names, shapes, strict=True))
        return self._loop.call(lambda: self._update(version, shape_of, {"broadcast": broadcast}))

    def abort(self) -> Future[int]:
        return self._loop.call(self._abort)

    def pin(self, core: int) -> Future[None]:
        """Keep the engine's thread, where all its computing is done, on one core."""
        return self._loop.call(lambda: os.sched_setaffinity(0, {core}))

    def alive(self) -> Future[None]:
        """Done after the present step; raises the EngineError of an engine that has died."""
        return self._loop.call(lambda: None)

    def pause(self) -> Future[None]:
        """Queue requests without stepping, until `resume`: what comes meanwhile starts as one batch."""
        return self._loop.pause()

    def resume(self) -> Future[None]:
        return self._loop.resume()

    def stats(self) -> dict[str, Any]:
        """Requests running and waiting, tokens of finished completions, tokens per busy second, and
        the share of the KV cache in use."""
        scheduler = self._core.engine_core.engine_core.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / max(self._loop.busy_seconds, 1e-9),
            "kv_usage": float(scheduler.kv_cache_manager.usage),
        }

    def close(self) -> None:
        """Stop, fail what is pending, free the model. Safe to call twice.

        The last engine of a process alone: vLLM ends the state that all engines of a process share.
        """
        self._loop.close()
        self._core.engine_core.shutdown()

    # --- on the engine's thread ----------------------------------------------------------------
    def _step(self) -> None:
        with _STEPPING:
            outputs = self._core.step()
        for output in outputs:
            if output.finished:
                request = self._requests.pop(output.request_id)
                result = request.finish(output, request)
                if result is not None and not request.future.done():
                    request.future.set_result(result)
            else:
                self._tell(self._requests[output.request_id], output)

    def _tell(self, request: _Request, output: Any) -> None:
        now = time.perf_counter()
        if request.on_text is not None and now - request.heard >= TEXT_EVERY:
            request.heard = now
            # A character whose bytes are not all there yet decodes to the replacement character.
            request.on_text(self.decoder.text(output.outputs[0].token_ids).rstrip("\ufffd"))

    def _fail_all(self, error: EngineError) -> None:
        failed, self._requests = self._requests, {}
        for future in {request.future for request in failed.values()}:
            if not future.done():
                future.set_exception(error)

    def _add(
        self,
        future: Future,
        prompt_ids: list[int],
        params: Any,
        finish: Callable[[Any, _Request], Any],
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        if not 0 < len(prompt_ids) < self.context:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens in a context of {self.context}")
        self._submitted += 1
        key = str(self._submitted)
        # Where the cache outlives its weights, a salt keeps later prompts from reading it.
        salt = {"cache_salt": str(self.version)} if self._keeps_cache else {}
        self._core.add_request(key, {"prompt_token_ids": prompt_ids, **salt}, params)
        self._requests[key] = _Request(future, finish, [[(self.version, 0)] for _ in range(params.n)], on_text)

    def _search(self, future: Future, prompt_ids: list[int], spec: ItemSpec) -> None:
        trie = load_trie(spec.trie)
        check_room(prompt_ids, trie.depth, self.context)
        VllmSearch(search(trie, spec), prompt_ids, future, self._add, lambda: self.version, self.decoder.text)

    def _add_scoring(self, future: Future, sequences: list[list[int]]) -> None:
        scores: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        left = {index for index, sequence in enumerate(sequences) if len(sequence) > 1}

        def finish(index: int, output: Any, request: _Request) -> list[np.ndarray] | None:
            scores[index] = _scores(output)
            left.discard(index)
            return None if left else scores

        for index in sorted(left):
            *prompt, last = sequences[index]
            self._add(future, prompt, _scoring_params(last), partial(finish, index))
        if not left:
            future.set_result(scores)

    def _drop(self, future: Future) -> int:
        dropped = [key for key, request in self._requests.items() if request.future is future]
        self._core.abort_request(dropped)
        for key in dropped:
            del self._requests[key]
        if dropped:
            future.set_exception(GenerationAborted(f"{self.name}: generation dropped on request"))
        return len(dropped)

    def _abort(self) -> int:
        aborted = len({request.future for request in self._requests.values()})
        self._core.abort_request(list(self._requests))
        self._fail_all(GenerationAborted(f"{self.name}: generation aborted on request"))
        return aborted

    def _update(self, version: Version, shapes: dict[str, tuple[int, ...]], update: dict[str, Any]) -> dict[str, Any]:
        """`update`: the fields of a `rporec.engine.host_transfer.HostUpdate`."""
        began = time.perf_counter()
        if self._expected:
            check_fit(shapes, self._expected)
        try:
            with _STEPPING:
                self._llm.start_weight_update()
                self._llm.update_weights({"update_info": update})
                self._llm.finish_weight_update()
            if not self._keeps_cache:
                # Without the reset of running requests their old keys and values stay, and every later
                # token is drawn from a distribution that neither weights define alone.
                self._core.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            raise EngineError(f"{self.name}: weights {version} were taken in half: {one_line(error)}") from error
        self.version = version
        if self._labelled:
            self._core.set_weight_version(str(version))
        self._note_switch(version)
        return {"seconds": time.perf_counter() - began, "in_flight": len(self._requests)}

    # --- completions ---------------------------------------------------------------------------
    def _sampling_params(self, spec: SamplingSpec, growing: bool = False) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        stop_ids, stop_strings = self.decoder.split_stops(spec.stop)
        cut = {"nucleus": spec.top_p} if self._has_nucleus and spec.top_p < 1 and not spec.greedy else None
        return SamplingParams(
            n=spec.n,
            temperature=spec.temperature,
            top_p=1.0 if cut else spec.top_p,
            extra_args=cut,
            max_tokens=spec.max_tokens,
            min_tokens=spec.min_tokens,
            seed=None if spec.greedy else spec.base_seed,  # vLLM gives completion i the seed + i
            stop_token_ids=stop_ids,
            stop=stop_strings or None,
            detokenize=bool(stop_strings),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=0 if spec.logprobs else None,
            flat_logprobs=True,
            output_kind=RequestOutputKind.CUMULATIVE if growing else RequestOutputKind.FINAL_ONLY,
        )

    def _completions(self, output: Any, request: _Request) -> list[Generated]:
        generated = []
        for one in output.outputs:
            ids = np.asarray(one.token_ids, np.int32)
            self._tokens += len(ids)
            labels = getattr(one, "weight_versions", None) if self._labelled else None
            if labels is not None:
                versions = tuple((Version.parse(span.version), span.start, span.end) for span in labels)
            else:
                versions = _spans(request.starts[one.index], len(ids))
            generated.append(
                Generated(
                    token_ids=ids,
                    logprobs=_first_logprobs(one.logprobs),
                    versions=versions,
                    finish_reason=one.finish_reason,
                    text=self.decoder.text(one.token_ids),
                )
            )
        return generated

    def _note_switch(self, version: Version) -> None:
        """Count the tokens that each running completion has, for a vLLM that does not label them."""
        if self._labelled:
            return
        for state in self._core.output_processor.request_states.values():
            request = self._requests.get(getattr(state, "external_req_id", state.request_id))
            if request is not None:
                request.starts[state.request_index].append((version, state.detokenizer.num_output_tokens()))


def _labels_tokens(core: Any) -> bool:
    """Whether this vLLM marks tokens with the version that sampled them."""
    from vllm.outputs import CompletionOutput

    return hasattr(core, "set_weight_version") and "weight_versions" in {f.name for f in fields(CompletionOutput)}


def _scoring_params(last: int) -> Any:
    """One token after all but the last of a sequence: prompt logprobs, and the last token's own.

    So a sequence that fills the whole context can be scored, which vLLM refuses as a prompt.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        logprobs=1,
        logprob_token_ids=[last],
        detokenize=False,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scores(output: Any) -> np.ndarray:
    prompt = _first_logprobs(output.prompt_logprobs)
    flat = output.outputs[0].logprobs
    # The greedy token comes first, the one asked for second (they may be the same).
    return np.append(prompt, np.float32(flat.logprobs[flat.start_indices[0] + 1]))


def _first_logprobs(flat: Any) -> np.ndarray:
    """The log-probability of the token itself at every position that has one, float32."""
    if flat is None:
        return np.empty(0, np.float32)
    values = np.asarray(flat.logprobs, np.float32)
    starts, ends = np.asarray(flat.start_indices, np.int64), np.asarray(flat.end_indices, np.int64)
    return values[starts[ends > starts]]


def _spans(starts: list[tuple[Version, int]], tokens: int) -> tuple[tuple[Version, int, int], ...]:
    ends = [start for _, start in starts[1:]] + [tokens]
    return tuple((version, start, end) for (version, start), end in zip(starts, ends, strict=True) if end > start)


def _as_torch(tensor: Any) -> Any:
    import torch

    return tensor if isinstance(tensor, torch.Tensor) else torch.as_tensor(tensor)
