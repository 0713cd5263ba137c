import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rporec.text.completion import TAGS
from rporec.text.tokenizer import fit_tokenizer, token_pieces

TEXTS = [f" | Zarnak {n} ; fantasy ; Kor Film => last before run {n}" for n in range(1, 30)] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return fit_tokenizer(TEXTS, 600)


def test_frequent_words_and_numbers_are_single_tokens_as_prompts_hold_them(tokenizer):
    for word in (" Zarnak", " 3", " fantasy", " Kor", " ;", " |", " =>", " before"):
        assert len(tokenizer.encode(word)) == 1, word


def test_tags_are_single_tokens_that_decode_and_glue_to_nothing(tokenizer):
    text = "<think> last Zarnak 3 .</think><answer> Kor</answer>"
    ids = tokenizer.encode(text)
    assert [tokenizer.convert_tokens_to_ids(tag) in ids for tag in TAGS] == [True] * 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_vocabulary_is_capped(tokenizer):
    assert len(tokenizer) <= 600
    assert len(fit_tokenizer(TEXTS, 300)) == 300


def test_the_order_of_texts_does_not_matter(tokenizer):
    texts = TEXTS.copy()
    random.Random(0).shuffle(texts)
    assert fit_tokenizer(texts, 600).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding_and_its_token_pieces_rejoin(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(token_pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 325), max_size=12))
def test_pieces_of_arbitrary_tokens_rejoin_even_when_they_are_no_utf8(tokenizer, ids):
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
