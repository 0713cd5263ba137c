"""Identities: one text for each item, titles or semantic IDs, as the tokens that a trie is made of."""

import numpy as np
import pyarrow as pa
import pytest

from rporec.config import Config, ConfigError, TextConfig, TinyConfig
from rporec.data import Catalog
from rporec.engine.trie import Trie
from rporec.models.backbone import bring_backbone, load_model, load_tokenizer, make_tiny
from rporec.models.semantic_ids import code_tokens, item_vectors, residual_codes, semantic_ids
from rporec.text.identities import IdentityPrompts, distinct_titles, identity_tokens, tokenizer_texts
from rporec.text.prompt import ItemWriter
from rporec.text.tokenizer import fit_tokenizer

TITLES = ["Kor", "Zarnak", "Kor", "Kor (2)", None, "Kor", "Zarnak <answer>"]
CATALOG = Catalog(pa.table({"item_id": [f"i{n}" for n in range(7)], "title": TITLES, "genre": list("aabbcab")}))
SHAPE = TinyConfig(hidden=32, layers=1, heads=1, kv_heads=1, intermediate=64, vocabulary=400, context=64)


def test_items_that_share_a_title_are_numbered_past_those_that_have_such_a_name():
    titles = distinct_titles(ItemWriter(CATALOG, TextConfig()))
    assert titles == ["Kor", "Zarnak", "Kor (3)", "Kor (2)", "i4", "Kor (4)", "Zarnak (answer)"]


def test_items_of_like_text_share_codes_from_the_left_and_equal_ones_are_told_apart():
    words = [f"{genre} {genre} {genre} series{n // 2}" for genre in ("war", "love", "space") for n in range(6)]
    texts = [*words, words[0], words[0]]
    codes = residual_codes(item_vectors(texts, seed=0), levels=3, codes=3, seed=0)
    assert codes.shape == (20, 3)
    assert len({tuple(codes[first : first + 6, 0]) for first in (0, 6, 12)}) == 3
    for first in (0, 6, 12):
        assert len(set(codes[first : first + 6, 0])) == 1  # a genre has one first code
    ids = semantic_ids(codes)
    assert len(set(ids)) == 20
    shared = [ids[at] for at in (0, 1, 18, 19)]  # items 0 and 1 have the same words
    prefix = shared[0].rpartition("<")[0]
    assert shared == [f"{prefix}<d_{number}>" for number in range(4)]
    assert (residual_codes(item_vectors(texts, seed=0), 3, 3, seed=0) == codes).all()


def test_the_means_of_a_level_explain_what_the_levels_before_left():
    vectors = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    codes, left = residual_codes(vectors, levels=4, codes=8, seed=0), vectors
    for level in range(4):
        means = np.stack([left[codes[:, level] == code].mean(axis=0) for code in range(8)])
        nearest = ((left[:, None] - means) ** 2).sum(-1).argmin(1)
        assert (nearest == codes[:, level]).mean() > 0.97  # k-means stops a little before its fixed point
        left, before = left - means[codes[:, level]], left
        assert (left**2).sum() < (before**2).sum()


def test_a_code_is_one_token_of_a_tiny_backbone_and_of_one_that_lacked_it(tmp_path):
    ids = semantic_ids(np.array([[0, 10], [1, 2], [0, 10], [1, 3]]))
    tokens = code_tokens(ids)
    assert tokens == ["<a_0>", "<a_1>", "<b_2>", "<b_3>", "<b_10>", "<c_0>", "<c_1>"]
    make_tiny(tokenizer_texts([]), SHAPE, 0, tmp_path / "tiny", tokens)
    make_tiny(["other words"], SHAPE, 0, tmp_path / "other")
    bring_backbone(str(tmp_path / "other"), tmp_path / "grown", tokens)
    for folder, tiny in ((tmp_path / "tiny", True), (tmp_path / "grown", False)):
        tokenizer, model = load_tokenizer(folder), load_model(folder)
        rows = identity_tokens(ids, tokenizer, tiny)
        assert [len(row) for row in rows] == [4 + tiny, 3 + tiny, 4 + tiny, 3 + tiny]  # a blank before, eos behind
        assert [tokenizer.decode(row[:-1]).strip() for row in rows] == ids
        assert max(map(max, rows)) < model.get_input_embeddings().num_embeddings
        Trie(rows)
    bring_backbone(str(tmp_path / "other"), tmp_path / "same")
    assert (tmp_path / "same").is_symlink()


def test_identities_that_a_tokenizer_cannot_tell_apart_are_refused():
    class Folding:
        eos_token_id = 0

        def encode(self, text, add_special_tokens):
            return [ord(character) for character in text.lower()]

    with pytest.raises(ConfigError, match="'Kor' and 'kor' alike"):
        identity_tokens(["Kor", "kor"], Folding(), tiny=False)


def test_a_history_is_written_in_identities_alone():
    identities = distinct_titles(ItemWriter(CATALOG, TextConfig()))
    tokenizer = fit_tokenizer(tokenizer_texts(identities), 400)
    prompts = IdentityPrompts(CATALOG, Config(), identities, tokenizer, 64, 16)
    assert tokenizer.decode(prompts.prompt_ids([2, 1, 4])) == " | Kor (3) | Zarnak | i4 =>"
    large = IdentityPrompts(CATALOG, Config(backbone="x", reward={"faithfulness": 0}), identities, tokenizer, 512, 16)
    text = tokenizer.decode(large.prompt_ids([2, 1]))
    assert text.endswith("1. Kor (3)\n2. Zarnak\n")
    assert "<think>" not in text
