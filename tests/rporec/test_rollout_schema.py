"""Rows of completions: what goes in comes out, without copies and without invented scores."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rporec.engine.types import Generated, Version
from rporec.rl.rewards import Scored
from rporec.rl.rollout_schema import (
    ROLLOUT_SCHEMA,
    GroupMeta,
    Lease,
    completions,
    group_meta,
    ragged,
    rollout_batch,
    split_groups,
    token_versions,
    with_rewards,
)
from rporec.text.completion import parse

GOOD = ["a", "<think>", "think ", "é", "</think>", " ", "<answer>", "x", "</answer>", "b"]
BAD = ["no ", "tags"]


def generated(pieces: list[str], *versions: tuple[Version, int, int]) -> Generated:
    size = len(pieces)
    return Generated(
        token_ids=np.arange(size, dtype=np.int32),
        logprobs=-np.arange(size, dtype=np.float32),
        versions=versions,
        finish_reason="stop",
        text="".join(pieces),
    )


def batch(group: int = 7) -> pa.RecordBatch:
    lease = Lease(group, sample=3, prompt_ids=np.array([5, 6, 7], np.int32), seed=1)
    rows = [
        generated(GOOD, (Version(0, 4), 0, 6), (Version(0, 5), 6, 10)),
        generated(BAD, (Version(0, 5), 0, 2)),
    ]
    return rollout_batch(lease, rows, [GOOD, BAD])


def scored(rewards: list[float], masked: list[bool]) -> Scored:
    values = np.array(rewards)
    return Scored(values + 1, {"format": values, "ndcg": values}, values.astype(np.float32), np.array(masked))


def test_a_batch_has_the_schema_and_survives_arrow_ipc():
    rows = batch()
    assert rows.schema == ROLLOUT_SCHEMA
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ROLLOUT_SCHEMA) as writer:
        writer.write_batch(rows)
    assert pa.ipc.open_stream(sink.getvalue()).read_next_batch().equals(rows)


def test_ragged_columns_are_views_of_the_batch_and_of_its_slices():
    rows = batch()
    values, offsets = ragged(rows, "completion_ids")
    assert offsets.tolist() == [0, 10, 12]
    assert values.tolist() == [*range(10), 0, 1]
    assert np.shares_memory(values, rows.column("completion_ids").values.to_numpy())
    assert ragged(rows, "prompt_ids")[0].tolist() == [5, 6, 7, 5, 6, 7]
    values, offsets = ragged(rows.slice(1), "logprobs")
    assert offsets.tolist() == [0, 2]
    assert values.tolist() == [0, -1]


def test_every_token_knows_its_version():
    attempt, number = token_versions(batch())
    assert number.tolist() == [4] * 6 + [5] * 6
    assert attempt.tolist() == [0] * 12
    assert token_versions(batch().slice(1))[1].tolist() == [5, 5]


def test_spans_cut_the_text_as_the_parser_did():
    rows = batch()
    assert completions(rows) == [parse("".join(GOOD)), parse("".join(BAD))]
    assert rows.column("cot_tokens").to_pylist() == [{"start": 2, "end": 4}, {"start": 0, "end": 2}]
    assert rows.column("format").to_pylist() == [1, 0]


def test_tokens_logprobs_pieces_and_versions_must_fit_together():
    lease = Lease(1, 1, np.array([1], np.int32), 0)
    whole = generated(BAD, (Version(0, 0), 0, 2))
    with pytest.raises(ValueError, match="3 pieces"):
        rollout_batch(lease, [whole], [[*BAD, "x"]])
    with pytest.raises(ValueError, match="do not tile 2 tokens"):
        rollout_batch(lease, [generated(BAD, (Version(0, 0), 0, 1))], [BAD])
    with pytest.raises(ValueError, match="do not tile"):
        rollout_batch(lease, [generated(BAD, (Version(0, 0), 1, 2))], [BAD])
    with pytest.raises(ValueError, match="no completion has a token"):
        rollout_batch(lease, [generated([])], [[]])


def test_rewards_are_null_until_scored_and_in_rows_whose_scoring_failed():
    rows = batch()
    assert rows.column("masked").null_count == 2
    after = with_rewards(rows, scored([0.5, 0.0], masked=[False, True]))
    assert after.schema == ROLLOUT_SCHEMA
    assert after.column("masked").to_pylist() == [False, True]
    assert after.column("reward_without_entropy").to_pylist() == [0.5, None]
    assert after.column("rank").to_pylist() == [1.5, None]
    assert after.column("reward_parts").to_pylist()[1] is None
    first = after.column("reward_parts").to_pylist()[0]
    assert first["ndcg"] == 0.5
    assert first["conciseness"] is None  # a term that was off is not a term of 0
    assert after.column("completion_ids").equals(rows.column("completion_ids"))
    with pytest.raises(ValueError, match="1 scores for 2"):
        with_rewards(rows, scored([0.5], masked=[False]))


def test_meta_holds_lengths_versions_and_rewards_but_no_token():
    meta = group_meta(batch())
    assert (meta.group, meta.tokens, meta.lengths, meta.format) == (7, 12, (10, 2), 0.5)
    assert (meta.versions, meta.oldest) == ((Version(0, 4), Version(0, 5)), 4)
    assert meta.reward_mean is None
    meta = group_meta(with_rewards(batch(), scored([0.25, 0.75], [False, False])), {"seen_answers": 0.5})
    assert (meta.reward_mean, meta.reward_std, meta.flat, meta.masked) == (0.5, 0.25, False, 0)
    assert meta.parts == {"format": 0.5, "ndcg": 0.5}
    assert GroupMeta.from_json(json.loads(json.dumps(meta.to_json()))) == meta


def test_oldest_is_the_smallest_number_whatever_the_attempt():
    rows = [generated(BAD, (Version(0, 5), 0, 1), (Version(1, 4), 1, 2))]
    meta = group_meta(rollout_batch(Lease(0, 0, np.array([1], np.int32), 0), rows, [BAD]))
    assert meta.oldest == 4


def test_masked_completions_neither_count_nor_make_a_group_differ():
    meta = group_meta(with_rewards(batch(), scored([0.25, 0.0], [False, True])))
    assert (meta.reward_mean, meta.flat, meta.masked) == (0.25, True, 1)
    meta = group_meta(with_rewards(batch(), scored([0.0, 0.0], [True, True])))
    assert (meta.reward_mean, meta.flat, meta.masked, dict(meta.parts)) == (None, True, 2, {})


def test_a_batch_of_several_groups_splits_and_each_slice_gives_its_own_meta():
    both = pa.concat_batches([batch(7), with_rewards(batch(2), scored([1.0, 0.0], [False, False]))])
    first, second = split_groups(both)
    assert first.equals(batch(7))
    assert group_meta(first) == group_meta(batch(7))
    assert group_meta(second).reward_mean == 0.5
    assert group_meta(second).group == 2
    assert split_groups(both.slice(0, 0)) == []


def test_a_group_that_was_split_off_travels_without_the_others():
    alone, *_ = split_groups(pa.concat_batches([batch(number) for number in range(20)]))
    assert len(pickle.dumps(alone)) < 1.1 * len(pickle.dumps(batch(0)))


def test_a_generated_item_is_an_answer_without_thoughts():
    lease = Lease(7, sample=3, prompt_ids=np.array([5], np.int32), seed=1)
    found = replace(generated([" Red", " Door", ""], (Version(0, 0), 0, 3)), item=12)
    rows = rollout_batch(lease, [found, replace(found, item=4)], [[" Red", " Door", ""]] * 2)
    assert rows.column("item").to_pylist() == [12, 4]
    assert [one.answer for one in completions(rows)] == [" Red Door"] * 2
    assert {one.cot + one.pre + one.mid + one.post for one in completions(rows)} == {""}
    assert rows.column("cot_tokens").to_pylist() == [{"start": 0, "end": 0}] * 2
    assert group_meta(rows).format == 1
    assert batch().column("item").null_count == 2
