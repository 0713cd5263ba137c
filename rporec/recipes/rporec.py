"""RPORec (arXiv 2605.21967): the LLM reasons, the RecHead ranks, the ranking rewards the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

from rporec.config import Config
from rporec.data import Dataset
from rporec.data.slices import TrainSlices, train_slices
from rporec.engine.types import SamplingSpec
from rporec.rl.judge import HeadJudge
from rporec.run import Run
from rporec.text.prompt import PromptWriter

# Streams of randomness that must not meet: each is (config.seed, stream, …).
_ORDER, _GROUP, _VALIDATION = 1, 2, 3
_PROBES, _PROBE_TOKENS = 4, 128  # enough to see wrong weights, little enough to score at every publication


class RPORec:
    """Free text in the RPORec format, sampled without truncation, rewarded by a frozen RecHead."""

    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config
        self.dataset = Dataset.load(run.data)
        self.model = str(run.warm_model)

    # --- which samples -----------------------------------------------------------------------
    @cached_property
    def slices(self) -> TrainSlices:
        return train_slices(self.dataset.split("train"), self.config)

    def evaluated(self, split: str) -> np.ndarray:
        """Samples of `valid` or `test`, the newest `max_eval_samples` of them."""
        samples = self.dataset.split(split)  # type: ignore[arg-type]
        limit = self.config.max_eval_samples
        return samples if limit is None else samples[max(0, len(samples) - limit) :]

    def draw(self, number: int) -> tuple[int, int]:
        epoch, position = divmod(number, len(self.slices.rl))
        seed = np.random.default_rng([self.config.seed, _GROUP, number]).integers(2**31)
        return int(self._epoch(epoch)[position]), int(seed)

    @lru_cache(maxsize=2)  # noqa: B019 - a recipe lives as long as its process
    def _epoch(self, epoch: int) -> np.ndarray:
        """The RL slice in the order of one pass."""
        return np.random.default_rng([self.config.seed, _ORDER, epoch]).permutation(self.slices.rl)

    # --- how a prompt is written and completions are sampled ---------------------------------
    @cached_property
    def context(self) -> int:
        """Tokens of prompt and completion together."""
        if self.config.tiny_backbone:
            return self.config.tiny.context
        from transformers import AutoConfig

        longest = getattr(AutoConfig.from_pretrained(self.model).get_text_config(), "max_position_embeddings", 4096)
        return min(int(self.config.engine.args.get("max_model_len", 4096)), longest)

    @cached_property
    def writer(self) -> PromptWriter:
        from rporec.models.backbone import load_tokenizer

        reserve = max(self.config.sampling.max_tokens, self.config.rl_max_tokens)
        tokenizer = load_tokenizer(self.model)
        return PromptWriter(self.dataset, self.config.text, tokenizer, self.config.tiny_backbone, self.context, reserve)

    def prompts(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self.writer.prompts(samples)]

    def rollout_spec(self, seed: int) -> SamplingSpec:
        """The full distribution at the RL temperature: truncation would not be the policy's own."""
        rl = self.config.rl
        return SamplingSpec(
            temperature=rl.temperature,
            top_p=1.0,
            max_tokens=self.config.rl_max_tokens,
            n=self.config.group_size,
            seed=seed,
        )

    def greedy_spec(self) -> SamplingSpec:
        return SamplingSpec(temperature=0.0, top_p=1.0, max_tokens=self.config.sampling.max_tokens, n=1, seed=0)

    def written_spec(self) -> SamplingSpec:
        """One completion a sample as the config says: for the head slice, and of a backbone that teaches."""
        sampling = self.config.sampling
        return SamplingSpec(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            n=1,
            seed=self.config.seed + 1,
        )

    def sampled_spec(self, n: int) -> SamplingSpec:
        """The policy's own distribution: n completions for the `_sampled` rows."""
        return SamplingSpec(
            temperature=1.0, top_p=1.0, max_tokens=self.config.sampling.max_tokens, n=n, seed=self.config.seed + 1
        )

    @cached_property
    def validation(self) -> tuple[np.ndarray, list[np.ndarray], SamplingSpec]:
        samples = self.evaluated("valid")
        size = min(len(samples), self.config.rl.validate_samples)
        chosen = np.random.default_rng([self.config.seed, _VALIDATION]).choice(samples, size, replace=False)
        chosen.sort()
        return chosen, self.prompts(chosen), self.greedy_spec()

    @cached_property
    def probes(self) -> list[np.ndarray]:
        _, prompts, _ = self.validation
        return [prompt[:_PROBE_TOKENS] for prompt in prompts[:_PROBES]]

    # --- how they are rewarded ---------------------------------------------------------------
    def judge(self) -> HeadJudge:
        return HeadJudge(self.run, self.config, self.dataset)
