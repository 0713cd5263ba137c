import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rporec.config import TextConfig
from rporec.data import Catalog
from rporec.text.completion import parse
from rporec.text.prompt import ItemWriter
from rporec.text.teacher import TemplateTeacher, facts, statements, tokenizer_texts
from rporec.text.tokenizer import fit_tokenizer

CATALOG = Catalog(
    pa.table(
        {
            "item_id": list("abcdef"),
            "title": ["Zarnak 1", "Zarnak 2", "Kor ; 1 . x", "Dr. No", "Elm", "Zarnak 3"],
            "genre": ["drama", "drama|war", "crime", "film noir", None, "drama"],
        }
    )
)
WRITER = ItemWriter(CATALOG, TextConfig())


def cot(history, target=0, **options):
    return parse(TemplateTeacher(WRITER, **options).rationale(history, target)).cot


def test_the_template_states_facts_then_the_target_title_first():
    assert TemplateTeacher(WRITER).rationale([2, 0, 1], 5) == (
        "<think> last Zarnak 2 ; before Zarnak 1 . genre crime drama drama . run 2 .</think>"
        "<answer> Zarnak 3 ; drama</answer>"
    )


@pytest.mark.parametrize(("target", "words"), [(5, " so again drama ."), (3, " so new film noir .")])
def test_the_decision_is_stated_only_when_asked_for(target, words):
    assert cot([2, 0, 1], target, decision=True).endswith(words)
    assert " so " not in cot([2, 0, 1], target)


def test_short_histories_and_missing_attributes_leave_parts_out():
    assert cot([0]) == " last Zarnak 1 . genre drama . run 1 ."
    assert cot([]) == ""
    plain = ItemWriter(CATALOG, TextConfig(columns=["title"]))
    assert TemplateTeacher(plain, decision=True).rationale([0, 1], 5) == (
        "<think> last Zarnak 2 ; before Zarnak 1 .</think><answer> Zarnak 3</answer>"
    )
    assert cot([4]) == " last Elm . genre none . run 1 ."


def test_runs_are_capped():
    assert facts([0] * 9, WRITER)["run"] == "5"


def test_only_items_that_the_prompt_shows_are_stated():
    one = ItemWriter(CATALOG, TextConfig(prompt_items=1))
    assert facts([2, 0, 1], one) == {"last": "Zarnak 2", "genre": "drama", "run": "1"}


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 5), st.booleans())
def test_every_statement_of_the_template_holds(history, target, decision):
    rationale = cot(history, target, decision=decision)
    assert statements(rationale, history, WRITER) == (len(facts(history, WRITER)),) * 2


def test_false_and_repeated_statements_are_seen_for_what_they_are():
    history = [2, 0, 1]
    assert statements(" last Zarnak 2 ; before Elm . genre crime drama drama . run 3 .", history, WRITER) == (2, 4)
    assert statements(" last Zarnak 2 . last Zarnak 2 . last Elm .", history, WRITER) == (1, 2)
    assert statements("LAST  zarnak 2 .", history, WRITER) == (1, 1)
    assert statements("I like dramas. They last.", history, WRITER) == (0, 0)


@given(st.text(), st.lists(st.integers(0, 5), max_size=4))
def test_statements_accept_any_text(text, history):
    true, checkable = statements(text, history, WRITER)
    assert 0 <= true <= checkable


def test_template_words_are_whole_tokens_of_a_tokenizer_fitted_to_the_catalogue():
    tokenizer = fit_tokenizer(tokenizer_texts(WRITER), 1000)
    text = TemplateTeacher(WRITER, decision=True).rationale([2, 0, 1], 5)
    assert len(tokenizer.encode(text)) == len(
        text.replace("><", "> <").replace(" .<", " . <").replace("a<", "a <").split()
    )
