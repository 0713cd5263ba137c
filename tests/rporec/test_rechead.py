"""The RecHead reads the text, knows cold items by it, and comes back from disk as it went."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_experts import dataset

from rporec.config import ConfigError, HeadConfig
from rporec.data import Catalog
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.models.text_encoder import TextEncoder, Vocabulary

KINDS = list(product(("paper", "residual"), ("text", "sequence")))


def catalog(count: int = 12, extra: int = 0) -> Catalog:
    names = [f"name{n} genre{n % 3}" for n in range(count + extra)]
    return Catalog(pa.table({"item_id": [f"i{n}" for n in range(count + extra)], "title": names}))


def config(fusion: str = "residual", history: str = "sequence", **more: object) -> HeadConfig:
    return HeadConfig(fusion=fusion, history=history, dim=32, layers=1, heads=2, **more)


def head_of(fusion: str = "residual", history: str = "sequence", **more: object) -> RecHead:
    head = RecHead(catalog(), config(fusion, history, **more), window=4, seed=3)
    head.known[:10] = True
    if fusion == "residual":
        head.text_scale.data.fill_(3.0)
    return head


def inputs(answers: list[str], seen: list[list[int]] | None = None) -> HeadInputs:
    seen = seen or [[0, 1, 2]] * len(answers)
    return HeadInputs(
        [np.array(items, np.int32) for items in seen],
        np.zeros(len(answers), np.int64),
        ["read a book"] * len(answers),
        answers,
        np.ones(len(answers), np.float32),
    )


# -- inputs ---------------------------------------------------------------------------------------


def test_shuffled_moves_every_text_to_another_user_and_no_history() -> None:
    users = np.repeat(np.arange(6), [1, 5, 2, 4, 1, 7])
    before = inputs([f"{user} wrote {n}" for n, user in enumerate(users)], [[n] for n in range(20)])
    after = before.shuffled(users, np.random.default_rng(0))
    assert sorted(after.answer) == sorted(before.answer)
    assert all(text.split()[0] != str(user) for text, user in zip(after.answer, users, strict=True))
    assert [int(s[0]) for s in after.seen] == list(range(20))


def test_blank_keeps_histories_only() -> None:
    blank = inputs(["x", "y"]).blank()
    assert blank.answer == blank.cot == ["", ""]
    assert not blank.format.any()
    assert len(HeadInputs.concatenate([blank, blank.take([1])])) == 3


def test_fields_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        replace(inputs(["x"]), cot=[])


# -- text encoder ---------------------------------------------------------------------------------


def test_words_are_lower_cased_and_unseen_ones_hashed_stably() -> None:
    vocabulary = Vocabulary.fit(["Red Fox", "red whale"], extra=["maybe red"])
    encoded = vocabulary.encode(["RED fox!", "", "unheard", "unheard maybe"])
    texts = np.split(encoded.ids, encoded.offsets[1:-1])
    assert [vocabulary.words[i] for i in texts[0]] == ["red", "fox"]
    assert len(texts[1]) == 0
    assert texts[2][0] == texts[3][0] >= len(vocabulary.words)
    assert vocabulary.words[texts[3][1]] == "maybe"


def test_dot_product_starts_as_text_similarity_and_empty_text_is_zero() -> None:
    vocabulary = Vocabulary.fit(["red fox jumps", "blue whale dives", "grey wolf howls"])
    torch.manual_seed(0)
    encoder = TextEncoder(vocabulary, 256)
    encoded = vocabulary.encode(["red fox jumps", "jumps fox red", "red fox", "blue whale dives", ""])
    with torch.no_grad():
        vectors = encoder(torch.from_numpy(encoded.ids), torch.from_numpy(encoded.offsets))
    similarity = vectors @ vectors.T
    assert torch.allclose(similarity[0, 1], similarity[0, 0])
    assert similarity[0, 0] > similarity[0, 2] > similarity[0, 3] + 0.3
    assert not vectors[4].any()


def test_ragged_take_reorders_and_repeats() -> None:
    encoded = Vocabulary.fit(["a b c d"]).encode(["a b", "", "c d a"])
    taken = encoded.take(np.array([2, 1, 0, 2]))
    parts = np.split(taken.ids, taken.offsets[1:-1])
    assert [len(part) for part in parts] == [3, 0, 2, 3]
    assert np.array_equal(parts[0], parts[3])


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_scores_are_deterministic_and_rows_independent(fusion: str, history: str) -> None:
    head = head_of(fusion, history)
    asked = inputs(["name3", "", "name5 genre2"], [[0], [], [1, 2, 3, 4, 5, 6, 7]])
    scores = head.train().scores(asked)
    assert scores.shape == (3, 12)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert torch.equal(scores, head.scores(asked))
    for row in range(3):
        assert torch.allclose(head.scores(asked.take([row]))[0], scores[row], atol=1e-5)


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_rows_that_share_a_history_score_as_they_do_alone(fusion: str, history: str) -> None:
    head = head_of(fusion, history)
    seen = [[1, 2], [0], [1, 2], [2, 1], [], [1, 2], [0, 0], [0]]  # 0 is also what pads
    asked = inputs([f"name{row}" for row in range(8)], seen)
    alone = torch.cat([head.scores(asked.take([row])) for row in range(8)])
    assert torch.allclose(head.scores(asked), alone, atol=1e-5)
    assert torch.allclose(head.freeze().scores(asked), alone, atol=1e-5)
    assert head.scores(asked.take([])).shape == (0, 12)


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_an_answer_names_an_item_that_training_never_showed(fusion: str, history: str) -> None:
    scores = head_of(fusion, history).scores(inputs(["name11 genre2"]))
    assert scores[0].argmax() == 11


def test_a_failed_format_hides_the_text() -> None:
    written = inputs(["name5", "name5"])
    failed = replace(written, format=np.array([1, 0], np.float32))
    scores = head_of().scores(failed)
    assert torch.allclose(scores[1], head_of().scores(written.blank())[1], atol=1e-6)
    assert not torch.allclose(scores[0], scores[1])


def test_paper_gate_takes_the_history_where_the_format_failed() -> None:
    head = head_of("paper", "text")
    failed = replace(inputs(["name5", "name5"], [[0, 3], [1, 4]]), format=np.zeros(2, np.float32))
    silent = replace(failed, answer=["", "other"])
    assert torch.equal(head.scores(failed), head.scores(silent))
    assert not torch.allclose(*head.scores(failed))


def test_paper_with_text_history_has_no_item_table() -> None:
    assert all(value.shape[0] != 12 for name, value in head_of("paper", "text").named_parameters())


def test_only_the_window_is_read_and_its_order_matters_to_the_sequence_encoder() -> None:
    head = head_of()
    long, cut, turned = [9, 9, 1, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1]
    scores = head.scores(inputs([""] * 3, [long, cut, turned]).blank())
    assert torch.allclose(scores[0], scores[1], atol=1e-6)
    assert not torch.allclose(scores[1], scores[2], atol=1e-4)


def test_components_add_up_to_the_scores() -> None:
    data = dataset()
    head = RecHead(data.catalog, config(), window=4, experts=Experts.fit(data, np.arange(len(data.items))))
    head.text_scale.data.fill_(0.5)
    head.weights = {"history": 0.3, "text": 2.0, "rules": 1.5, "last_item": 0.0}
    asked = inputs(["red fox", "grey wolf"])
    parts = head.components(asked)
    assert set(parts) == {"history", "text", *head.experts.names}
    total = sum(head.weight(name) * part for name, part in parts.items())
    assert np.allclose(head.scores(asked).numpy(), total, atol=1e-5)
    assert head.weight("popularity") == 0
    assert head.weight("text") == 2


# -- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "history"), KINDS)
@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_loss_falls_on_one_batch(fusion: str, history: str, softmax: str) -> None:
    head = head_of(fusion, history, softmax=softmax, negatives=8, dropout=0.0).train()
    batch = head.encode(inputs(["name5", "name6 genre0", "", "name8"], [[0], [1, 2], [], [3, 4, 5]]))
    targets = torch.tensor([5, 6, 7, 8])
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    losses = []
    for step in range(25):
        loss = head(batch, targets, torch.Generator().manual_seed(step % 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


# -- files and catalogue --------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_scores_survive_the_disk(fusion: str, history: str, tmp_path) -> None:
    data = dataset()
    experts = Experts.fit(data, np.arange(len(data.items))) if fusion == "residual" else None
    head = RecHead(data.catalog, config(fusion, history), window=4, seed=1, experts=experts)
    head.known[:4] = True
    head.weights = {"rules": 0.7, "text_knn": 0.2, "popularity": 1.1} if experts else {}
    asked = replace(inputs(["red fox", "never heard of"]), time=np.array([86_400, 10**7]))
    head.save(tmp_path / "head")
    head.save(tmp_path / "head")  # replaces
    assert torch.equal(RecHead.load(tmp_path / "head", data.catalog).scores(asked), head.scores(asked))
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]


def test_load_refuses_another_catalogue_and_an_empty_folder(tmp_path) -> None:
    head_of().save(tmp_path / "head")
    with pytest.raises(ConfigError, match="another catalogue"):
        RecHead.load(tmp_path / "head", catalog(13))
    with pytest.raises(ConfigError, match="no RecHead"):
        RecHead.load(tmp_path, catalog())


def test_items_join_without_retraining() -> None:
    head = head_of()
    head.item_table.data.mul_(10)
    larger = catalog(12, extra=2)
    table = larger.table.take(pa.array([13, *range(13)]))  # a newcomer first: rows move
    wider = head.with_catalog(Catalog(table))
    asked = inputs(["name3", "name13 genre1"])
    moved = replace(asked, seen=[items + 1 for items in asked.seen])
    before, after = head.scores(asked), wider.scores(moved)
    assert torch.allclose(after[:, 1:13], before, atol=1e-5)
    assert after[1].argmax() == 0  # item 13 by its text
    assert not wider.known[0]
    assert not wider.item_table[0].any()


def test_joining_carries_the_experts_along() -> None:
    data = dataset()
    head = RecHead(data.catalog, config(), window=4, experts=Experts.fit(data, np.arange(len(data.items))))
    table = pa.table(
        {"item_id": ["new", *data.catalog.ids], "title": ["red fox three", *map(data.catalog.title, range(6))]}
    )
    wider = head.with_catalog(Catalog(table))
    features = wider.experts.features(inputs([""], [[1]]))
    assert features["rules"][0].argmax() == 2  # item 1 follows item 0, both one row further down
    assert features["text_knn"][0, 0] > 0


def test_a_catalogue_that_lost_items_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks 2 items, such as i10"):
        head_of().with_catalog(catalog(10))


def test_saved_description_is_readable(tmp_path) -> None:
    head_of().save(tmp_path / "head")
    description = json.loads((tmp_path / "head" / "head.json").read_text())
    assert description["config"]["fusion"] == "residual"
    assert description["items"] == 12
