"""Text neighbours are TF-IDF cosines, and newcomers join without moving anything that was there."""

from __future__ import annotations

from collections import Counter

import numpy as np

from rporec.models.text_neighbours import TextVectors

TEXTS = ["Red fox", "red fox fox runs", "blue whale", "blue red whale dives", "green frog", "", "grey wolf runs"]
NEW = ["red unheard fox", "unheard", "frog", "nothing alike"]


def cosines(texts: list[str], counted: list[str]) -> np.ndarray:
    """By the definition; rarity counted over `counted`."""
    words = sorted({word for text in texts for word in text.lower().split()})
    having = Counter(word for text in counted for word in set(text.lower().split()))
    idf = np.array([1 + np.log((1 + len(counted)) / (1 + having[word])) for word in words])
    counts = np.array([[text.lower().split().count(word) for word in words] for text in texts])
    vectors = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    result = vectors @ vectors.T
    np.fill_diagonal(result, 0)
    return result


def test_neighbours_are_the_nearest_others_with_their_cosine() -> None:
    expected = cosines(TEXTS, TEXTS)
    assert np.allclose(TextVectors.fit(TEXTS).neighbours().toarray(), expected, atol=1e-6)
    nearest = TextVectors.fit(TEXTS).neighbours(keep=1).toarray()
    assert np.allclose(nearest, np.where(expected == expected.max(axis=1, keepdims=True), expected, 0), atol=1e-6)


def test_newcomers_join_by_words_old_and_new() -> None:
    texts = TextVectors.fit(TEXTS)
    _, joined = texts.join(NEW, texts.neighbours())
    assert np.allclose(joined.toarray(), cosines(TEXTS + NEW, TEXTS), atol=1e-6)


def test_one_by_one_or_all_together_is_the_same() -> None:
    texts = TextVectors.fit(TEXTS)
    _, together = texts.join(NEW, texts.neighbours())
    neighbours = texts.neighbours()
    for text in NEW:
        texts, neighbours = texts.join([text], neighbours)
    assert np.allclose(together.toarray(), neighbours.toarray(), atol=1e-6)


def test_an_old_item_gains_only_who_is_as_near_as_its_farthest() -> None:
    texts = TextVectors.fit(["red fox", "red fox jumps", "red whale", "red frog"])
    before = texts.neighbours(keep=1)
    _, after = texts.join(["red fox jumps", "red wolf"], before, keep=1)
    assert np.array_equal(after[:4, :4].toarray(), before.toarray())
    assert after[1, 4] > before[1].max()  # nearer than all
    assert after[0, 4] == before[0, 1]  # as near
    assert after[0, 5] == 0 < after[5, :4].max()  # one-sided


def test_texts_without_words_have_no_neighbours() -> None:
    texts = TextVectors.fit(["", "!", ""])
    assert texts.neighbours().nnz == 0
    assert texts.join(["a b", "b"], texts.neighbours())[1].nnz == 2
    assert TextVectors.fit([]).neighbours().shape == (0, 0)
