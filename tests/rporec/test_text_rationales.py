from dataclasses import replace

import pyarrow as pa
import pytest

from rporec.config import ConfigError, TextConfig
from rporec.data import Catalog
from rporec.text.prompt import ItemWriter, PromptWriter
from rporec.text.rationales import Rationale, done_samples, hash_prompt, read_rationales, write_shard
from rporec.text.sft import warmup_pairs
from rporec.text.teacher import TemplateTeacher, tokenizer_texts
from rporec.text.tokenizer import fit_tokenizer

ONE = Rationale(7, "<think> é</think>", "template", "template", hash_prompt("x"))


def test_rationales_come_back_sorted_with_their_provenance(tmp_path):
    write_shard(tmp_path, [replace(ONE, sample=9), ONE])
    write_shard(tmp_path, [replace(ONE, sample=3, teacher="openai", model="m")])
    assert [r.sample for r in read_rationales(tmp_path)] == [3, 7, 9]
    assert read_rationales(tmp_path)[1] == ONE
    assert ONE.version


def test_a_teacher_resumes_behind_what_is_stored_unusable_ones_included(tmp_path):
    assert done_samples(tmp_path / "nothing") == set()
    write_shard(tmp_path, [ONE, replace(ONE, sample=8, text=None)])
    assert done_samples(tmp_path) == {7, 8}
    assert [r.sample for r in read_rationales(tmp_path)] == [7]


def test_writing_the_same_shard_twice_changes_nothing(tmp_path):
    assert write_shard(tmp_path, [ONE]) == write_shard(tmp_path, [ONE])
    assert len(list(tmp_path.iterdir())) == 1
    assert write_shard(tmp_path, []) is None


def test_a_half_written_shard_is_not_seen(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("rporec.text.rationales.pq.write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path, [ONE])
    assert done_samples(tmp_path) == set()


class OneUser:
    """A data set's face, as far as warm-up looks at it."""

    def history(self, sample):
        return [0, 1][: sample + 1]


def test_warmup_pairs_hold_prompt_and_completion_as_a_rollout_would(caplog):
    catalog = Catalog(pa.table({"item_id": ["a", "b"], "title": ["Zarnak 1", "Kor 1"], "genre": ["x", "y"]}))
    items = ItemWriter(catalog, TextConfig())
    tokenizer = fit_tokenizer(tokenizer_texts(items), 600)
    prompts = PromptWriter(catalog, TextConfig(), tokenizer, True, 128, 30)
    text = TemplateTeacher(items).rationale([0], 1)
    stored = [
        replace(ONE, sample=0, text=text),
        replace(ONE, sample=1, text="<think>" + " x" * 50),
        replace(ONE, text=None),
    ]
    (pair,) = warmup_pairs(OneUser(), stored, prompts)
    assert (pair.sample, pair.prompt_ids) == (0, prompts.prompt_ids([0]))
    assert tokenizer.decode(pair.completion_ids[:-1]) == text
    assert pair.completion_ids[-1] == tokenizer.eos_token_id
    assert "leaves out 1 rationales" in caplog.text
    with pytest.raises(ConfigError, match="all 1 rationales are longer than 30 tokens"):
        warmup_pairs(OneUser(), stored[1:], prompts)
    with pytest.raises(ConfigError, match="no rationale can be used, so there is nothing to warm up on"):
        warmup_pairs(OneUser(), stored[2:], prompts)
