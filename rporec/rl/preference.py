"""Preference losses over one chosen item and many negatives, as pure functions on flat tensors.

P prompts, each with one chosen completion and any number of negatives, M in all; `owner` int64 [M]
names the prompt of each negative. Log-probabilities are sums over a completion's tokens. A *ratio* is
the policy's log-probability minus the reference's, r = log pi(y|x) - log pi_ref(y|x). Every loss ends in

    -log sigmoid(-log sum_d exp(logit_d)) = log(1 + sum_d exp(logit_d))

of the prompt's negatives d, and differs in the logits and in which negatives stay:

    S-DPO       beta (r_d - r_p)
    DynamicPO   beta_d (r_d - r_p), near the decision boundary alone
    NAPO        beta (r_d - r_p) + margin_d, with the negatives of similar users beside one's own

All return one loss per prompt [P], 0 for a prompt without negatives. Gradients flow through ratios
alone: selection, beta_d and margins are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch.nn import functional as F

CLUSTERS = 3  # of a prompt's negatives, where none reaches the chosen item
FIXED_MARGIN = 6.0  # nats, the authors' constant in DynamicPO's beta
MOST_CHANGE = 0.5  # of beta, either way
TINY = 1e-12


def s_dpo(chosen: torch.Tensor, rejected: torch.Tensor, owner: torch.Tensor, beta: float) -> torch.Tensor:
    """chosen [P], rejected [M]: ratios. With one negative a prompt it is DPO.

    Chen et al. 2024, "On softmax direct preference optimization for recommendation", arXiv 2406.09215.
    """
    return softmax_loss(beta * (rejected - chosen[owner]), owner, len(chosen))


def dynamic_po(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    owner: torch.Tensor,
    beta: float,
    *,
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    margin: float = FIXED_MARGIN,
) -> torch.Tensor:
    """S-DPO over the negatives of `boundary`, each with its own `dual_margin_beta`.

    chosen [P], rejected [M]: ratios. policy_chosen [P], policy_rejected [M]: log-probabilities of the
    policy alone, in which the boundary is drawn. DynamicPO, arXiv 2605.00327; constants and the case of an
    empty boundary follow the authors' code.
    """
    near = boundary(policy_chosen.detach(), policy_rejected.detach(), owner)
    betas = dual_margin_beta(policy_chosen.detach(), policy_rejected.detach(), owner, near, beta, margin)
    logits = torch.where(near, betas * (rejected - chosen[owner]), -torch.inf)
    return softmax_loss(logits, owner, len(chosen))


def napo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    margins: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """S-DPO with a margin for each pair of a prompt and a negative.

    chosen [P], rejected [M]: ratios. pairs: (prompt, negative), int64 [K] each, of `shared_negatives`: a
    negative keeps the ratio that it has behind its own prompt, which is what makes sharing free. margins
    [K], nats: see `confidence_margin`. NAPO, arXiv 2508.09653.
    """
    prompt, negative = pairs
    return softmax_loss(beta * (rejected[negative] - chosen[prompt]) + margins.detach(), prompt, len(chosen))


def softmax_loss(logits: torch.Tensor, owner: torch.Tensor, prompts: int) -> torch.Tensor:
    """log(1 + sum exp(logit)) [P] over the logits [M] of each owner; -inf leaves a negative out."""
    table = logits.new_full((prompts, 1 + _most(owner, prompts)), -torch.inf)
    table[:, 0] = 0.0
    table = table.index_put((owner, 1 + _place(owner)), logits)
    return table.logsumexp(dim=1)


# DynamicPO: which negatives, and how hard.


def boundary(chosen: torch.Tensor, rejected: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """bool [M]: negatives that the policy finds at least as likely as the chosen item.

    Where a prompt has none, the likeliest of its three clusters. chosen [P], rejected [M]: log-probabilities.
    """
    near = rejected >= chosen[owner]
    for prompt in range(len(chosen)):
        own = (owner == prompt).nonzero().squeeze(1)
        if len(own) and not near[own].any():
            near[own] = rejected[own] >= likeliest_cluster(rejected[own].tolist())
    return near


def likeliest_cluster(values: Sequence[float]) -> float:
    """The smallest value of the highest cluster: k-means in one dimension, solved exactly.

    Of sorted values the best clusters are runs, so all ways to cut them are tried; there are few
    negatives. A single value is its own cluster.
    """
    ordered = sorted(values)
    count = min(CLUSTERS, len(ordered))

    def spread(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts, len(ordered))
        runs = [ordered[start:end] for start, end in pairwise(ends)]
        return sum(sum((value - sum(run) / len(run)) ** 2 for value in run) for run in runs)

    best = min(combinations(range(1, len(ordered)), count - 1), key=spread)
    return ordered[best[-1]] if best else ordered[0]


def dual_margin_beta(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    owner: torch.Tensor,
    near: torch.Tensor,
    beta: float,
    margin: float = FIXED_MARGIN,
) -> torch.Tensor:
    """beta (1 + tanh((a - b - margin) / (|a| + |b|)) / 2) [M], from half to one and a half times beta.

    a: how far the chosen item is above a negative; b: how far that one is above the mean of the prompt's
    negatives that are not near (all of them if all are near). Log-probabilities of the policy, in nats.
    """
    others = torch.where(_sum(~near, owner, len(chosen))[owner] > 0, ~near, near).to(rejected.dtype)
    weight = _sum(others, owner, len(chosen)).clamp(min=1)
    mean = _sum(others * rejected, owner, len(chosen)) / weight
    above, below = chosen[owner] - rejected, rejected - mean[owner]
    scale = (above.abs() + below.abs()).clamp(min=TINY)
    return beta * (1 + MOST_CHANGE * torch.tanh((above - below - margin) / scale))


# NAPO: more negatives, and how sure of each.


def shared_negatives(
    owner: torch.Tensor, items: torch.Tensor, users: torch.Tensor, forbidden: Sequence[set[int]], similarity: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, negative), int64 [K] each: a prompt's own negatives and those of prompts whose users are alike.

    items int64 [M]: the item of each negative. users float [P, E]: vectors of an auxiliary recommender,
    alike from cosine `similarity` on. forbidden: per prompt its target and history, which are no
    negatives of its own. An item counts once a prompt; its own copy before a neighbour's.
    """
    unit = F.normalize(users, dim=1)
    alike = unit @ unit.T >= similarity
    alike.fill_diagonal_(True)
    pairs = []
    for prompt, near in enumerate(alike[:, owner]):
        taken = set(forbidden[prompt])
        candidates = near.nonzero().squeeze(1).tolist()
        for negative in sorted(candidates, key=lambda one: (int(owner[one]) != prompt, one)):
            own = int(owner[negative]) == prompt
            if own or int(items[negative]) not in taken:
                taken.add(int(items[negative]))
                pairs.append((prompt, negative))
    found = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def confidence_margin(target: torch.Tensor, negative: torch.Tensor, most: float) -> torch.Tensor:
    """most * sigmoid(target - negative) [K], nats: the surer the auxiliary model, the farther apart they should be.

    target, negative [K]: the auxiliary model's scores of both items for the prompt's user; the sigmoid is
    its Bradley-Terry probability that the user prefers the target. The paper sets margins by such a
    model's confidence; this formula is this project's.
    """
    return most * torch.sigmoid(target - negative)


# Sums over the negatives of a prompt.


def _sum(values: torch.Tensor, owner: torch.Tensor, prompts: int) -> torch.Tensor:
    values = values if values.is_floating_point() else values.to(torch.float32)
    return values.new_zeros(prompts).index_add_(0, owner, values)


def _most(owner: torch.Tensor, prompts: int) -> int:
    return int(torch.bincount(owner, minlength=prompts).max()) if len(owner) else 0


def _place(owner: torch.Tensor) -> torch.Tensor:
    """How many before it have the same owner, int64 [M]."""
    order = owner.argsort(stable=True)
    ordered = owner[order]
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(owner).index_put_((order,), torch.arange(len(owner), device=owner.device) - first)
