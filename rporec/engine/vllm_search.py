"""A search of a trie on vLLM: every question of a level is a request of one token, the prompt comes from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from rporec.engine.trie import Found, Question, Search
from rporec.engine.types import Generated, Version

ASKED_AT_ONCE = 128  # tokens of one request, vLLM's limit; of a wider node several requests ask


class VllmSearch:
    """Walks one search to its end on the engine's thread, and answers `future` with the items as completions.

    add: queues a request, `VllmEngine._add`. version: of the engine's weights now. A token is labelled
    with the oldest version that answered at its level.
    """

    def __init__(
        self,
        search: Search,
        prompt_ids: list[int],
        future: Future,
        add: Callable[..., None],
        version: Callable[[], Version],
        text: Callable[[Sequence[int]], str],
    ) -> None:
        self._search, self._prompt, self._future = search, prompt_ids, future
        self._add, self._version, self._text = add, version, text
        self._levels: list[Version] = []  # the version of each level
        try:
            self._ask(next(search))
        except StopIteration as nothing:
            future.set_result(self._completions(nothing.value))

    def _ask(self, questions: list[Question]) -> None:
        self._answers = [np.empty(len(question.tokens), np.float32) for question in questions]
        self._levels.append(self._version())
        self._left = 0
        for question, answer in zip(questions, self._answers, strict=True):
            ids = self._prompt + question.path.tolist()
            for start in range(0, len(answer), ASKED_AT_ONCE):
                part = slice(start, start + ASKED_AT_ONCE)
                self._left += 1
                self._add(self._future, ids, _asking(question.tokens[part]), partial(self._answered, answer[part]))

    def _answered(self, answer: np.ndarray, output: Any, request: Any) -> list[Generated] | None:
        flat = output.outputs[0].logprobs
        first = flat.start_indices[0] + 1  # the greedy token comes before those asked for
        answer[:] = flat.logprobs[first : first + len(answer)]
        self._levels[-1] = min(self._levels[-1], self._version())
        self._left -= 1
        if self._left:
            return None
        try:
            self._ask(self._search.send(self._answers))
        except StopIteration as ended:
            return self._completions(ended.value)
        return None

    def _completions(self, found: list[Found]) -> list[Generated]:
        return [
            Generated(one.token_ids, one.logprobs, spans(self._levels, len(one.token_ids)), "stop", text, one.item)
            for one in found
            for text in [self._text(one.token_ids.tolist())]
        ]


def spans(levels: list[Version], tokens: int) -> tuple[tuple[Version, int, int], ...]:
    """Equal neighbours of the first `tokens` versions as (version, start, end)."""
    cuts = [at for at in range(tokens) if at == 0 or levels[at] != levels[at - 1]]
    return tuple((levels[a], a, b) for a, b in zip(cuts, [*cuts[1:], tokens], strict=True))


def _asking(tokens: np.ndarray) -> Any:
    """At temperature 1, which is what a greedy request's log-probabilities are at."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprob_token_ids=tokens.tolist(),
        detokenize=False,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
