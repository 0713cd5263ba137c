"""What recipes share: the run's data and its slices, in which order prompts are drawn, the fixed samples of validation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

from rporec.config import Config
from rporec.data import Dataset
from rporec.data.slices import TrainSlices, train_slices
from rporec.run import Run
from rporec.text.prompt import PromptWriter

# Streams of randomness that must not meet: each is (config.seed, stream, …).
_ORDER, _GROUP, _VALIDATION = 1, 2, 3
_PROBES, _PROBE_TOKENS = 4, 128  # enough to see wrong weights, little enough to score at every publication


class BaseRecipe:
    """Subclasses write prompts (`writer`) and say what a tiny tokenizer has to know (`vocabulary`)."""

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

    @cached_property
    def validated(self) -> np.ndarray:
        """The validation samples that versions are compared on while training, sorted."""
        samples = self.evaluated("valid")
        size = min(len(samples), self.config.rl.validate_samples)
        chosen = np.random.default_rng([self.config.seed, _VALIDATION]).choice(samples, size, replace=False)
        return np.sort(chosen)

    # --- how a prompt is written -------------------------------------------------------------
    @cached_property
    def context(self) -> int:
        """Tokens of prompt and completion together."""
        if self.config.tiny_backbone:
            return self.config.tiny.context
        from transformers import AutoConfig

        longest = getattr(AutoConfig.from_pretrained(self.model).get_text_config(), "max_position_embeddings", 4096)
        return min(int(self.config.engine.args.get("max_model_len", 4096)), longest)

    @property
    def writer(self) -> PromptWriter:
        raise NotImplementedError

    def prompts(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self.writer.prompts(samples)]

    @cached_property
    def probes(self) -> list[np.ndarray]:
        return [prompt[:_PROBE_TOKENS] for prompt in self.prompts(self.validated[:_PROBES])]

    # --- the LLM before everything -----------------------------------------------------------
    def vocabulary(self) -> tuple[list[str], list[str]]:
        """(texts to fit a tiny tokenizer on, tokens that the LLM must have whole)."""
        raise NotImplementedError

    def make_backbone(self) -> None:
        from rporec.models.backbone import bring_backbone, make_tiny

        config, out = self.config, self.run.backbone
        texts, tokens = self.vocabulary()
        if config.tiny_backbone:
            make_tiny(texts, config.tiny, config.seed, out, tokens)
        else:
            bring_backbone(config.backbone, out, tokens, config.seed)
