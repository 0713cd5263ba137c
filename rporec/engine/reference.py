"""The exact engine: transformers, one batch at a time, nothing clever.

Tests compare vLLM with it, and small runs can use it where vLLM is not installed. Weights change
between batches only, so every completion has one version.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rporec.config import EngineConfig
from rporec.engine.decoder import Decoder
from rporec.engine.step_loop import StepLoop
from rporec.engine.trie import Found, Question, check_room, load_trie, search
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
from rporec.engine.weights import check_fit

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class _Row:
    """One completion that is being written."""

    prompt: list[int]
    spec: SamplingSpec
    limit: int  # tokens
    stop_ids: frozenset[int]
    stop_strings: list[str]
    generator: torch.Generator
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str = ""


@dataclass(frozen=True, eq=False)
class _Prompt:
    ids: list[int]
    spec: Spec
    future: Future


class ReferenceEngine:
    """An `Engine` on `transformers`; raises what `VllmEngine` raises.

    Every completion draws from a generator of its own, seeded as vLLM's are, one uniform number a
    token by inverting the cumulative distribution. So what else is in a batch changes a sample only
    if it moves a draw across a boundary (padding changes probabilities by about 1e-7). The samples
    themselves are not vLLM's, which draws differently.
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
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = ("float32" if device == "cpu" else "bfloat16") if config.dtype == "auto" else config.dtype
        self.version, self.name, self.context = version, name, context
        self.decoder = Decoder(model_dir)
        self._model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=getattr(torch, dtype))
        self._model.to(device).eval()
        self._batch = config.max_num_seqs
        self._waiting: list[_Prompt] = []
        self._running = self._tokens = 0
        self._loop = StepLoop(name, step=self._step, working=lambda: bool(self._waiting), ended=self._fail_all)

    # --- what callers use ----------------------------------------------------------------------
    def submit(self, prompt_ids: Sequence[int], spec: Spec) -> Future[list[Generated]]:
        ids = [int(token) for token in prompt_ids]
        return self._loop.command(lambda future: self._add(_Prompt(ids, spec, future)))

    def score(self, sequences: Sequence[Sequence[int]]) -> Future[list[np.ndarray]]:
        return self._loop.call(lambda: [self._score(sequence) for sequence in sequences])

    def update_weights(self, version: Version, tensors: Iterable[tuple[str, Any]]) -> Future[dict[str, Any]]:
        pairs = list(tensors)
        return self._loop.call(lambda: self._update(version, pairs))

    def abort(self) -> Future[int]:
        """Comes after the batch that is being written, and stops those behind it."""
        return self._loop.call(self._abort)

    def pause(self) -> Future[None]:
        return self._loop.pause()

    def resume(self) -> Future[None]:
        return self._loop.resume()

    def stats(self) -> dict[str, Any]:
        return {
            "running": self._running,
            "waiting": len(self._waiting),
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / max(self._loop.busy_seconds, 1e-9),
            "kv_usage": 0.0,
        }

    def close(self) -> None:
        self._loop.close()

    # --- on the engine's thread ----------------------------------------------------------------
    def _add(self, prompt: _Prompt) -> None:
        if not 0 < len(prompt.ids) < self.context:
            raise ValueError(f"a prompt of {len(prompt.ids)} tokens in a context of {self.context}")
        if isinstance(prompt.spec, ItemSpec):
            check_room(prompt.ids, load_trie(prompt.spec.trie).depth, self.context)
        self._waiting.append(prompt)

    def _step(self) -> None:
        """Write everything that waits, to its end."""
        prompts = list(self._waiting)
        texts = [prompt for prompt in prompts if isinstance(prompt.spec, SamplingSpec)]
        rows = [self._row(prompt, index) for prompt in texts for index in range(prompt.spec.n)]
        for start in range(0, len(rows), self._batch):
            self._generate(rows[start : start + self._batch])
        found = [self._found(prompt) for prompt in prompts if isinstance(prompt.spec, ItemSpec)]
        self._waiting.clear()  # only now: until here they are `_fail_all`'s if something breaks
        done, items = iter(rows), iter(found)
        for prompt in prompts:
            if isinstance(prompt.spec, ItemSpec):
                prompt.future.set_result(next(items))
            else:
                prompt.future.set_result([self._generated(next(done)) for _ in range(prompt.spec.n)])

    def _fail_all(self, error: EngineError) -> None:
        for prompt in self._waiting:
            prompt.future.set_exception(error)
        self._waiting.clear()

    def _abort(self) -> int:
        aborted = len(self._waiting)
        self._fail_all(GenerationAborted(f"{self.name}: generation aborted on request"))
        return aborted

    def _found(self, prompt: _Prompt) -> list[Generated]:
        """The items of a search; each question costs a pass over the prompt."""
        assert isinstance(prompt.spec, ItemSpec)
        walk = search(load_trie(prompt.spec.trie), prompt.spec)
        try:
            questions = next(walk)
            while True:
                questions = walk.send([self._answer(prompt.ids, question) for question in questions])
        except StopIteration as ended:
            found: list[Found] = ended.value
        self._tokens += sum(len(one.token_ids) for one in found)
        return [
            Generated(
                token_ids=one.token_ids,
                logprobs=one.logprobs,
                versions=((self.version, 0, len(one.token_ids)),),
                finish_reason="stop",
                text=self.decoder.text(one.token_ids.tolist()),
                item=one.item,
            )
            for one in found
        ]

    def _answer(self, prompt_ids: list[int], question: Question) -> np.ndarray:
        import torch

        ids = torch.tensor([prompt_ids + question.path.tolist()], device=self._model.device)
        with torch.no_grad():
            logprobs = self._model(input_ids=ids).logits[0, -1].float().log_softmax(-1).cpu().numpy()
        return logprobs[question.tokens]

    def _row(self, prompt: _Prompt, index: int) -> _Row:
        import torch

        assert isinstance(prompt.spec, SamplingSpec)
        stop_ids, stop_strings = self.decoder.split_stops(prompt.spec.stop)
        generator = torch.Generator().manual_seed(prompt.spec.base_seed + index)
        limit = min(prompt.spec.max_tokens, self.context - len(prompt.ids))
        return _Row(prompt.ids, prompt.spec, limit, frozenset(stop_ids), stop_strings, generator, [], [])

    def _generate(self, rows: list[_Row]) -> None:
        """Write `rows` to their ends as one left-padded batch; finished rows step along unread."""
        import torch

        self._running = len(rows)
        device = self._model.device
        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows], device=device)
        cache: Any = None
        with torch.no_grad():
            while not all(row.finish_reason for row in rows):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = self._model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                logits = output.logits[:, -1].float().cpu()
                tokens = [0 if row.finish_reason else self._extend(row, logits[i]) for i, row in enumerate(rows)]
                ids = torch.tensor(tokens, device=device)[:, None]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        self._running = 0

    def _extend(self, row: _Row, logits: torch.Tensor) -> int:
        import torch

        if len(row.tokens) < row.spec.min_tokens:
            logits[list(row.stop_ids)] = -torch.inf
        token, logprob = _draw(logits, row.spec, row.generator)
        row.tokens.append(token)
        row.logprobs.append(logprob)
        self._tokens += 1
        if token in row.stop_ids or (row.stop_strings and self._stopped(row)):
            row.finish_reason = "stop"
        elif len(row.tokens) == row.limit:
            row.finish_reason = "length"
        return token

    def _stopped(self, row: _Row) -> bool:
        text = self.decoder.text(row.tokens)
        return any(stop in text for stop in row.stop_strings)

    def _generated(self, row: _Row) -> Generated:
        return Generated(
            token_ids=np.asarray(row.tokens, np.int32),
            logprobs=np.asarray(row.logprobs if row.spec.logprobs else [], np.float32),
            versions=((self.version, 0, len(row.tokens)),),
            finish_reason=row.finish_reason,
            text=self.decoder.text(row.tokens),
        )

    def _score(self, sequence: Sequence[int]) -> np.ndarray:
        import torch

        if len(sequence) < 2:
            return np.empty(0, np.float32)
        ids = torch.tensor([[int(token) for token in sequence]], device=self._model.device)
        with torch.no_grad():
            logprobs = self._model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy()

    def _update(self, version: Version, tensors: list[tuple[str, Any]]) -> dict[str, Any]:
        import torch

        began = time.perf_counter()
        parameters = dict(self._model.named_parameters())
        check_fit(
            {name: tuple(tensor.shape) for name, tensor in tensors},
            {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        )
        with torch.no_grad():
            for name, tensor in tensors:
                if name in parameters:
                    parameters[name].copy_(torch.as_tensor(tensor))
        self.version = version
        return {"seconds": time.perf_counter() - began, "in_flight": 0}


def _draw(logits: torch.Tensor, spec: SamplingSpec, generator: torch.Generator) -> tuple[int, float]:
    """(token, its log-probability under the distribution drawn from); `logits` float32 [V]."""
    import torch

    if spec.greedy:
        token = int(logits.argmax())
        return token, float(logits.log_softmax(-1)[token])
    logprobs = (logits.double() / spec.temperature).log_softmax(-1)
    if spec.top_p < 1:
        ordered, order = logprobs.sort(descending=True)
        before = ordered.exp().cumsum(0) - ordered.exp()
        logprobs[order[before >= spec.top_p]] = -torch.inf
        logprobs = logprobs.log_softmax(-1)
    cumulative = logprobs.exp().cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(cumulative) - 1))
    return token, float(logprobs[token])
