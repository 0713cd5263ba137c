"""Offline preferences, the relatives of ReRe without generation: S-DPO, DynamicPO and NAPO.

Identities, supervised warm-up and evaluation are ReRe's. Stage 2 shows the LLM, for each sample of the
RL slice, the item that the user chose and items that the user never had.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from rporec.config import ConfigError
from rporec.engine.types import ItemSpec
from rporec.models.head_inputs import HeadInputs
from rporec.recipes.rere import ReRe
from rporec.rl.packing import GroupTokens
from rporec.rl.preference_learner import Auxiliary, Preferences
from rporec.text.completion_store import Part, read_items


class Preference(ReRe):
    """The chosen item against `group_size - 1` others."""

    @property
    def heads(self) -> dict[str, str]:
        """NAPO's auxiliary recommender: a head on history alone."""
        return {"recommender": "blank"} if self.config.preference.loss == "napo" else {}

    def parts(self, stage: str) -> list[Part]:
        parts = super().parts(stage)
        if stage == "stage1" and self.config.preference.negatives == "beams":
            spec = ItemSpec(self._trie, self.config.group_size)
            parts.append(Part(self.run.completions(stage, "negatives"), self.slices.rl, spec, self.forbidden))
        return parts

    def groups(self, numbers: Sequence[int]) -> list[Preferences]:
        """The `number`-th groups of training, the same in every attempt."""
        drawn = [self.draw(number) for number in numbers]
        samples = [sample for sample, _ in drawn]
        targets = self.dataset.targets(samples).tolist()
        result = []
        for (sample, seed), prompt, target in zip(drawn, self.prompts(samples), targets, strict=True):
            taken = frozenset(self.dataset.seen(sample).tolist()) | {target}
            items = [target, *self._negatives(sample, seed, taken)]
            tokens = GroupTokens(prompt, [np.asarray(self.tokens[item]) for item in items])
            result.append(Preferences(sample, tokens, np.array(items), taken))
        return result

    def _negatives(self, sample: int, seed: int, taken: frozenset[int]) -> list[int]:
        count = self.config.group_size - 1
        if self.config.preference.negatives == "beams":
            return [item for item in self._beams[sample] if item not in taken][:count]
        others = np.setdiff1d(np.arange(len(self.tokens)), list(taken))
        if len(others) < count:
            raise ConfigError(
                f"group_size: {count + 1} needs {count} items that a user never had, and one has {len(others)}; lower it"
            )
        return np.random.default_rng(seed).choice(others, count, replace=False).tolist()

    @cached_property
    def _beams(self) -> dict[int, list[int]]:
        """What the LLM before preferences would write, best first."""
        samples, items = read_items(self.run.completions("stage1", "negatives"))
        return {int(sample): row.tolist() for sample, row in zip(samples, items, strict=True)}

    def auxiliary(self) -> Auxiliary | None:
        """NAPO's judge of users and negatives: the recommender's network, which never saw the RL slice."""
        if self.config.preference.loss != "napo":
            return None
        head = self._recommender

        def judge(samples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            inputs = HeadInputs.of(self.dataset, samples)
            users = head.query_vectors(inputs)[:, : head.config.dim]  # without what meets the items' biases
            return users.numpy(), head.scores(inputs).numpy()

        return judge
