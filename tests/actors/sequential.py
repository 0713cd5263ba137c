"""GRPO on policy, as one would write it without Ray, ledger, packing, micro-batches or DeepSpeed.

What `max_staleness: 0` is measured against. One process does everything, one group after the other:
draw a sample, write its completions, score them, and after `groups_per_step` groups make one step.
It shares with the system what is not under test here: the recipe (samples, prompts, the judge),
the tokenizer's text, and the `transformers` engine.

The system's corrections for tokens of another policy are left out. On policy their ratios are 1,
and so is `r`, since a step makes one update.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rporec.config import Config
from rporec.engine.decoder import Decoder
from rporec.engine.reference import ReferenceEngine
from rporec.engine.types import Version
from rporec.recipes import load_recipe
from rporec.run import Run
from rporec.text.completion import THINK, THINK_END, parse


@dataclass
class Group:
    sample: int
    seed: int
    prompt: list[int]
    completions: list[list[int]]
    judged: np.ndarray  # rewards without the entropy term
    rewards: list[float]  # whole, once the policy has read the group


@dataclass
class Step:
    groups: list[Group]
    loss: float
    kl: float  # before its coefficient


@dataclass
class Read:
    """One completion of T tokens under the policy."""

    logprobs: torch.Tensor  # [T], with gradient
    reference: torch.Tensor  # [T], under the frozen model
    entropies: torch.Tensor  # [T] nats
    advantage: float = 0.0


class Trainer:
    """`recorded[k]`: token ids of the k-th group's completions; without it they are sampled."""

    def __init__(self, run: Run, config: Config, recorded: Sequence[list[list[int]]] | None = None) -> None:
        self.config, self.recorded = config, recorded or []
        self.recipe: Any = load_recipe(run, config)
        context = self.recipe.context
        self.engine = None if recorded else ReferenceEngine(run.warm_model, config.engine, context=context, seed=0)
        self.judge: Any = self.recipe.judge()
        self.decoder = Decoder(run.warm_model)
        self.policy = AutoModelForCausalLM.from_pretrained(str(run.warm_model), dtype=torch.float32).eval()
        self.frozen = copy.deepcopy(self.policy).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.rl.lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    def steps(self) -> Iterator[Step]:
        size = self.config.groups_per_step
        for step in range(self.config.steps):
            if self.engine is not None:
                self.engine.update_weights(Version(0, step), self.policy.named_parameters()).result()
            yield self.step([self.group(number) for number in range(step * size, (step + 1) * size)])
        if self.engine is not None:
            self.engine.close()

    def group(self, number: int) -> Group:
        """The `number`-th prompt, written and judged."""
        sample, seed = self.recipe.draw(number)
        prompt = self.recipe.prompts([sample])[0].tolist()
        if self.engine is None:
            completions = self.recorded[number]
        else:
            generated = self.engine.submit(prompt, self.recipe.rollout_spec(seed)).result()
            completions = [one.token_ids.tolist() for one in generated]
        written = [parse(self.decoder.text(tokens)) for tokens in completions]
        scored = self.judge.score_completions(self.judge.reward_head, np.full(len(written), sample), written)
        assert not scored.masked.any()
        return Group(sample, seed, prompt, completions, scored.reward_without_entropy, [])

    def step(self, groups: list[Group]) -> Step:
        """One update on the groups."""
        rl = self.config.rl
        read: list[Read] = []
        for group in groups:
            mine = [self.read(group.prompt, tokens) for tokens in group.completions]
            group.rewards = [
                float(reward) + self.config.reward.entropy * self.entropy_term(tokens, one.entropies)
                for reward, tokens, one in zip(group.judged, group.completions, mine, strict=True)
            ]
            mean, deviation = np.mean(group.rewards), np.std(group.rewards, ddof=1)
            for one, reward in zip(mine, group.rewards, strict=True):
                one.advantage = float((reward - mean) / (deviation + 1e-6))
            read += mine

        # Only the tokens at which the policy is least certain carry the policy gradient. Completions
        # that begin alike tie, but for rounding, and ties all stay.
        entropies = torch.cat([one.entropies for one in read]).sort(descending=True).values
        threshold = entropies[math.ceil(rl.top_entropy * len(entropies)) - 1]
        policy, kl = torch.zeros(()), torch.zeros(())
        for one in read:
            ratio = (one.logprobs - one.logprobs.detach()).exp()
            carries = one.entropies >= threshold - 1e-4
            policy = policy - (carries * ratio * one.advantage).mean() / len(read)
            distance = one.reference - one.logprobs
            kl = kl + (distance.exp() - distance - 1).mean() / len(read)
        loss = policy + rl.kl * kl

        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), rl.grad_clip)
        self.optimizer.step()
        return Step(groups, loss.item(), kl.item())

    def read(self, prompt: list[int], tokens: list[int]) -> Read:
        """The completion behind its prompt, as a sequence of its own."""

        def logprobs(model: torch.nn.Module) -> torch.Tensor:
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            return (logits / self.config.rl.temperature).log_softmax(-1)

        everything, frozen = logprobs(self.policy), logprobs(self.frozen)
        chosen = torch.tensor(tokens)[:, None]
        entropies = -(everything.exp() * everything).sum(-1).detach()
        return Read(everything.gather(1, chosen)[:, 0], frozen.gather(1, chosen)[:, 0], entropies)

    def entropy_term(self, tokens: list[int], entropies: torch.Tensor) -> float:
        """How much less certain than on average the policy is at the top fifth of its thought's tokens."""
        if not parse(self.decoder.text(tokens)).format:
            return 0.0
        start, end = (tokens.index(self.decoder.tokenizer.convert_tokens_to_ids(tag)) for tag in (THINK, THINK_END))
        thought = entropies[start + 1 : end].sort(descending=True).values
        return float(thought[: math.ceil(len(thought) / 5)].mean() - thought.mean()) if len(thought) else 0.0
