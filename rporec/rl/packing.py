"""A group is one training sequence: the prompt once, its completions side by side behind it.

`pack` and `plain` lay out the same tokens for a forward pass and return the same `Packed`; every
per-token tensor of training follows the order they share: groups as given, completions as given,
tokens in order.

    row of pack     p0 p1 p2 | a0 a1 a2 | b0 b1        positions 0 1 2 | 3 4 5 | 3 4
    a token sees    the prompt, and its own completion up to itself
    a0 and b0       are both read from p2; a1 from a0, b1 from b0, …

Recommendation prompts are long and completions short, so `pack` pays for the prompt once where
`plain` pays for it once per completion. `plain` is for models that such rows would mislead, see
`rporec.models.policy.check_packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rporec.models.policy import PAD, Packed


@dataclass(frozen=True)
class GroupTokens:
    """Token ids of one prompt [P] (at least one) and of its completions (any lengths, 0 too)."""

    prompt_ids: Sequence[int] | np.ndarray
    completions: Sequence[np.ndarray]

    @property
    def packed_length(self) -> int:
        return len(self.prompt_ids) + sum(len(completion) for completion in self.completions)


def pack(groups: Sequence[GroupTokens], pad_id: int) -> Packed:
    """One group per row.

    Raises ValueError for an empty prompt (nothing would predict the first token).
    """
    return _lay_out([[group] for group in groups], pad_id)


def plain(groups: Sequence[GroupTokens], pad_id: int) -> Packed:
    """One completion per row behind its own copy of the prompt: what any causal model understands.

    Raises ValueError for an empty prompt.
    """
    return _lay_out(
        [[GroupTokens(group.prompt_ids, [completion]) for completion in group.completions] for group in groups], pad_id
    )


def by_length(groups: Sequence[GroupTokens], size: int) -> list[np.ndarray]:
    """Indices of `groups` cut into micro-batches of at most `size`, longest first, for little padding.

    The loss is normalised by global counts, so the order of groups does not change it.
    """
    order = np.argsort([-group.packed_length for group in groups], kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def _lay_out(groups: list[list[GroupTokens]], pad_id: int) -> Packed:
    """Lay out rows; the outer list is the groups, the inner one the rows that a group takes."""
    rows = [row for group in groups for row in group]
    if any(len(row.prompt_ids) == 0 for row in rows):
        raise ValueError("packing: a prompt without tokens predicts nothing; begin it with at least one token")
    length = max((row.packed_length for row in rows), default=0)
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    positions = np.tile(np.arange(length), (len(rows), 1))
    branches = np.full((len(rows), length), PAD, dtype=np.int64)
    predictors, labels, lengths = [], [], []
    for number, row in enumerate(rows):
        end = prompt = len(row.prompt_ids)
        input_ids[number, :prompt] = row.prompt_ids
        branches[number, :prompt] = 0
        for branch, completion in enumerate(row.completions, start=1):
            start, end = end, end + len(completion)
            input_ids[number, start:end] = completion
            positions[number, start:end] = np.arange(prompt, prompt + len(completion))
            branches[number, start:end] = branch
            predictor = np.arange(start - 1, end - 1)
            predictor[:1] = prompt - 1
            predictors.append(number * length + predictor)
            labels.append(np.asarray(completion, dtype=np.int64))
            lengths.append(len(completion))
        # Padding goes on counting: positions that jump read as a second sequence to transformers.
        positions[number, end:] = np.arange(length - end) + (positions[number, end - 1] + 1)
    sizes = [sum(len(row.completions) for row in group) for group in groups]
    empty = [np.zeros(0, dtype=np.int64)]
    return Packed(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        branches=torch.from_numpy(branches),
        rows=torch.from_numpy(np.concatenate(predictors or empty)),
        labels=torch.from_numpy(np.concatenate(labels or empty)),
        owner=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        group=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        causal=all(len(row.completions) <= 1 for row in rows),
    )
