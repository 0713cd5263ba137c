"""Warm-up data: stored rationales as token ids, exactly as a rollout would have them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rporec.config import ConfigError
from rporec.text.prompt import PromptWriter
from rporec.text.rationales import Rationale

if TYPE_CHECKING:
    from rporec.data import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One supervised example: the loss is on `completion_ids`, which end with eos."""

    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]


def warmup_pairs(dataset: Dataset, rationales: Iterable[Rationale], prompts: PromptWriter) -> list[Pair]:
    """Pairs of the usable rationales, in their order.

    Prompt and completion are encoded apart, as they are in a rollout, where sampling starts behind
    the prompt's last token. Rationales longer than `prompts.reserve` tokens are left out and
    counted in the log: the policy could not finish them. Raises ConfigError if none is left.
    """
    tokenizer = prompts.tokenizer
    pairs, too_long = [], 0
    for rationale in rationales:
        if rationale.text is None:
            continue
        completion = [*tokenizer.encode(rationale.text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(completion) > prompts.reserve:
            too_long += 1
            continue
        pairs.append(Pair(rationale.sample, prompts.prompt_ids(dataset.history(rationale.sample)), completion))
    if not pairs and too_long:
        raise ConfigError(
            f"sampling.max_tokens: all {too_long} rationales are longer than {prompts.reserve} tokens; raise it, or "
            "lower text.max_words"
        )
    if not pairs:
        raise ConfigError(
            "teacher: no rationale can be used, so there is nothing to warm up on; look into the run's rationales/, "
            "take another teacher.kind, or do without (warmup.steps: 0)"
        )
    if too_long:
        logger.warning(
            "warm-up leaves out %d rationales longer than %d tokens (sampling.max_tokens)", too_long, prompts.reserve
        )
    return pairs
