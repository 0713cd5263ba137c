"""The judge of RPORec: a frozen RecHead, and the frozen models that the other reward terms need."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rporec.config import Config, RewardConfig
from rporec.data import Dataset
from rporec.data.slices import rows_of, train_slices
from rporec.evaluation.ranking import hit, ndcg, ranks
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.rl import rewards
from rporec.rl.rollout_schema import GroupMeta, completions, group_meta, split_groups, with_rewards
from rporec.run import Run
from rporec.text.completion import Completion, parse
from rporec.text.prompt import ItemWriter
from rporec.text.teacher import statements

if TYPE_CHECKING:
    from rporec.rl.frozen import Summarizer


def score_completions(
    head: RecHead,
    dataset: Dataset,
    config: Config,
    samples: np.ndarray,
    written: Sequence[Completion],
    *,
    summaries: Sequence[str | None] | None = None,
    embed: rewards.Embed | None = None,
    custom: rewards.Custom | None = None,
) -> rewards.Scored:
    """Rewards, but for the entropy term, of one completion for each sample; one pass of the head.

    What RL and the environments pay. summaries, embed, custom: as `rewards.score` takes them.
    """
    samples = np.asarray(samples, np.int64)
    targets = dataset.targets(samples)
    reward = config.reward
    candidates = None
    if reward.candidates == "sampled":
        candidates = rewards.sampled_candidates(
            targets, samples, len(dataset.catalog), negatives=reward.negatives, seed=config.seed
        )
    return rewards.score(
        head.scores(HeadInputs.of(dataset, samples, [one.text for one in written])).numpy(),
        targets,
        dataset.seen_of(samples) if reward.mask_history else None,
        written,
        rewards.weights_for(reward, tiny=config.tiny_backbone),
        summaries=summaries,
        embed=embed,
        candidates=candidates,
        custom=custom,
    )


class HeadJudge:
    """Scores completions by where the RecHead ranks the target; one object for reward and validation."""

    def __init__(self, run: Run, config: Config, dataset: Dataset) -> None:
        self.run, self.config, self.dataset = run, config, dataset
        self.head = RecHead.load(run.head(), dataset.catalog).freeze()
        self.reward_head = self._before_rl()
        self.items = ItemWriter(dataset, config.text)
        self.custom = rewards.load_custom(config.reward.custom) if config.reward.custom else None

    def load(self) -> None:
        """The summariser and the embedder, where the reward has terms that need them."""
        _ = self._summarizer, self._embed

    def score(self, batches: list[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], list[GroupMeta]]:
        """Fill the reward columns of unscored groups; all of them in one pass of the head."""
        batch = pa.concat_batches(batches)
        scored = self.score_completions(self.reward_head, batch.column("sample").to_numpy(), completions(batch))
        groups = split_groups(with_rewards(batch, scored))
        return groups, [group_meta(group, self.habits(group)) for group in groups]

    def score_completions(self, head: RecHead, samples: np.ndarray, written: Sequence[Completion]) -> rewards.Scored:
        """`score_completions` by one of this judge's heads, with the run's summaries, embedder and own reward."""
        return score_completions(
            head,
            self.dataset,
            self.config,
            samples,
            written,
            summaries=self._summaries([one.cot for one in written]),
            embed=self._embed,
            custom=self.custom,
        )

    def validate(self, samples: np.ndarray, written: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
        """NDCG and hit rate at 10 of the first completion for each sample, in the headline's convention."""
        texts = [row[0]["text"] for row in written]
        scores = self.head.scores(HeadInputs.of(self.dataset, samples, texts)).numpy()
        exclude = self.dataset.excluded_of(samples, self.config.data.headline)
        places = ranks(scores, self.dataset.targets(samples), exclude)
        habits = self._habits(samples, texts)
        return {"ndcg@10": float(ndcg(places, 10).mean()), "hr@10": float(hit(places, 10).mean()), **habits}

    # --- how the policy collects its reward --------------------------------------------------
    def habits(self, group: pa.RecordBatch) -> dict[str, float]:
        """Seen answers, truth of statements and the like for one group."""
        return self._habits(group.column("sample").to_numpy(), group.column("text").to_pylist())

    def _habits(self, samples: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
        written = [parse(text) for text in texts]
        habits = rewards.gaming([one.answer for one in written], self.dataset.seen_of(samples), self.items.short)
        histories = [self.dataset.history(int(sample)) for sample in samples]
        counts = [statements(one.cot, history, self.items) for one, history in zip(written, histories, strict=True)]
        if checkable := sum(count for _, count in counts):
            habits["statement_truth"] = sum(true for true, _ in counts) / checkable
        return habits

    def _before_rl(self) -> RecHead:
        """The same head with experts that were counted before the RL slice.

        Rules and popularity that were counted over its targets would rank them high whatever the LLM
        writes, and leave it little to gain. A reranker stays: it knows no item, only how far to trust whom.
        """
        if self.head.experts is None:
            return self.head
        head = copy.copy(self.head)
        slices = train_slices(self.dataset.split("train"), self.config)
        head.experts = self.head.experts.refitted(self.dataset, rows_of(self.dataset, slices.before_rl))
        return head

    # --- what the terms need -----------------------------------------------------------------
    @cached_property
    def _weights(self) -> RewardConfig:
        return rewards.weights_for(self.config.reward, tiny=self.config.tiny_backbone)

    @cached_property
    def _embed(self) -> rewards.Embed | None:
        if not self._weights.faithfulness or self.config.reward.embedder is None:
            return None
        from rporec.rl.frozen import TextEmbedder

        return TextEmbedder(self.config.reward.embedder)

    @cached_property
    def _summarizer(self) -> Summarizer | None:
        if not (self._weights.conciseness or self._weights.faithfulness):
            return None
        from rporec.rl.frozen import Summarizer

        return Summarizer(self.run.warm_model)

    def _summaries(self, thoughts: list[str]) -> list[str | None] | None:
        return None if self._summarizer is None else self._summarizer(thoughts)
