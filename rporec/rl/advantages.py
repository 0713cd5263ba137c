"""Group-relative advantages: how much better a completion did than its siblings.

Flat tensors: `rewards` [R], one per completion, and `group` int64 [R], the group of each, any labels.
A completion whose scoring failed (`valid` false) takes no part in its group's statistics and gets 0;
so does every completion of a group in which nothing differs.
"""

from __future__ import annotations

from typing import Literal

import torch

Advantage = Literal["grpo", "dr_grpo", "rloo"]
EPSILON = 1e-6


def group_advantages(
    rewards: torch.Tensor, group: torch.Tensor, kind: Advantage = "grpo", valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Advantages [R] in the dtype of `rewards`.

    With mean, standard deviation (n - 1) and count n over the valid completions of the group:

    grpo     (r - mean) / (std + 1e-6)            DeepSeekMath, arXiv 2402.03300, section 4.1.2
    dr_grpo  r - mean                             Dr. GRPO, arXiv 2503.20783, section 3.2
    rloo     r - mean of the others               RLOO, arXiv 2402.14740, section 2.3
             = (r - mean) * n / (n - 1)
    """
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"advantage: {kind!r} is none of grpo, dr_grpo, rloo")
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    groups, member = group.unique(return_inverse=True)
    reward = torch.where(valid, rewards, 0).double()
    count = _group_sum(valid.double(), member, len(groups))
    mean = _group_sum(reward, member, len(groups)) / count.clamp(min=1)
    centred = torch.where(valid, reward - mean[member], 0)
    others = (count - 1).clamp(min=1)
    if kind == "grpo":
        std = (_group_sum(centred.square(), member, len(groups)) / others).sqrt()
        centred = centred / (std + EPSILON)[member]
    elif kind == "rloo":
        centred = centred * (count / others)[member]
    # Rounding in the mean must not become a gradient once it is divided by a tiny deviation.
    flat = _extreme(reward, member, valid, len(groups), "amax") == _extreme(reward, member, valid, len(groups), "amin")
    return torch.where(valid & ~flat[member], centred, 0).to(rewards.dtype)


def _group_sum(values: torch.Tensor, member: torch.Tensor, groups: int) -> torch.Tensor:
    return values.new_zeros(groups).index_add_(0, member, values)


def _extreme(values: torch.Tensor, member: torch.Tensor, valid: torch.Tensor, groups: int, which: str) -> torch.Tensor:
    return values.new_zeros(groups).scatter_reduce_(0, member[valid], values[valid], which, include_self=False)
