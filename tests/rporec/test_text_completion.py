import pytest
from hypothesis import given
from hypothesis import strategies as st

from rporec.text.completion import TAGS, cot_token_span, parse

WELL_FORMED = "well <think> last A .</think> so <answer> B ; c</answer>!"
# Arbitrary text that is dense in tags, half tags and bare words.
texts = st.lists(st.one_of(st.sampled_from([*TAGS, "<think", "answer>", "<", "</", " "]), st.text(max_size=5))).map(
    "".join
)
tagless = st.text(alphabet=st.characters(exclude_characters="<>", exclude_categories=["Cs"]), max_size=12)


def test_the_five_pieces_of_a_well_formed_completion():
    done = parse(WELL_FORMED)
    assert (done.pre, done.cot, done.mid, done.answer, done.post) == ("well ", " last A .", " so ", " B ; c", "!")
    assert done.format == 1
    assert done.text[done.cot_start :].startswith(done.cot)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tags",
        "<think>a</think><answer>b",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a<think>b</think></think><answer>c</answer>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think><answer>b</answer> and <think>",
        "<Think>a</Think><Answer>b</Answer>",
        "< think>a</think><answer>b</answer>",
    ],
)
def test_missing_misordered_nested_or_repeated_tags_are_malformed_and_all_cot(text):
    done = parse(text)
    assert (done.format, done.cot, done.pre + done.mid + done.answer + done.post) == (0, text, "")


@given(texts)
def test_any_text_parses_and_its_pieces_rejoin(text):
    done = parse(text)
    if done.format:
        assert f"{done.pre}<think>{done.cot}</think>{done.mid}<answer>{done.answer}</answer>{done.post}" == text
        assert not any(tag in piece for tag in TAGS for piece in (done.pre, done.cot, done.mid, done.answer, done.post))
    else:
        assert (done.cot, done.answer) == (text, "")


@given(tagless, tagless, tagless, tagless, tagless)
def test_text_written_in_the_format_is_recognised(pre, cot, mid, answer, post):
    done = parse(f"{pre}<think>{cot}</think>{mid}<answer>{answer}</answer>{post}")
    assert (done.format, done.pre, done.cot, done.mid, done.answer, done.post) == (1, pre, cot, mid, answer, post)


@given(st.one_of(texts, st.just(WELL_FORMED)), st.data())
def test_tokens_inside_the_cot_are_those_that_hold_its_characters(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    start, end = cot_token_span(pieces)
    done = parse(text)
    if not done.format:
        assert (start, end) == (0, len(pieces))
        return
    at = 0
    for index, piece in enumerate(pieces):
        holds = max(at, done.cot_start) < min(at + len(piece), done.cot_start + len(done.cot))
        if holds:
            assert start <= index < end
        elif piece:
            assert not start <= index < end
        at += len(piece)


def test_span_with_single_token_tags_leaves_the_tags_out():
    assert cot_token_span(["<think>", " a", "", "é", "</think>", "<answer>", "b", "</answer>"]) == (1, 4)
    assert cot_token_span(["<think>", "</think>", "<answer>", "b", "</answer>"]) == (1, 1)
    assert cot_token_span([]) == (0, 0)
