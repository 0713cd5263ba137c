"""ReRe (arXiv 2510.12211): the LLM writes the next item itself, and verifiable rewards say whether it is the right one.

Supervised warm-up on the items that users chose next, then RL on groups that beam search over the
catalogue's trie brings: G different items, and those that miss are the policy's own hardest negatives.
Beams are no samples of the policy, so all of it is on policy (`max_staleness: 0`).

Left out: the reference stays the LLM before RL, where the authors move it along.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from rporec.config import Config
from rporec.data.slices import TrainSlices
from rporec.engine.trie import write_sequences
from rporec.engine.types import ItemSpec
from rporec.models.head_inputs import HeadInputs
from rporec.recipes.base import BaseRecipe
from rporec.rl.item_judge import ItemJudge, ItemScores
from rporec.text.completion_store import Part
from rporec.text.identities import IdentityPrompts, distinct_titles, identity_tokens, tokenizer_texts
from rporec.text.prompt import ItemWriter
from rporec.text.sft import Pair

if TYPE_CHECKING:
    from rporec.models.rechead import RecHead

OVERSAMPLED = 1.5  # groups of dynamic sampling before its selection


def beams_of_test(config: Config) -> dict[int, str]:
    """How many, each with what it adds to the names of its rows and folders."""
    usual = config.rere.eval_beams
    return {usual: ""} | {beams: f"_beams{beams}" for beams in config.rere.more_beams if beams != usual}


class ReRe(BaseRecipe):
    """Items by trie-constrained beams, rewarded by rule and rank."""

    @property
    def heads(self) -> dict[str, str]:
        """The recommender of the collaborative reward: a head on history alone."""
        return {"recommender": "blank"} if self.config.rere.collaborative else {}

    @cached_property
    def slices(self) -> TrainSlices:
        """All that comes before the RL slice is for supervision, and for the recommender: it reads no text of an LLM."""
        slices = super().slices
        before = np.concatenate([slices.warmup, slices.head])
        return replace(slices, warmup=before, head=before if self.heads else before[:0])

    # --- identities --------------------------------------------------------------------------
    @property
    def _trie(self) -> str:
        """The items' identities and their tokens."""
        return str(self.run.folder / "identities.parquet")

    @cached_property
    def identities(self) -> list[str]:
        """By item."""
        if self.config.rere.identity == "title":
            return distinct_titles(ItemWriter(self.dataset, self.config.text))
        from rporec.models.semantic_ids import item_vectors, residual_codes, semantic_ids

        rere, seed = self.config.rere, self.config.seed
        vectors = item_vectors(self.dataset.catalog.texts(), seed)
        return semantic_ids(residual_codes(vectors, rere.levels, rere.codes, seed))

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Of each item's identity, closed by end of text."""
        return pq.read_table(self._trie, columns=["tokens"])["tokens"].to_pylist()

    def vocabulary(self) -> tuple[list[str], list[str]]:
        if self.config.rere.identity == "title":
            return tokenizer_texts(self.identities), []
        from rporec.models.semantic_ids import code_tokens

        return tokenizer_texts([]), code_tokens(self.identities)

    def make_backbone(self) -> None:
        """And the identities in its tokens, again each time: a crash may have come between the two."""
        from rporec.models.backbone import load_tokenizer

        super().make_backbone()
        tokenizer = load_tokenizer(self.run.backbone)
        tokens = identity_tokens(self.identities, tokenizer, self.config.tiny_backbone)
        write_sequences(self.run.folder / "identities.parquet", tokens, self.identities)

    # --- how a prompt is written and items are found -----------------------------------------
    @cached_property
    def writer(self) -> IdentityPrompts:  # type: ignore[override]
        from rporec.models.backbone import load_tokenizer

        texts = pq.read_table(self._trie, columns=["text"])["text"].to_pylist()
        tokenizer, longest = load_tokenizer(self.model), max(map(len, self.tokens))
        return IdentityPrompts(self.dataset, self.config, texts, tokenizer, self.context, longest)

    def rollout_spec(self, seed: int) -> ItemSpec:
        size = self.config.group_size
        if self.config.rere.sampling == "dynamic":
            return ItemSpec(self._trie, math.ceil(OVERSAMPLED * size), "sampled", seed)
        return ItemSpec(self._trie, size)

    @cached_property
    def validation(self) -> tuple[np.ndarray, list[np.ndarray], list[ItemSpec]]:
        masks = self.config.data.headline == "exclude_history"
        excluded = [self.forbidden(int(sample)) if masks else () for sample in self.validated]
        specs = [ItemSpec(self._trie, self.config.rere.eval_beams, exclude=items) for items in excluded]
        return self.validated, self.prompts(self.validated), specs

    def forbidden(self, sample: int) -> tuple[int, ...]:
        """What the convention `exclude_history` removes: all that the user had before, but never the target."""
        return tuple(sorted(set(self.dataset.seen(sample).tolist()) - set(self.dataset.targets([sample]).tolist())))

    # --- what the stages before and after RL need --------------------------------------------
    def pairs(self) -> list[Pair]:
        """The items that users chose next."""
        samples = self.slices.warmup
        chosen = zip(samples.tolist(), self.writer.prompts(samples), self.dataset.targets(samples), strict=True)
        return [Pair(sample, prompt, self.tokens[target]) for sample, prompt, target in chosen]

    def parts(self, stage: str) -> list[Part]:
        """Beams for test, anew for each convention: what is removed must not take a beam."""
        test, parts = self.evaluated("test"), []
        for (beams, suffix), convention in product(beams_of_test(self.config).items(), self.config.tested_conventions):
            folder = self.run.completions(stage, f"test_{convention}{suffix}")
            forbidden = self.forbidden if convention == "exclude_history" else None
            parts.append(Part(folder, test, ItemSpec(self._trie, beams), forbidden))
        return parts

    # --- how they are rewarded ---------------------------------------------------------------
    def judge(self) -> ItemJudge:
        return ItemJudge(self.config, self.dataset, self._recommends() if self.config.rere.collaborative else None)

    def _recommends(self) -> ItemScores:
        head = self._recommender
        return lambda samples: head.scores(HeadInputs.of(self.dataset, samples)).numpy()

    @cached_property
    def _recommender(self) -> RecHead:
        """Its network alone: transitions and popularity counted over the RL slice would know the targets."""
        from rporec.models.rechead import RecHead

        return RecHead.load(self.run.head("recommender"), self.dataset.catalog).freeze().network_alone()
