"""Every term of the reward against numbers worked out by hand, and the ways in which it may fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rporec.config import ConfigError, RewardConfig
from rporec.rl.rewards import (
    conciseness,
    entropy_terms,
    faithfulness,
    finish,
    gaming,
    is_flat,
    load_custom,
    outside,
    parse_summary,
    sampled_candidates,
    score,
    summary_prompt,
    weights_for,
)
from rporec.text.completion import Completion, parse

PLAIN = RewardConfig(conciseness=0.0, faithfulness=0.0)


def written(cot: str = "because", answer: str = "B", pre: str = "", post: str = "") -> Completion:
    return parse(f"{pre}<think>{cot}</think><answer>{answer}</answer>{post}")


def by_letter(texts: list[str]) -> np.ndarray:
    """An encoder to compute by hand: how many a, b and c a text holds."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float64)


def test_outside_counts_characters_before_and_after_and_never_goes_below_zero():
    rows = [written(), written(pre="x" * 10, post="y" * 15), written(post="y" * 100), written(pre="x" * 300)]
    assert outside(rows).tolist() == [1.0, 0.75, 0.0, 0.0]


def test_conciseness_is_the_share_that_the_summary_keeps():
    rows = [written("x" * 20), written("x" * 20), written("xx"), written(""), written(" \n ")]
    assert conciseness(rows, ["y" * 5, "", "y" * 9, "y", "y"]).tolist() == [0.25, 0.0, 1.0, 0.0, 0.0]


def test_faithfulness_is_a_cosine_above_one_half_and_nothing_for_blank_texts():
    rows = [written("aa"), written("aab"), written("a"), written("a"), written(""), written("a"), written("zz")]
    summaries = ["a", "ba", "b", "ab" + "c" * 2, "a", " ", "a"]
    # cosines: 1, 3/sqrt(10), 0, 1/sqrt(6) = .41; two blanks; a zero vector
    assert faithfulness(rows, summaries, by_letter).tolist() == [1, 1, 0, 0, 0, 0, 0]
    half = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    half.flags.writeable = False  # what an encoder returns may be shared
    exactly_half = faithfulness([written("a")], ["b"], lambda _: half)
    assert exactly_half.tolist() == [0.0]


def test_faithfulness_asks_the_encoder_once_and_not_for_blank_texts():
    calls: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        return by_letter(texts)

    faithfulness([written("a"), written(""), written("b")], ["a", "a", "b"], embed)
    assert calls == [["a", "b", "a", "b"]]
    faithfulness([written("")], [""], embed)
    assert len(calls) == 1


def test_the_sum_without_entropy_by_hand():
    scores = np.array([[0.9, 0.1, 0.5, 0.3], [0.9, 0.1, 0.5, 0.3], [0.9, 0.1, 0.5, 0.3]], np.float32)
    rows = [written(cot="abca", pre="x" * 50), written(cot="aaaa"), parse("no tags")]
    weights = RewardConfig(format=0.1, outside=0.2, ndcg=0.5, conciseness=0.3, faithfulness=0.4)
    result = score(scores, np.array([3, 0, 0]), None, rows, weights, summaries=["ab", "bbb", ""], embed=by_letter)
    assert result.rank.tolist() == [3.0, 1.0, 1.0]
    assert result.parts["ndcg"].tolist() == [0.5, 1.0, 1.0]
    assert result.parts["format"].tolist() == [1, 1, 0]
    assert result.parts["outside"].tolist() == [0.5, 1.0, 1.0]
    assert result.parts["conciseness"].tolist() == [0.5, 0.75, 0.0]
    assert result.parts["faithfulness"].tolist() == [1.0, 0.0, 0.0]  # cosine 3 / sqrt(2 * 6) = .87
    expected = [0.1 + 0.2 * 0.5 + 0.5 * 0.5 + 0.3 * 0.5 + 0.4, 0.1 + 0.2 + 0.5 + 0.3 * 0.75, 0.0]
    np.testing.assert_allclose(result.reward_without_entropy, expected, rtol=1e-6)
    assert not result.masked.any()
    assert all(part.dtype == np.float32 for part in result.parts.values())


def test_a_malformed_completion_is_worth_nothing_however_well_it_ranks():
    result = score(np.array([[1.0, 0.0]]), np.array([0]), None, [parse("<think>a</think>")], PLAIN)
    assert result.rank.tolist() == [1.0]
    assert result.reward_without_entropy.tolist() == [0.0]
    assert not result.masked.any()


def test_history_leaves_the_ranking_only_where_it_is_given():
    scores = np.array([[0.9, 0.8, 0.1]])
    assert score(scores, np.array([2]), None, [written()], PLAIN).rank.tolist() == [3.0]
    assert score(scores, np.array([2]), [np.array([0, 1, 2])], [written()], PLAIN).rank.tolist() == [1.0]


def test_what_could_not_be_scored_is_masked_and_costs_its_neighbours_nothing():
    scores = np.array([[1.0, 0.0], [1.0, np.nan], [1.0, 0.0], [1.0, 0.0]])
    weights = RewardConfig(faithfulness=0.0)
    result = score(
        scores,
        np.zeros(4, int),
        [np.array([1])] * 4,
        [written()] * 4,
        weights,
        summaries=["because", "because", None, "because"],
        custom=lambda completions, targets, rank: [0.0, 0.0, 0.0, math.nan],
    )
    assert result.masked.tolist() == [False, True, True, True]
    assert result.reward_without_entropy[0] == pytest.approx(0.1 + 0.1 + 0.5 + 0.1)
    assert np.isfinite(result.reward_without_entropy).all()


def test_terms_with_weight_are_refused_without_what_they_need():
    scores, target, rows = np.array([[1.0, 0.0]]), np.array([0]), [written()]
    with pytest.raises(ConfigError, match=r"reward\.embedder"):
        score(scores, target, None, rows, RewardConfig(), summaries=["a"])
    with pytest.raises(ConfigError, match="summaries"):
        score(scores, target, None, rows, RewardConfig(faithfulness=0.0))


def test_a_tiny_model_gets_nothing_for_summaries():
    weights = weights_for(RewardConfig(), tiny=True)
    assert (weights.conciseness, weights.faithfulness, weights.ndcg) == (0.0, 0.0, 0.5)
    assert weights_for(RewardConfig(), tiny=False) == RewardConfig()


def test_sampled_candidates_depend_on_seed_and_sample_alone():
    targets, samples = np.array([5, 5, 0, 9]), np.array([11, 11, 12, 13])
    rows = sampled_candidates(targets, samples, items=10, negatives=4, seed=3)
    assert rows.shape == (4, 5)
    assert rows[:, 0].tolist() == targets.tolist()
    assert all(len(set(row)) == 5 and set(row) <= set(range(10)) for row in rows.tolist())
    assert rows[0].tolist() == rows[1].tolist()  # one group, one set of candidates
    alone = sampled_candidates(targets[2:3], samples[2:3], items=10, negatives=4, seed=3)
    assert alone[0].tolist() == rows[2].tolist()  # whatever else is in the batch
    assert sampled_candidates(targets, samples, 10, negatives=4, seed=4).tolist() != rows.tolist()
    everything = sampled_candidates(targets, samples, 10, negatives=49, seed=3)
    assert [sorted(row) for row in everything.tolist()] == [list(range(10))] * 4


def test_sampled_candidates_are_drawn_evenly_from_all_but_the_target():
    rows = sampled_candidates(np.full(3000, 2), np.arange(3000), items=5, negatives=2, seed=0)
    counts = np.bincount(rows[:, 1:].ravel(), minlength=5)
    assert counts[2] == 0
    assert np.abs(counts[[0, 1, 3, 4]] - 1500).max() < 150


def test_rank_among_candidates_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]])
    candidates = np.array([[4, 0, 2]])
    result = score(scores, np.array([4]), None, [written()], PLAIN, candidates=candidates)
    assert result.rank.tolist() == [3.0]
    result = score(scores, np.array([4]), [np.array([0, 1, 4])], [written()], PLAIN, candidates=candidates)
    assert result.rank.tolist() == [2.0]
    with pytest.raises(ValueError, match="must be its target"):
        score(scores, np.array([3]), None, [written()], PLAIN, candidates=candidates)


@pytest.mark.parametrize(
    ("entropies", "term"),
    [
        ([], 0.0),
        ([2.0], 0.0),
        ([0.0, 1.0, 0.0, 3.0], 3.0 - 1.0),  # top ceil(0.8) = 1
        ([4.0, 2.0, 0.0, 0.0, 0.0, 0.0], 3.0 - 1.0),  # top ceil(1.2) = 2
        ([9.0, 6.0, 3.0, *[0.0] * 12], 6.0 - 1.2),  # top 3, although 0.2 * 15 > 3 in floats
    ],
)
def test_entropy_terms_by_hand(entropies, term):
    size = len(entropies)
    tokens = torch.tensor(entropies), torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
    assert entropy_terms(*tokens, torch.ones(1)).item() == pytest.approx(term)


def entropy_term(entropies: np.ndarray) -> float:
    """Of one completion, straight from the definition."""
    top = np.sort(entropies)[::-1][: math.ceil(len(entropies) / 5)]
    return top.mean() - entropies.mean() if len(entropies) else 0.0


def test_entropy_terms_of_a_batch_equal_those_of_each_completion():
    rng = np.random.default_rng(0)
    lengths = [7, 0, 15, 1, 40]
    owner = np.repeat(np.arange(5), lengths)
    order = rng.permutation(len(owner))  # tokens may come in any order
    owner, entropies = owner[order], rng.exponential(size=len(owner)).astype(np.float32)
    in_cot = rng.random(len(owner)) < 0.7
    form = torch.tensor([1, 1, 1, 1, 0])
    terms = entropy_terms(torch.tensor(entropies), torch.tensor(owner), torch.tensor(in_cot), form)
    expected = [entropy_term(entropies[(owner == row) & in_cot]) for row in range(4)] + [0.0]
    assert terms.dtype == torch.float32
    np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-5, atol=1e-7)
    nothing = entropy_terms(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), form)
    assert nothing.tolist() == [0.0] * 5


def test_the_learner_finishes_the_sum():
    whole = finish(
        torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]), RewardConfig(entropy=0.25)
    )
    assert whole.tolist() == [1.0, 0.0]


def test_a_summary_ends_at_its_tag_and_its_prompt_opens_it():
    assert summary_prompt("I like tea").endswith("<answer>")
    assert "I like tea" in summary_prompt("I like tea")
    assert parse_summary(" likes tea </answer> and more </answer>") == "likes tea"
    assert parse_summary("cut off") == "cut off"


def test_own_rewards_are_added_inside_the_gate():
    def custom(completions, targets, rank):
        return np.array([0.5, 0.5]) + targets + rank

    scores = np.array([[1.0, 0.0], [1.0, 0.0]])
    result = score(scores, np.array([0, 1]), None, [written(), parse("bad")], PLAIN, custom=custom)
    assert result.parts["custom"].tolist() == [1.5, 3.5]
    assert result.reward_without_entropy.tolist() == pytest.approx([0.7 + 1.5, 0.0])
    with pytest.raises(ConfigError, match="shape"):
        score(scores, np.array([0, 1]), None, [written()] * 2, PLAIN, custom=lambda *_: np.zeros(3))


def test_own_rewards_are_found_or_refused_with_a_clear_line(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("bonus = 3\ndef short(completions, targets, rank):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_custom("my_rewards:short")([], [], []) == [1.0]
    for spec, message in {
        "no_such_module_here:f": "cannot import",
        "my_rewards:gone": "no function 'gone'",
        "my_rewards:bonus": "no function 'bonus'",
        "my_rewards": "is not module:function",
        ":short": "is not module:function",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_custom(spec)


def test_gaming_sees_answers_that_repeat_the_history_and_collapse():
    titles = ["Dune", "Solaris", "Ubik ; 1969"]
    seen = [np.array([0, 1]), np.array([0]), np.array([2]), np.array([0]), np.array([1])]
    answers = [" dune  ; scifi ; Herbert", "Solaris", "UBIK", "", "Solaris"]
    signs = gaming(answers, seen, titles.__getitem__)
    assert signs == {"seen_answers": 3 / 5, "distinct_answers": 3.0}
    assert gaming([], [], titles.__getitem__)["seen_answers"] == 0.0


def test_a_group_is_flat_when_no_two_of_its_scored_rewards_differ():
    assert not is_flat(np.array([0.1, 0.2]))
    assert all(is_flat(np.array(rewards)) for rewards in ([0.5, 0.5 + 1e-8], [0.3, np.nan], [np.nan], []))
