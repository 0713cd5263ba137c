"""Searches of a trie against brute force, and against a plain beam search over nested dicts."""

import numpy as np
import pytest

from rporec.engine.trie import Found, Trie, beam_search, load_trie, sample_items, write_sequences

END = 0


def catalogue(rng, items=60, letters=4, longest=5):
    """Distinct words over few letters, so that they share beginnings; END closes each."""
    words: set[tuple[int, ...]] = set()
    while len(words) < items:
        words.add(tuple(rng.integers(1, letters + 1, rng.integers(1, longest + 1)).tolist()))
    return [[*word, END] for word in rng.permutation(np.array(sorted(words), object)).tolist()]


def model(path, vocabulary=6, seed=0):
    """A language model: float32 [vocabulary] log-probabilities behind a path."""
    logits = np.random.default_rng([seed, *map(int, path)]).normal(size=vocabulary) * 2
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def run(search, asked=None) -> list[Found]:
    try:
        questions = next(search)
        while True:
            if asked is not None:
                asked.append(questions)
            questions = search.send([model(question.path)[question.tokens] for question in questions])
    except StopIteration as ended:
        return ended.value


def logprobs_of(sequence):
    return [model(sequence[:at])[token] for at, token in enumerate(sequence)]


def score_of(sequence):
    return float(np.sum(logprobs_of(sequence), dtype=np.float64))


def plain_beam_search(sequences, beams, gone=()):
    """Unfinished sequences compete at each level, finished ones leave for a list of the best."""
    left = {tuple(sequence): item for item, sequence in enumerate(sequences) if item not in gone}
    live, done = [((), 0.0)], []
    while live:
        candidates = []
        for path, score in live:
            tokens = sorted({s[len(path)] for s in left if s[: len(path)] == path})
            candidates += [((*path, token), score + float(model(path)[token])) for token in tokens]
        done += [one for one in candidates if one[0] in left]
        live = sorted((one for one in candidates if one[0] not in left), key=lambda one: -one[1])[:beams]
    return [left[path] for path, _ in sorted(done, key=lambda one: -one[1])[:beams]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("more", [0, 60])
def test_with_beams_enough_for_the_widest_level_it_finds_what_brute_force_finds(seed, more):
    sequences = catalogue(np.random.default_rng(seed))
    widest = max(len({tuple(one[:depth]) for one in sequences if len(one) >= depth}) for depth in range(1, 7))
    assert widest < 60
    found = run(beam_search(Trie(sequences), widest + more))
    best = sorted(range(60), key=lambda item: -score_of(sequences[item]))
    assert [one.item for one in found] == best[: widest + more]
    for one in found:
        assert one.token_ids.tolist() == sequences[one.item]
        assert one.logprobs.tolist() == logprobs_of(sequences[one.item])


@pytest.mark.parametrize("beams", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("seed", range(5))
def test_with_few_beams_it_finds_what_a_plain_beam_search_finds(seed, beams):
    rng = np.random.default_rng(seed)
    sequences, gone = catalogue(rng), set(rng.choice(60, 25, replace=False).tolist())
    for without in (set(), gone):
        found = [one.item for one in run(beam_search(Trie(sequences), beams, without))]
        assert found == plain_beam_search(sequences, beams, without)
        assert len(found) == len(set(found)) == beams
        assert not without & set(found)


def test_questions_stop_once_no_unfinished_sequence_can_come_in():
    """The best item ends at once; what a longer one would score, nobody needs to ask."""
    best = int(model(())[1:5].argmax()) + 1
    sequences = [[best, END], *([other, 1, 1, 1, END] for other in range(1, 6) if other != best)]
    everything, little = [], []
    assert len(run(beam_search(Trie(sequences), 5), everything)) == 5
    run(beam_search(Trie(sequences), 1), little)
    assert len(little) < len(everything) == 5


def test_fewer_items_than_beams_all_come_out_and_none_of_an_empty_rest():
    trie = Trie([[1, END], [2, 1, END]])
    assert {one.item for one in run(beam_search(trie, 10))} == {0, 1}
    assert [one.item for one in run(beam_search(trie, 10, [0]))] == [1]
    assert run(beam_search(trie, 10, [0, 1])) == []
    assert run(sample_items(trie, 3, 0, [1, 0])) == []


def test_draws_have_the_shares_of_the_children_and_follow_from_the_seed():
    sequences = catalogue(np.random.default_rng(1), items=12, letters=2, longest=3)
    trie, gone = Trie(sequences), [0, 5]
    share = {item: 1.0 for item in range(12) if item not in gone}
    for item in share:
        for at in range(len(sequences[item])):
            beside = {sequences[i][at] for i in share if sequences[i][:at] == sequences[item][:at]}
            children = np.exp(model(sequences[item][:at])[sorted(beside)].astype(float))
            share[item] *= np.exp(float(model(sequences[item][:at])[sequences[item][at]])) / children.sum()
    assert sum(share.values()) == pytest.approx(1)
    drawn = run(sample_items(trie, 4_000, 3, gone))
    counts = np.bincount([one.item for one in drawn], minlength=12)
    for item, expected in share.items():  # five standard deviations
        assert abs(counts[item] / 4_000 - expected) < 5 * np.sqrt(expected * (1 - expected) / 4_000)
    assert counts[gone].sum() == 0
    for one in drawn[:50]:
        assert one.logprobs.tolist() == logprobs_of(sequences[one.item])
    again, other = (run(sample_items(trie, 50, seed)) for seed in (7, 8))
    assert [one.item for one in again] == [one.item for one in run(sample_items(trie, 50, 7))]
    assert [one.item for one in again] != [one.item for one in other]


def test_items_that_no_trie_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="item 2 begin with all those of item 0"):
        Trie([[1, 2], [3, 4], [1, 2, 5]])
    with pytest.raises(ValueError, match="begin with"):
        Trie([[1, 2], [1, 2]])
    with pytest.raises(ValueError, match="needs a token"):
        Trie([[1], []])


def test_a_trie_comes_back_from_its_file(tmp_path):
    sequences = catalogue(np.random.default_rng(2))
    write_sequences(tmp_path / "items.parquet", sequences)
    trie = load_trie(str(tmp_path / "items.parquet"))
    assert [one.item for one in run(beam_search(trie, 9))] == plain_beam_search(sequences, 9)
