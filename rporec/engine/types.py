"""What goes into an engine and what comes out: versions, sampling, completions, and the Protocol.

An engine is anything that generates. `rporec.engine.vllm` is the one that runs;
`rporec.engine.reference` is the exact one that tests compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np


class EngineError(RuntimeError):
    """An engine that cannot start or has died: who, what happened, the probable cause."""


class GenerationAborted(EngineError):
    """The generation was stopped on request; its tokens are gone and nothing is broken."""


@dataclass(frozen=True, order=True)
class Version:
    """Which weights: `number` counts publications, `attempt` counts roll-backs of the learner.

    Ordered by attempt first: after a roll-back the lower number of the new attempt is the newer.
    """

    attempt: int
    number: int

    def __str__(self) -> str:
        return f"{self.attempt}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> Version:
        attempt, number = text.split(".")
        return cls(int(attempt), int(number))


FIRST_VERSION = Version(0, 0)  # the weights of the model folder that a run starts from


@dataclass(frozen=True)
class SamplingSpec:
    """How the `n` completions of one prompt are sampled; `temperature` 0 is greedy.

    Completion i draws from `seed` and i alone. The text of a stop string is kept. Before `min_tokens`
    no token is drawn that would end the completion.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ("</answer>",)
    logprobs: bool = True
    min_tokens: int = 0

    def __post_init__(self) -> None:
        tokens = self.max_tokens >= 1 and 0 <= self.min_tokens <= self.max_tokens
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not tokens or self.n < 1:
            raise ValueError(f"no such sampling: {self}")
        if self.greedy and self.n > 1:
            raise ValueError("greedy decoding gives one completion; n > 1 needs a temperature")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def base_seed(self) -> int:
        """62 bits spread from `seed`; completion i samples from `base_seed + i`.

        Neighbouring seeds would share streams if i were added to `seed` itself.
        """
        return int(np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0] >> np.uint64(2))


@dataclass(frozen=True)
class ItemSpec:
    """How the `n` items that answer one prompt are found in a trie, see `rporec.engine.trie`.

    beams: distinct items, best first; nothing is drawn, so `seed` does not matter. sampled: `n` draws.
    Fewer than `n` come out of a trie that has no more.
    """

    trie: str  # a file of `trie.write_sequences`; each process reads it once
    n: int
    kind: Literal["beams", "sampled"] = "beams"
    seed: int = 0
    exclude: tuple[int, ...] = ()  # items that must not come out


Spec = SamplingSpec | ItemSpec


@dataclass(frozen=True, eq=False)
class Generated:
    """One completion. `token_ids` keeps the end-of-sequence token, `text` does not.

    `logprobs[t]` is the log-probability of `token_ids[t]` under the distribution it was drawn
    from: after temperature and top_p; greedy tokens are scored at temperature 1. Empty when the
    spec asked for none. `versions` are (version, start, end) spans that tile the tokens.
    """

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    versions: tuple[tuple[Version, int, int], ...]
    finish_reason: str  # stop | length
    text: str
    item: int | None = None  # that an `ItemSpec` found; None for free text


@runtime_checkable
class Engine(Protocol):
    version: Version

    def submit(self, prompt_ids: Sequence[int], spec: Spec) -> Future[list[Generated]]:
        """The `spec.n` completions of one prompt, free text or items; ValueError for a prompt that does not fit."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> Future[list[np.ndarray]]:
        """float32 [len - 1] per sequence: log p(token t | tokens before), t >= 1, temperature 1."""
        ...

    def update_weights(self, version: Version, tensors: Iterable[tuple[str, Any]]) -> Future[dict[str, Any]]:
        """Take new weights between two decode steps; ValueError, and no change, if they do not fit."""
        ...

    def abort(self) -> Future[int]:
        """Stop every generation; their futures raise GenerationAborted. Returns how many."""
        ...

    def pause(self) -> Future[None]:
        """Queue requests without starting them, until `resume`: what comes meanwhile starts together."""
        ...

    def resume(self) -> Future[None]: ...

    def stats(self) -> dict[str, Any]:
        """running, waiting (requests), tokens (of finished completions), tokens_per_second, kv_usage (share)."""
        ...

    def close(self) -> None: ...
