import math
from dataclasses import replace

import pytest
import torch

from rporec.config import RLConfig
from rporec.rl.losses import (
    LossSpec,
    Totals,
    cispo,
    clipped_surrogate,
    completion_mean,
    corrected,
    engine_mismatch,
    entropy_threshold,
    gspo_ratio,
    icepop,
    importance,
    kl_estimate,
    policy_loss,
    ratio_stats,
    reinforce,
    sequence_mask,
    token_weights,
    top_entropy,
    truncated,
)

PLAIN = LossSpec(correction="none", sequence_mask=None)
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")

# Two completions, of two tokens and of one.
OWNER = torch.tensor([0, 0, 1])
MASK = torch.ones(3, dtype=torch.bool)
ADVANTAGES = torch.tensor([1.0, 1.0, -2.0])
TOTALS = Totals(tokens=3, completions=2)


def log(*values: float) -> torch.Tensor:
    return torch.tensor(values).log()


def near(found: torch.Tensor, *expected: float) -> None:
    wanted = torch.tensor(expected if len(expected) > 1 else expected[0], dtype=torch.float32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# Pieces.


def test_truncation_caps_the_weight_from_above_only():
    near(truncated(torch.tensor([0.1, 1.0, 5.0]), 2.0), 0.1, 1.0, 2.0)


def test_icepop_zeroes_tokens_outside_its_range_and_keeps_the_bounds():
    near(icepop(torch.tensor([0.49, 0.5, 3.0, 5.0, 5.1]), 0.5, 5.0), 0, 0.5, 3.0, 5.0, 0)


def test_sequence_mask_judges_the_geometric_mean_of_a_completion():
    # sqrt(4 * 1/4) = 1 stays though both tokens are far off; 2.1 goes.
    assert sequence_mask(log(4.0, 0.25, 2.1), OWNER, MASK, 0.5, 2.0).tolist() == [True, True, False]


def test_sequence_mask_looks_at_masked_tokens_only():
    mask = torch.tensor([True, False, True])
    assert sequence_mask(log(1.0, 1e-6, 1.0), OWNER, mask, 0.5, 2.0).tolist() == [True] * 3


def test_sequence_losses_take_one_weight_for_a_completion():
    log_w = log(2.0, 8.0, 3.0)
    near(importance(log_w, OWNER, MASK, "grpo"), 2, 8, 3)
    near(importance(log_w, OWNER, MASK, "gspo"), 4, 4, 3)
    near(importance(log_w, OWNER, MASK, "rloo"), 16, 16, 3)


def test_correction_follows_the_spec():
    w = torch.tensor([0.2, 1.5, 9.0])
    near(corrected(w, replace(PLAIN, correction="none")), 1, 1, 1)
    near(corrected(w, replace(PLAIN, correction="tis", tis_cap=2.0)), 0.2, 1.5, 2)
    near(corrected(w, replace(PLAIN, correction="icepop", icepop=(0.5, 5.0))), 0, 1.5, 0)


def test_clipped_surrogate_takes_the_pessimistic_side():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    near(clipped_surrogate(ratio, advantages, torch.full((4,), 2.0), 0.8, 1.3), -2.6, -1.0, 3.0, 1.6)


def test_gspo_ratio_has_the_sequence_value_and_each_tokens_own_gradient():
    log_r = log(1.0, 4.0, 3.0).requires_grad_()
    ratio = gspo_ratio(log_r, OWNER, MASK)
    near(ratio.detach(), 2, 2, 3)
    ratio[0].backward()
    near(log_r.grad, 2, 0, 0)


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    pi = torch.tensor([-1.0, -2.0]).requires_grad_()
    loss = cispo(pi, torch.tensor([3.0, 0.1]), torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0]), 0.8, 1.2)
    near(loss.detach(), 0.6, -1.6)
    loss.sum().backward()
    near(pi.grad, -0.6, 0.8)


def test_reinforce_is_the_weighted_log_probability():
    near(reinforce(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.5])), 3, -1)


def test_kl_estimators():
    pi, reference = torch.tensor([0.0, 0.0]), log(2.0, 0.5)
    near(kl_estimate(pi, reference, "k1"), -math.log(2), math.log(2))
    near(kl_estimate(pi, reference, "k2"), math.log(2) ** 2 / 2, math.log(2) ** 2 / 2)
    near(kl_estimate(pi, reference, "k3"), 2 - math.log(2) - 1, 0.5 + math.log(2) - 1)
    with pytest.raises(ValueError, match="none of k1"):
        kl_estimate(pi, reference, "k4")


def test_completion_mean_of_one_without_tokens_is_zero():
    near(completion_mean(torch.tensor([1.0, 3.0, 9.0]), OWNER, torch.tensor([True, True, False])), 2, 0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("grpo", [1 / 4, 1 / 4, 1 / 2]),
        ("gspo", [1 / 4, 1 / 4, 1 / 2]),
        ("dr_grpo", [1 / 20, 1 / 20, 1 / 20]),
        ("dapo", [1 / 3, 1 / 3, 1 / 3]),
        ("cispo", [1 / 3, 1 / 3, 1 / 3]),
        ("rloo", [1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_each_loss_weighs_tokens_its_own_way(loss, expected):
    near(token_weights(OWNER, MASK, replace(PLAIN, loss=loss, max_tokens=10), TOTALS), *expected)


def test_totals_count_what_takes_part():
    assert Totals.count(OWNER, torch.tensor([True, False, False])) == Totals(1, 1)
    assert Totals(1, 2) + Totals(3, 4) == Totals(4, 6)


def test_entropy_threshold_is_reached_by_the_top_share():
    entropies = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7])
    assert top_entropy(entropies, entropy_threshold(entropies, 0.2)).tolist() == [False, True, False, False, False]
    assert top_entropy(entropies, entropy_threshold(entropies, 0.3)).sum() == 2  # ceil(1.5)
    assert entropy_threshold(entropies, 1.0) == entropy_threshold(entropies[:0], 0.2) == -math.inf


def test_rounding_does_not_decide_which_of_equal_tokens_learn():
    entropies = torch.tensor([0.1, 0.9, 0.9 - 6e-7, 0.3, 0.7])
    assert top_entropy(entropies, entropy_threshold(entropies, 0.2)).tolist() == [False, True, True, False, False]


# The whole loss.


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # r = 1.1, 1.5, 0.5 and clip [0.8, 1.2] make the surrogates -1.1, -1.2 and 2 * 0.8.
        ("grpo", (-(1.1 + 1.2) / 2 + 1.6) / 2),
        ("dr_grpo", (-1.1 - 1.2 + 1.6) / (2 * 10)),
        ("dapo", (-1.1 - 1.2 + 1.6) / 3),
        # s = sqrt(1.1 * 1.5) = 1.2845 is clipped to 1.2.
        ("gspo", (-1.2 + 1.6) / 2),
        # -clip(r) * A * log pi, with log pi = log(0.11), log(0.3), log(0.05).
        ("cispo", (-1.1 * math.log(0.11) - 1.2 * math.log(0.3) + 2 * 0.8 * math.log(0.05)) / 3),
        ("rloo", (-math.log(0.11) - math.log(0.3) + 2 * math.log(0.05)) / 2),
    ],
)
def test_loss_of_a_hand_computed_batch(loss, expected):
    pi, prox = log(0.11, 0.3, 0.05), log(0.1, 0.2, 0.1)
    spec = replace(PLAIN, loss=loss, max_tokens=10)
    found = policy_loss(pi, prox, prox, ADVANTAGES, OWNER, MASK, spec, TOTALS)
    near(found.total, expected)
    near(found.policy, expected)
    assert found.kl == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_at_the_start_of_an_update_is_the_policy_gradient(loss):
    pi = log(0.1, 0.2, 0.1).requires_grad_()
    spec = replace(PLAIN, loss=loss, max_tokens=10)
    policy_loss(pi, pi.detach(), pi.detach(), ADVANTAGES, OWNER, MASK, spec, TOTALS).total.backward()
    torch.testing.assert_close(pi.grad, -ADVANTAGES * token_weights(OWNER, MASK, spec, TOTALS))


def test_decoupled_loss_weighs_by_the_truncated_ratio_of_proximal_to_behaviour():
    prox, mu = log(0.1, 0.2, 0.1), log(0.2, 0.2, 0.01)  # w = 0.5, 1, 10 -> 2
    spec = replace(PLAIN, loss="dapo", correction="tis", tis_cap=2.0)
    near(policy_loss(prox, prox, mu, ADVANTAGES, OWNER, MASK, spec, TOTALS).total, (-0.5 - 1 + 2 * 2) / 3)


def test_a_completion_that_the_sequence_mask_drops_leaves_policy_term_and_kl_but_not_the_count():
    prox, mu = log(0.1, 0.2, 0.1), log(0.1, 0.2, 0.01)  # the second completion has w = 10
    spec = replace(PLAIN, loss="dapo", sequence_mask=(0.5, 2.0), kl=1.0, kl_estimator="k2")
    reference = prox + torch.tensor([0.0, 1.0, 1.0])
    found = policy_loss(prox, prox, mu, ADVANTAGES, OWNER, MASK, spec, TOTALS, reference=reference)
    near(found.policy, -2 / 3)
    near(found.kl, 0.5 / 3)
    near(found.total, -2 / 3 + 0.5 / 3)


def test_entropy_mask_acts_on_the_policy_term_before_kl_is_added():
    prox = log(0.1, 0.2, 0.1)
    spec = replace(PLAIN, loss="dapo", kl=0.1, kl_estimator="k2")
    carries = torch.tensor([True, False, False])
    found = policy_loss(prox, prox, prox, ADVANTAGES, OWNER, MASK, spec, TOTALS, carries=carries, reference=prox + 1)
    near(found.policy, -1 / 3)
    near(found.kl, 0.5)
    near(found.total, -1 / 3 + 0.05)


def test_clipped_counts_tokens_whose_gradient_the_clip_took():
    prox, pi = log(0.1, 0.1, 0.1), log(0.13, 0.05, 0.05)  # A > 0 above, A > 0 below, A < 0 below
    near(policy_loss(pi, prox, prox, ADVANTAGES, OWNER, MASK, PLAIN, TOTALS).clipped, 2 / 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_stands_outside_the_mask_reaches_neither_loss_nor_gradient(loss):
    mask = torch.tensor([True, True, False])
    spec = replace(LossSpec(), loss=loss, max_tokens=10, kl=0.1)
    totals = Totals.count(OWNER, mask)
    pi = log(0.1, 0.2, 0.1).requires_grad_()
    mu = torch.tensor([-2.0, -2.0, math.nan])
    found = policy_loss(pi, pi.detach(), mu, ADVANTAGES, OWNER, mask, spec, totals, reference=pi.detach() + 0.1)
    found.total.backward()
    alone = log(0.1, 0.2).requires_grad_()
    cut = (alone.detach(), mu[:2], ADVANTAGES[:2], OWNER[:2], mask[:2], spec, totals)
    expected = policy_loss(alone, *cut, reference=alone.detach() + 0.1)
    expected.total.backward()
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(pi.grad, torch.cat([alone.grad, torch.zeros(1)]))


@pytest.mark.parametrize("correction", ["none", "tis", "icepop"])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_cut_into_micro_batches_gives_the_loss_and_gradient_of_the_whole(loss, correction):
    rng = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 0, 5, 1, 2, 4, 7, 2])
    owner = torch.arange(8).repeat_interleave(lengths)
    tokens = len(owner)
    prox = -torch.rand(tokens, generator=rng) * 3
    mu = prox + 0.8 * torch.randn(tokens, generator=rng)
    start = prox + 0.3 * torch.randn(tokens, generator=rng)
    reference = prox + 0.3 * torch.randn(tokens, generator=rng)
    advantages = torch.randn(8, generator=rng)[owner]
    mask = owner != 4
    entropies = torch.rand(tokens, generator=rng)
    carries = top_entropy(entropies, entropy_threshold(entropies[mask], 0.5))
    spec = LossSpec(loss=loss, correction=correction, kl=0.1, max_tokens=9)
    totals = Totals.count(owner, mask)
    assert totals == Totals(22, 6)

    def run(cuts: list[list[int]]) -> tuple[float, torch.Tensor]:
        pi = start.clone().requires_grad_()
        whole = 0.0
        for completions in cuts:
            at = torch.isin(owner, torch.tensor(completions))
            local = torch.searchsorted(torch.tensor(completions), owner[at])
            share = policy_loss(
                *(pi[at], prox[at], mu[at], advantages[at], local, mask[at], spec, totals),
                carries=carries[at],
                reference=reference[at],
            )
            share.total.backward()
            whole += share.total.item()
        return whole, pi.grad

    loss_whole, gradient_whole = run([list(range(8))])
    assert gradient_whole.abs().sum() > 0
    for cuts in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[0, 7], [2], [1], [3, 4, 5], [6]]):
        loss_cut, gradient_cut = run(cuts)
        assert loss_cut == pytest.approx(loss_whole, abs=1e-6)
        torch.testing.assert_close(gradient_cut, gradient_whole, atol=1e-7, rtol=1e-5)


def test_a_micro_batch_without_tokens_has_a_share_of_zero_and_can_go_backward():
    pi = torch.zeros(0, requires_grad=True)
    empty = (torch.zeros(0), torch.zeros(0), torch.zeros(0), OWNER[:0], MASK[:0], LossSpec(), TOTALS)
    found = policy_loss(pi, *empty)
    found.total.backward()
    assert found.total == 0


def test_spec_takes_its_values_from_the_config():
    spec = LossSpec.from_config(RLConfig(loss="rloo", clip_high=0.28, kl=0.01), max_tokens=48)
    assert (spec.loss, spec.clip_high, spec.kl, spec.max_tokens) == ("rloo", 0.28, 0.01, 48)
    assert spec.advantage == "rloo"
    assert [replace(spec, loss=loss).advantage for loss in ("grpo", "dapo", "dr_grpo")] == ["grpo", "grpo", "dr_grpo"]


# What to watch.


def test_ratio_stats_of_a_hand_computed_step():
    mu = torch.zeros(4)
    prox = log(0.5, 1.0, 4.0, 4.0)
    owner = torch.tensor([0, 0, 1, 1])
    current = torch.tensor([True, True, True, False])
    stats = ratio_stats(prox, mu, owner, torch.ones(4, dtype=torch.bool), LossSpec(), current)
    assert stats == pytest.approx(
        {
            "mean": 9.5 / 4,
            "min": 0.5,
            "max": 4.0,
            "p99": 4.0,
            "ess": 9.5**2 / (4 * 33.25),
            "clipped": 0.5,
            "masked": 0.5,
            "stale_tokens": 0.25,
            "stale_mean": math.log(4),
            "stale_max": math.log(4),
        },
        rel=1e-5,
    )


def test_ratio_stats_on_policy_and_of_nothing():
    prox = log(0.1, 0.2, 0.1)
    stats = ratio_stats(prox, prox, OWNER, MASK, LossSpec(), MASK)
    assert (stats["mean"], stats["ess"], stats["clipped"], stats["masked"], stats["stale_mean"]) == (1, 1, 0, 0, 0)
    assert set(ratio_stats(prox, prox, OWNER, ~MASK, LossSpec()).values()) == {0.0}


def test_engine_mismatch_is_measured_on_tokens_of_the_current_version_alone():
    prox, mu = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.1, -0.7, -5.0])
    current = torch.tensor([True, True, False])
    assert engine_mismatch(prox, mu, MASK, current) == pytest.approx({"mean": 0.2, "max": 0.3}, rel=1e-5)
    assert engine_mismatch(prox, mu, MASK, ~MASK) == {"mean": 0.0, "max": 0.0}
