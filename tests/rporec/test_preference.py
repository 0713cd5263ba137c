"""Preference losses against their formulas, written out prompt by prompt in float64."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rporec.rl.preference import (
    boundary,
    confidence_margin,
    dual_margin_beta,
    dynamic_po,
    likeliest_cluster,
    napo,
    s_dpo,
    shared_negatives,
)

BETA = 0.7
OWNER = torch.tensor([0, 1, 1, 0, 2, 1, 0])  # not sorted; prompt 3 has no negative


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_s_dpo_is_its_formula():
    chosen, rejected = drawn(4), drawn(7, seed=1)
    expected = []
    for prompt in range(4):
        total = sum(math.exp(BETA * float(rejected[d] - chosen[prompt])) for d in range(7) if OWNER[d] == prompt)
        expected.append(-math.log(sigmoid(-math.log(total))) if total else 0.0)
    assert s_dpo(chosen, rejected, OWNER, BETA).tolist() == pytest.approx(expected, abs=1e-12)


def test_s_dpo_with_one_negative_is_dpo():
    chosen, rejected = drawn(5), drawn(5, seed=1)
    found = s_dpo(chosen, rejected, torch.arange(5), BETA)
    assert torch.allclose(found, -F.logsigmoid(BETA * (chosen - rejected)), atol=1e-14)


def test_losses_worked_out_by_hand():
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    chosen, twice = torch.zeros(1), torch.tensor([math.log(2), math.log(4)])
    assert s_dpo(chosen, twice, two, 0.5).tolist() == pytest.approx([math.log(1 + math.sqrt(2) + 2)])
    margins = torch.tensor([math.log(3), 0.0])
    assert napo(chosen, twice, (two, torch.arange(2)), margins, 1.0).tolist() == pytest.approx([math.log(11)])
    # Of five negatives, all below the chosen item's 0, the likeliest of three clusters is {-2, -3}; the others'
    # mean is -8, so tanh is that of (2 - 6 - 6) / 8 and (3 - 5 - 6) / 8.
    policy = torch.tensor([-7.0, -2.0, -9.0, -3.0, -8.0])
    ratios = torch.tensor([50.0, math.log(2), 50.0, math.log(4), 50.0])
    found = dynamic_po(chosen, ratios, one.expand(5), 1.0, policy_chosen=chosen, policy_rejected=policy)
    assert found.tolist() == pytest.approx([math.log(1 + 2**0.575858 + 4**0.619203)], rel=1e-6)


def test_extreme_ratios_neither_overflow_nor_lose_the_gradient():
    chosen = torch.tensor([-400.0, 400.0], requires_grad=True)
    rejected = torch.tensor([400.0, -400.0], requires_grad=True)
    loss = s_dpo(chosen, rejected, torch.tensor([0, 1]), 1.0)
    assert loss.tolist() == [800.0, 0.0]
    loss.sum().backward()
    assert chosen.grad.tolist() == [-1.0, 0.0]
    assert rejected.grad.tolist() == [1.0, 0.0]


def test_dynamic_po_is_its_formula():
    ratio_chosen, ratio_rejected = drawn(4), drawn(7, seed=1)
    policy_chosen, policy_rejected = drawn(4, seed=2) - 8, drawn(7, seed=3) - 8
    policy_chosen[1] = 5.0  # no negative of prompt 1 reaches it: the likeliest cluster is taken
    expected = []
    for prompt in range(4):
        own = [d for d in range(7) if OWNER[d] == prompt]
        near = [d for d in own if policy_rejected[d] >= policy_chosen[prompt]]
        if own and not near:
            near = [max(own, key=lambda d: policy_rejected[d])]  # three values in three clusters
        far = [d for d in own if d not in near] or near
        total = 0.0
        for d in near:
            above = float(policy_chosen[prompt] - policy_rejected[d])
            below = float(policy_rejected[d]) - sum(float(policy_rejected[f]) for f in far) / len(far)
            beta = BETA * (1 + 0.5 * math.tanh((above - below - 6) / max(abs(above) + abs(below), 1e-12)))
            total += math.exp(beta * float(ratio_rejected[d] - ratio_chosen[prompt]))
        expected.append(math.log1p(total))
    found = dynamic_po(
        ratio_chosen,
        ratio_rejected,
        OWNER,
        BETA,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_selection_and_beta_carry_no_gradient():
    policy = drawn(3).requires_grad_()
    owner = torch.tensor([0, 0])
    loss = dynamic_po(policy[:1], policy[1:], owner, BETA, policy_chosen=policy[:1], policy_rejected=policy[1:])
    loss.sum().backward()
    near = boundary(policy[:1].detach(), policy[1:].detach(), owner)
    betas = dual_margin_beta(policy[:1].detach(), policy[1:].detach(), owner, near, BETA)
    frozen = policy.detach().clone().requires_grad_()
    logits = torch.where(near, betas * (frozen[1:] - frozen[0]), -torch.inf)
    torch.log1p(logits.exp().sum()).backward()
    assert torch.allclose(policy.grad, frozen.grad, atol=1e-14)


def test_beta_stays_within_half_and_one_and_a_half():
    chosen, rejected = drawn(4, scale=50.0), drawn(7, seed=1, scale=50.0)
    betas = dual_margin_beta(chosen, rejected, OWNER, boundary(chosen, rejected, OWNER), BETA)
    assert ((betas >= 0.5 * BETA) & (betas <= 1.5 * BETA)).all()
    assert len(betas.unique()) == 7


def test_the_likeliest_cluster_is_that_of_the_best_clustering_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=rng.integers(3, 8)).round(2)

        def spread(labels: tuple[int, ...], values: np.ndarray = values) -> float:
            groups = [values[np.array(labels) == label] for label in range(3)]
            return sum(float(((group - group.mean()) ** 2).sum()) for group in groups if len(group))

        every = [labels for labels in product(range(3), repeat=len(values)) if len(set(labels)) == 3]
        best = min(every, key=spread)
        highest = max(range(3), key=lambda label: values[np.array(best) == label].mean())
        assert likeliest_cluster(values.tolist()) == pytest.approx(values[np.array(best) == highest].min())
    assert likeliest_cluster([2.0]) == 2.0
    assert likeliest_cluster([2.0, 1.0]) == 2.0


def test_napo_is_its_formula():
    chosen, rejected = drawn(4), drawn(7, seed=1)
    prompt, negative = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 5, 1, 2, 3, 4])
    margins = drawn(6, seed=2)
    expected = [0.0] * 4
    for p, d, margin in zip(prompt.tolist(), negative.tolist(), margins.tolist(), strict=True):
        expected[p] += math.exp(BETA * float(rejected[d] - chosen[p]) + margin)
    found = napo(chosen, rejected, (prompt, negative), margins, BETA)
    assert found.tolist() == pytest.approx([math.log1p(total) for total in expected], abs=1e-12)


def test_napo_of_a_prompts_own_negatives_without_margin_is_s_dpo():
    chosen, rejected = drawn(4), drawn(7, seed=1)
    own = (OWNER, torch.arange(7))
    assert torch.equal(napo(chosen, rejected, own, torch.zeros(7), BETA), s_dpo(chosen, rejected, OWNER, BETA))


def test_negatives_are_shared_between_alike_users_but_not_what_one_of_them_took():
    users = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])  # 0 and 1 alike
    owner, items = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([10, 11, 11, 12, 13, 14])
    forbidden = [{1, 12}, {2}, {3}]
    prompt, negative = shared_negatives(owner, items, users, forbidden, 0.9)
    assert list(zip(prompt.tolist(), negative.tolist(), strict=True)) == [
        *[(0, 0), (0, 1), (0, 4)],  # 11 has a copy of its own, 12 is in the history
        *[(1, 2), (1, 3), (1, 4), (1, 0)],
        (2, 5),
    ]


def test_margins_grow_with_the_auxiliary_models_confidence():
    margins = confidence_margin(torch.tensor([0.0, 5.0, -5.0]), torch.zeros(3), 2.0)
    assert margins.tolist() == pytest.approx([1.0, 2 * sigmoid(5), 2 * sigmoid(-5)])
