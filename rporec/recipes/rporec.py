"""RPORec (arXiv 2605.21967): the LLM reasons, the RecHead ranks, the ranking rewards the LLM."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from rporec.engine.types import SamplingSpec
from rporec.recipes.base import BaseRecipe
from rporec.rl.judge import HeadJudge
from rporec.text.completion_store import Part
from rporec.text.prompt import ItemWriter, PromptWriter
from rporec.text.sft import Pair, warmup_pairs


class RPORec(BaseRecipe):
    """Free text in the RPORec format, sampled without truncation, rewarded by a frozen RecHead."""

    @property
    def heads(self) -> dict[str, str]:
        return {"head": "text", "head_history": "blank"}

    # --- how a prompt is written and completions are sampled ---------------------------------
    def vocabulary(self) -> tuple[list[str], list[str]]:
        from rporec.text.teacher import tokenizer_texts

        return tokenizer_texts(ItemWriter(self.dataset, self.config.text)), []

    @cached_property
    def writer(self) -> PromptWriter:  # type: ignore[override]
        from rporec.models.backbone import load_tokenizer

        config, tokenizer = self.config, load_tokenizer(self.model)
        return PromptWriter(self.dataset, config.text, tokenizer, config.tiny_backbone, self.context, config.reserve)

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
    def validation(self) -> tuple[np.ndarray, list[np.ndarray], list[SamplingSpec]]:
        return self.validated, self.prompts(self.validated), [self.greedy_spec()] * len(self.validated)

    # --- what the stages before and after RL need --------------------------------------------
    def pairs(self) -> list[Pair]:
        """The teacher's rationales."""
        from rporec.text.rationales import read_rationales

        return warmup_pairs(self.dataset, read_rationales(self.run.folder / "rationales"), self.writer)

    def parts(self, stage: str) -> list[Part]:
        """Test, greedily and sampled; of an LLM that heads are trained for, their slices and validation too."""
        completions, test = self.run.completions, self.evaluated("test")
        slices = {} if stage == "stage2" else {"head": self.slices.head}
        if self.config.head.refreshed and stage != "more_warmup":
            slices = {"head": self.slices.head, "rl": self.slices.rl}
        parts = [Part(completions(stage, name), samples, self.written_spec()) for name, samples in slices.items()]
        if slices:
            parts.append(Part(completions(stage, "valid"), self.evaluated("valid"), self.greedy_spec()))
        parts.append(Part(completions(stage, "test"), test, self.greedy_spec()))
        if n := self.config.eval_samples:
            parts.append(Part(completions(stage, "test_sampled"), test, self.sampled_spec(n)))
        return parts

    # --- how they are rewarded ---------------------------------------------------------------
    def judge(self) -> HeadJudge:
        return HeadJudge(self.run, self.config, self.dataset)
