"""What two trainers are given alike: a model, prompts, how long each completion is, a reward.

Nothing is trained beforehand, since that does not change what a step costs. A random model would end where it
likes, so lengths are dealt: every completion of the `number`-th group has `length(number)` tokens, and none ends
before. Prompts are words that are one token each, so text and token ids say the same to both trainers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from rporec.config import Config, Section, TinyConfig, parse_config
from rporec.engine.types import SamplingSpec
from rporec.recipes.rporec import RPORec
from rporec.run import Run

SMALL = TinyConfig(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384, vocabulary=1000)
LARGE = TinyConfig(hidden=320, layers=7, heads=10, kv_heads=5, intermediate=1088, vocabulary=1000)
WORLD = {"users": 600, "series": 24, "volumes": 4, "genres": 4, "studios": 6, "length": 10}


class Workload(Section):
    """One GRPO training; a step takes `groups` prompts of `prompt` tokens and writes `size` completions of each."""

    name: str
    shape: TinyConfig
    prompt: int
    lengths: tuple[int, int]  # shortest and longest completion; long-tailed between
    groups: int
    size: int
    kl: float = 0.0
    thoughts: bool = False  # summaries and embeddings in the reward: the authors' whole stage 2
    context: int = 512  # tokens of the model's window

    @classmethod
    def read(cls, path: Path) -> Workload:
        return cls.model_validate_json(path.read_text())

    @property
    def completions(self) -> int:
        """Of one step."""
        return self.groups * self.size

    @property
    def micro(self) -> int:
        """Groups that the learner reads at once."""
        return min(16, self.groups)

    def length(self, number: int) -> int:
        """Tokens of each completion of a prompt: log-normal beyond the shortest, median a quarter of the way up."""
        low, high = self.lengths
        beyond = np.random.default_rng([1, number]).lognormal(np.log(max(1, high - low) / 4), 0.8)
        return min(high, low + int(beyond))

    def config(self, folder: Path) -> Config:
        """Of the run in `folder`. A backbone that is a folder has all reward terms, `tiny` only those of the head."""
        model = str(folder / "backbone")
        return parse_config(
            {
                "name": self.name,
                "device": "cpu",
                "data": {"window": 8, "synthetic": WORLD},
                "backbone": model if self.thoughts else "tiny",
                "tiny": self.shape.model_copy(update={"context": self.context}).model_dump(),
                "reward": {"embedder": model} if self.thoughts else {},
                "sampling": {"max_tokens": self.lengths[1]},
                "head": {"dim": 32},
                "engine": {"max_num_seqs": 256, "kv_cache_mb": 256, "in_flight": "keep"},
                "group_size": self.size,
                "groups_per_step": self.groups,
                "max_staleness": 2,  # so that a step need not wait for the longest completion of the one before
                "steps": 1_000_000,  # until it is ended
                "checkpoint_every": 1_000_000,
                "rl": {
                    "kl": self.kl,
                    "lr": 1e-6,
                    "micro_batch_groups": self.micro,
                    "validate_every": 1_000_000,
                    "validate_samples": 1,
                },
            }
        )


class Dealt(RPORec):
    """RPORec with the workload's prompts and lengths; data, head and reward are the run's.

    `first`: the prompt that the first group gets. Lengths do not shift with it.
    """

    def __init__(self, run: Run, config: Config, workload: Workload, first: int = 0) -> None:
        super().__init__(run, config)
        self.workload, self.first = workload, first

    @property
    def passes(self) -> int:
        """Groups after which the prompts, and their lengths, come again."""
        return len(self.slices.rl)

    def draw(self, number: int) -> tuple[int, int]:
        return int(self.slices.rl[(self.first + number) % self.passes]), number

    def prompts(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        return [np.random.default_rng([2, int(one)]).choice(self._words, self.workload.prompt) for one in samples]

    def length(self, seed: int) -> int:
        return self.workload.length(seed % self.passes)

    def rollout_spec(self, seed: int) -> SamplingSpec:
        tokens = self.length(seed)
        return SamplingSpec(max_tokens=tokens, min_tokens=tokens, n=self.workload.size, seed=seed)

    @cached_property
    def probes(self) -> list[np.ndarray]:
        """RPORec's own: the learner has them from the config."""
        return RPORec(self.run, self.config).probes

    @cached_property
    def _words(self) -> np.ndarray:
        """int32: tokens that are a blank and a word, and that any text of such is cut into."""
        from rporec.models.backbone import load_tokenizer

        tokenizer = load_tokenizer(self.model)
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        whole = [token for token, text in enumerate(pieces) if text[:1] == " " and text[1:].isalpha()]
        alone = [token for token in whole if tokenizer.encode(pieces[token], add_special_tokens=False) == [token]]
        return np.array(alone, np.int32)


def prepare(folder: Path, workload: Workload) -> Run:
    """A run directory as far as stage 2 reads it: data set, model, RecHead, none of them trained."""
    from benchmarks.reward import untrained_run

    run = untrained_run(folder, workload.config(folder))
    with run.stage("data"), run.stage("warmup"), run.stage("stage1"):
        pass
    return run


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        prepare(folder / "run", Workload.read(folder / "workload.json"))
