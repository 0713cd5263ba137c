"""The learner: scored groups in, one optimiser step out.

It finishes the sum: its proximal forward, run anyway, gives log-probabilities and full-vocabulary
entropies, with which it completes the reward (the entropy term), the advantages, the token mask and
the loss, by the pure functions of `rporec.rl`. It never drops a group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rporec.config import Config
from rporec.engine.types import Version
from rporec.models.policy import Packed, token_logprobs
from rporec.models.trainable import all_concatenate, all_sum
from rporec.rl import losses, rewards
from rporec.rl.advantages import group_advantages
from rporec.rl.packing import GroupTokens, by_length, plain
from rporec.rl.policies import Layout, frozen_reference, start_policy
from rporec.rl.rollout_schema import REWARD_PARTS, completions, ragged, token_versions

PARTS = ("wait", "forward", "backward", "publish", "reward", "other")


class Clock:
    """Wall seconds of one step by part; what no lap claims is `other`, so the parts add up."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.parts = dict.fromkeys(PARTS, 0.0)

    def lap(self, part: str) -> None:
        """Give the time since the last lap to `part`."""
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        self.lap("other")
        rounded = {part: round(seconds, 4) for part, seconds in self.parts.items()}
        return rounded | {"total": round(sum(rounded.values()), 4)}


@dataclass
class MicroBatch:
    """Some groups of a step as the model reads them, and what is known of their T tokens and R completions."""

    packed: Packed
    behaviour: torch.Tensor  # [T] log-probabilities under the sampler
    current: torch.Tensor  # bool [T]: sampled by the version that the learner now has
    in_cot: torch.Tensor  # bool [T]
    reward: torch.Tensor  # [R] without the entropy term; NaN where scoring failed
    format: torch.Tensor  # [R]
    # Of the proximal forward:
    proximal: torch.Tensor | None = None  # [T]
    entropy: torch.Tensor | None = None  # [T] nats
    reference: torch.Tensor | None = None  # [T], with a KL term only

    @property
    def valid(self) -> torch.Tensor:
        """bool [R]"""
        return ~self.reward.isnan()

    @property
    def mask(self) -> torch.Tensor:
        """bool [T]: tokens of completions whose scoring did not fail."""
        return self.valid[self.packed.owner]

    def to(self, device: torch.device) -> MicroBatch:
        present: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in present.items() if value is not None})


class Learner:
    """The policy in training, its frozen reference, and one GRPO step after another."""

    def __init__(self, model: Path | str, config: Config, *, world: int = 1) -> None:
        self.config = config
        self.spec = losses.LossSpec.from_config(config.rl, config.rl_max_tokens)
        self.weights = rewards.weights_for(config.reward, tiny=config.tiny_backbone)
        self.policy = start_policy(model, config, world)
        self.reference = frozen_reference(model, self.policy) if config.rl.kl else None
        self.lay_out = Layout(self.policy)

    # --- one step ----------------------------------------------------------------------------
    def step(self, groups: list[pa.RecordBatch], version: Version, clock: Clock) -> dict[str, Any]:
        """One optimiser step on this rank's scored groups; returns what steps.jsonl says of it.

        `version` is that of the learner's weights before the step. All ranks must call together.
        """
        batches = [batch.to(self.policy.device) for batch in self.micro_batches(groups, version)]
        clock.lap("other")
        logprobs = self._proximal(batches)
        clock.lap("forward")
        finished, terms = self._finish(batches)
        totals = self._totals(batches)
        threshold = self._entropy_threshold(batches)
        clock.lap("reward")

        sums = torch.zeros(3, dtype=torch.float64)
        for part in range(self.policy.accumulation):
            empty = part >= len(batches)
            batch = batches[-1 if empty else part]
            if part > 0:
                logprobs, _ = token_logprobs(self.policy.engine, batch.packed, temperature=self.config.rl.temperature)
            loss = self._loss(batch, logprobs, finished[-1 if empty else part], totals, threshold)
            self.policy.backward(loss.total * 0.0 if empty else loss.total)
            if not empty:
                sums += torch.stack([loss.total.detach(), loss.kl, loss.clipped]).double().cpu()
        clock.lap("backward")
        return self._metrics(groups, batches, finished, terms, all_sum(sums).tolist(), version, totals)

    def probe(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [T]: log-probabilities of every token but the first of each prompt, at temperature 1.

        An engine that has these weights must say the same. All ranks must call together.
        """
        rows = plain([GroupTokens(prompt[:1], [prompt[1:]]) for prompt in prompts], self.lay_out.pad_id)
        with torch.no_grad():
            logprobs, _ = token_logprobs(self.policy.engine, rows.to(self.policy.device))
        return logprobs.float().cpu().numpy()

    def _proximal(self, batches: list[MicroBatch]) -> torch.Tensor:
        """Log-probabilities and entropies of the weights that the update starts from, and of the reference.

        Returns those of the first micro-batch with their graph: it goes backward first, under the same weights,
        and need not be read a second time.
        """
        temperature = self.config.rl.temperature

        def read(batch: MicroBatch) -> torch.Tensor:
            logprobs, batch.entropy = token_logprobs(
                self.policy.engine, batch.packed, temperature=temperature, with_entropy=True
            )
            batch.proximal = logprobs.detach()
            return logprobs

        with torch.no_grad():
            for batch in batches:
                if self.reference is not None:
                    batch.reference, _ = token_logprobs(self.reference, batch.packed, temperature=temperature)
            for batch in batches[1:]:
                read(batch)
        return read(batches[0])

    def _finish(self, batches: list[MicroBatch]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Advantages [R] of each micro-batch from the whole reward, and the entropy terms [R] that completed it."""
        advantages, terms = [], []
        for batch in batches:
            assert batch.entropy is not None
            term = rewards.entropy_terms(batch.entropy, batch.packed.owner, batch.in_cot, batch.format)
            reward = rewards.finish(batch.reward, batch.format, term, self.weights)
            advantages.append(group_advantages(reward, batch.packed.group, self.spec.advantage, batch.valid))
            terms.append(term)
        return advantages, terms

    def _loss(
        self,
        batch: MicroBatch,
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        totals: losses.Totals,
        threshold: float,
    ) -> losses.Loss:
        assert batch.proximal is not None
        assert batch.entropy is not None
        owner = batch.packed.owner
        return losses.policy_loss(
            logprobs,
            batch.proximal,
            batch.behaviour,
            advantages[owner],
            owner,
            batch.mask,
            self.spec,
            totals,
            carries=losses.top_entropy(batch.entropy, threshold),
            reference=batch.reference,
        )

    # --- what is counted over all ranks ------------------------------------------------------
    def _totals(self, batches: list[MicroBatch]) -> losses.Totals:
        own = sum((losses.Totals.count(b.packed.owner, b.mask) for b in batches), losses.Totals(0, 0))
        tokens, completions = all_sum(torch.tensor([own.tokens, own.completions], device=self.policy.device)).tolist()
        return losses.Totals(tokens, completions)

    def _entropy_threshold(self, batches: list[MicroBatch]) -> float:
        own = torch.cat([batch.entropy[batch.mask] for batch in batches])  # type: ignore[index]
        return losses.entropy_threshold(all_concatenate(own), self.config.rl.top_entropy)

    # --- laying out --------------------------------------------------------------------------
    def micro_batches(self, groups: list[pa.RecordBatch], version: Version) -> Iterator[MicroBatch]:
        """The groups of a step laid out for the model, longest first; `version` as `step` takes it."""
        tokens = [_group_tokens(group) for group in groups]
        for rows in by_length(tokens, self.config.rl.micro_batch_groups):
            batch = pa.concat_batches([groups[row] for row in rows])
            behaviour, _ = ragged(batch, "logprobs")
            attempt, number = token_versions(batch)
            masked = batch.column("masked").to_numpy(zero_copy_only=False).astype(bool)
            reward = batch.column("reward_without_entropy").to_numpy(zero_copy_only=False).astype(np.float32)
            yield MicroBatch(
                packed=self.lay_out([tokens[row] for row in rows]),
                behaviour=torch.from_numpy(behaviour.copy()),
                current=torch.from_numpy((attempt == version.attempt) & (number == version.number)),
                in_cot=torch.from_numpy(_in_cot(batch)),
                reward=torch.from_numpy(np.where(masked, np.nan, reward).astype(np.float32)),
                format=torch.from_numpy(batch.column("format").to_numpy().astype(np.float32)),
            )

    # --- what a person sees ------------------------------------------------------------------
    def _metrics(
        self,
        groups: list[pa.RecordBatch],
        batches: list[MicroBatch],
        advantages: list[torch.Tensor],
        terms: list[torch.Tensor],
        sums: list[float],
        version: Version,
        totals: losses.Totals,
    ) -> dict[str, Any]:
        """Of this rank's share where a figure is no sum over the batch; ranks see equal shares."""
        owners, offset = [], 0
        for batch in batches:
            owners.append(batch.packed.owner + offset)
            offset += batch.packed.completions
        joined = {
            name: torch.cat([getattr(batch, name) for batch in batches])
            for name in ("proximal", "behaviour", "mask", "current", "entropy", "reward", "format", "valid")
        }
        owner, term = torch.cat(owners), torch.cat(terms)
        reward = rewards.finish(joined["reward"], joined["format"], term, self.weights)[joined["valid"]]
        ages = np.concatenate([version.number - token_versions(group)[1] for group in groups])
        per_group = [int(version.number - token_versions(group)[1].min()) for group in groups]
        table = pa.concat_batches(groups)
        struct = table.column("reward_parts")
        parts = {name: struct.field(name).drop_null().to_numpy() for name in REWARD_PARTS}
        means = {name: float(values.mean()) for name, values in parts.items() if len(values)}
        answers = {" ".join(one.answer.split()).casefold() for one in completions(table)}
        proximal, behaviour, mask, current = (joined[name] for name in ("proximal", "behaviour", "mask", "current"))
        return {
            "reward_mean": reward.mean().item() if len(reward) else math.nan,
            "reward_parts": means | {"entropy": term[joined["valid"]].mean().item() if len(reward) else math.nan},
            "loss": sums[0],
            "kl": sums[1],
            "clipped": sums[2],
            "entropy": joined["entropy"][mask].mean().item(),
            "advantage_share": float((torch.cat(advantages) != 0).float().mean()),
            "staleness_mean": float(ages.mean()),
            "staleness_max": max(per_group),
            "ratio_stats": losses.ratio_stats(proximal, behaviour, owner, mask, self.spec, current),
            "engine_mismatch": losses.engine_mismatch(proximal, behaviour, mask, current),
            "tokens": totals.tokens,
            "distinct_answers": len(answers - {""}),
            "grad_norm": self.policy.grad_norm,
            "lr": self.policy.lr,
        }


def _group_tokens(group: pa.RecordBatch) -> GroupTokens:
    values, offsets = ragged(group, "completion_ids")
    prompt, prompt_offsets = ragged(group, "prompt_ids")
    return GroupTokens(prompt[: prompt_offsets[1]], [values[a:b] for a, b in pairwise(offsets)])


def _in_cot(batch: pa.RecordBatch) -> np.ndarray:
    """bool [T]: completion tokens inside the chain of thought."""
    _, offsets = ragged(batch, "completion_ids")
    span = batch.column("cot_tokens")
    inside = np.zeros(offsets[-1], bool)
    for at, start, end in zip(offsets[:-1], span.field("start").to_numpy(), span.field("end").to_numpy(), strict=True):
        inside[at + start : at + end] = True
    return inside
