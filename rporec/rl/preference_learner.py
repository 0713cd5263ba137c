"""The learner of offline preferences: one chosen item and its negatives a prompt, one optimiser step a batch.

It shares DeepSpeed, packing and log-probabilities with the learner of RL. There is nothing to sample,
so there is no ledger, no version and no correction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rporec.config import Config
from rporec.models.policy import Packed, token_logprobs
from rporec.models.trainable import all_sum
from rporec.rl.packing import GroupTokens, by_length
from rporec.rl.policies import Layout, frozen_reference, start_policy
from rporec.rl.preference import boundary, confidence_margin, dynamic_po, napo, s_dpo, shared_negatives

# Sample numbers [P] -> (vectors of their users [P, E], scores of all items [P, N]) by another recommender.
Auxiliary = Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Preferences:
    """One prompt: the item that its user chose, and items that the user never had."""

    sample: int
    tokens: GroupTokens  # completions: the chosen item first
    items: np.ndarray  # int64 [1 + D], likewise
    taken: frozenset[int]  # the user's history and the chosen item


@dataclass(frozen=True)
class Judged:
    """A micro-batch with log-probabilities of whole completions, [P] or [M]."""

    groups: list[Preferences]
    owner: torch.Tensor  # int64 [M], prompt of each negative
    chosen: torch.Tensor  # ratios
    rejected: torch.Tensor
    policy_chosen: torch.Tensor  # log-probabilities of the policy alone
    policy_rejected: torch.Tensor


class PreferenceLearner:
    """The policy in training and its frozen reference, the LLM before."""

    def __init__(
        self, model: Path | str, config: Config, *, world: int = 1, auxiliary: Auxiliary | None = None
    ) -> None:
        """auxiliary: needed by NAPO."""
        self.config, self.auxiliary = config, auxiliary
        self.policy = start_policy(model, config, world)
        self.reference = frozen_reference(model, self.policy)
        self.lay_out = Layout(self.policy)

    def step(self, groups: list[Preferences]) -> dict[str, Any]:
        """One optimiser step on this rank's groups; returns what steps.jsonl says of it. All ranks call together."""
        prompts = all_sum(torch.tensor([len(groups)])).item()
        parts = by_length([group.tokens for group in groups], self.config.rl.micro_batch_groups)
        sums = torch.zeros(4, dtype=torch.float64)
        for number in range(self.policy.accumulation):
            empty = number >= len(parts)
            chosen = [groups[row] for row in parts[-1 if empty else number]]
            judged = self._judge(chosen)
            losses, used = self._losses(judged)
            # A rank with fewer micro-batches joins the others with a part that weighs nothing.
            self.policy.backward(losses.sum() * (0.0 if empty else 1.0 / prompts))
            if not empty:
                sums += torch.tensor([float(losses.detach().sum()), *_habits(judged), used], dtype=torch.float64)
        loss, correct, margin, negatives = (all_sum(sums) / prompts).tolist()
        tokens = sum(len(completion) for group in groups for completion in group.tokens.completions)
        return {
            "loss": loss,
            "accuracy": correct,
            "margin": margin,
            "negatives": negatives,
            "tokens": all_sum(torch.tensor([tokens])).item(),
            "grad_norm": self.policy.grad_norm,
            "lr": self.policy.lr,
        }

    def _judge(self, groups: list[Preferences]) -> Judged:
        packed = self.lay_out([group.tokens for group in groups]).to(self.policy.device)
        logprobs, _ = token_logprobs(self.policy.engine, packed)
        with torch.no_grad():
            reference, _ = token_logprobs(self.reference, packed)
        policy = _completion_sums(logprobs, packed)
        ratio = policy - _completion_sums(reference, packed)
        first = torch.zeros(packed.completions, dtype=torch.bool, device=ratio.device)
        sizes = torch.tensor([len(group.items) for group in groups])
        first[sizes.cumsum(0) - sizes] = True
        return Judged(groups, packed.group[~first], ratio[first], ratio[~first], policy[first], policy[~first])

    def _losses(self, judged: Judged) -> tuple[torch.Tensor, int]:
        """(loss of each prompt [P], negatives that took part)."""
        settings, owner = self.config.preference, judged.owner
        if settings.loss == "s_dpo":
            return s_dpo(judged.chosen, judged.rejected, owner, settings.beta), len(owner)
        if settings.loss == "dynamicpo":
            policies = {"policy_chosen": judged.policy_chosen, "policy_rejected": judged.policy_rejected}
            near = boundary(judged.policy_chosen.detach(), judged.policy_rejected.detach(), owner)
            return dynamic_po(judged.chosen, judged.rejected, owner, settings.beta, **policies), int(near.sum())
        assert self.auxiliary is not None
        users, scores = (torch.from_numpy(part) for part in self.auxiliary([group.sample for group in judged.groups]))
        items = torch.from_numpy(np.concatenate([group.items[1:] for group in judged.groups]))
        targets = torch.tensor([int(group.items[0]) for group in judged.groups])
        taken = [set(group.taken) for group in judged.groups]
        prompt, negative = shared_negatives(owner.cpu(), items, users, taken, settings.similarity)
        margins = confidence_margin(scores[prompt, targets[prompt]], scores[prompt, items[negative]], settings.margin)
        device = owner.device
        pairs = (prompt.to(device), negative.to(device))
        return napo(judged.chosen, judged.rejected, pairs, margins.to(device), settings.beta), len(prompt)


def _completion_sums(logprobs: torch.Tensor, packed: Packed) -> torch.Tensor:
    return logprobs.new_zeros(packed.completions).index_add_(0, packed.owner, logprobs)


def _habits(judged: Judged) -> tuple[float, float]:
    """(prompts whose chosen item gained more than every negative, sum of what it gained more than their mean in nats)."""
    chosen, rejected, owner = judged.chosen.detach(), judged.rejected.detach(), judged.owner
    best = torch.full_like(chosen, -torch.inf).scatter_reduce(0, owner, rejected, "amax")
    count = torch.bincount(owner, minlength=len(chosen)).clamp(min=1)
    mean = torch.zeros_like(chosen).index_add_(0, owner, rejected) / count
    return float((chosen > best).sum()), float((chosen - mean).sum())
