"""What travels between controller, rollout workers, reward workers and learners.

A `Lease` goes out to a rollout worker; a `RecordBatch` of `ROLLOUT_SCHEMA`, one row per completion,
comes back and is scored; the batch goes on to the learner while the controller keeps a `GroupMeta`
of each group and never sees a token. Rows of one group are adjacent and in order of `index`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rporec.engine.types import Generated, Version
from rporec.files import replacing
from rporec.rl import item_rewards
from rporec.rl.rewards import Scored, is_flat
from rporec.text.completion import TAGS, Completion, answer_alone, cot_token_span, parse

PARTS = ("pre", "cot", "mid", "answer", "post")
REWARD_PARTS = ("format", "outside", "ndcg", "conciseness", "faithfulness", "custom", *item_rewards.TERMS)

_SPAN = pa.struct([pa.field("start", pa.int32(), False), pa.field("end", pa.int32(), False)])
_VERSIONS = pa.struct([pa.field(name, pa.int32(), False) for name in ("attempt", "number", "start", "end")])


def _list(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", value, False))


ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), False),
        pa.field("sample", pa.int64(), False),
        pa.field("index", pa.int16(), False),  # within the group
        pa.field("prompt_ids", _list(pa.int32()), False),
        pa.field("completion_ids", _list(pa.int32()), False),
        pa.field("logprobs", _list(pa.float32()), False),  # of the behaviour policy, one per completion token
        pa.field("versions", _list(_VERSIONS), False),  # token spans that tile [0, len(completion_ids))
        pa.field("text", pa.string(), False),
        pa.field("item", pa.int64()),  # that a search of the catalogue found; null for free text
        pa.field("spans", pa.struct([pa.field(part, _SPAN, False) for part in PARTS]), False),  # characters of `text`
        pa.field("cot_tokens", _SPAN, False),  # tokens inside the CoT
        pa.field("format", pa.int8(), False),
        pa.field("finish_reason", pa.string(), False),
        # Null until scored, and null for ever in a row whose scoring failed.
        pa.field("rank", pa.float64()),
        pa.field("reward_without_entropy", pa.float32()),  # the learner adds the entropy term
        pa.field("reward_parts", pa.struct([pa.field(part, pa.float32()) for part in REWARD_PARTS])),
        pa.field("masked", pa.bool_()),  # scoring failed: the completion carries no gradient, never a score of 0
    ]
)


@dataclass(frozen=True, eq=False)
class Lease:
    """The request to write one group: a prompt, and the seed from which its completions are sampled."""

    group: int
    sample: int
    prompt_ids: np.ndarray  # int32 [P]
    seed: int


@dataclass(frozen=True)
class GroupMeta:
    """All that the controller knows of a group; rewards are without the entropy term, None until scored."""

    group: int
    tokens: int  # of all completions
    lengths: tuple[int, ...]  # tokens of each completion
    versions: tuple[Version, ...]  # every version that sampled a token, sorted
    format: float  # share of well-formed completions
    reward_mean: float | None = None  # over completions that are not masked
    reward_std: float | None = None
    flat: bool = False  # no two completions differ in reward: nothing to learn from but entropy
    masked: int = 0  # completions whose scoring failed
    parts: Mapping[str, float] = field(default_factory=dict)  # mean of each reward part
    gaming: Mapping[str, float] = field(default_factory=dict)  # `rewards.gaming` of this group

    @property
    def oldest(self) -> int:
        """The smallest version number that sampled a token: what staleness is measured by."""
        return min(version.number for version in self.versions)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"versions": [[version.attempt, version.number] for version in self.versions]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> GroupMeta:
        versions = tuple(Version(attempt, number) for attempt, number in raw["versions"])
        return cls(**{**raw, "versions": versions, "lengths": tuple(raw["lengths"])})


def rollout_batch(lease: Lease, generated: Sequence[Generated], pieces: Sequence[Sequence[str]]) -> pa.RecordBatch:
    """The unscored rows of one group.

    `pieces[i]` is the text of each token of completion i, from which the tokens inside the CoT are
    found. Raises ValueError where tokens, logprobs, pieces and version spans do not fit together, or no completion
    has a token.
    """
    for index, (one, texts) in enumerate(zip(generated, pieces, strict=True)):
        tokens = len(one.token_ids)
        if not len(one.logprobs) == len(texts) == tokens:
            raise ValueError(
                f"group {lease.group}, completion {index}: {tokens} tokens, "
                f"{len(one.logprobs)} logprobs, {len(texts)} pieces"
            )
        _check_tiling(lease.group, index, one.versions, tokens)
    if not any(len(one.token_ids) for one in generated):
        raise ValueError(f"group {lease.group}: no completion has a token")
    completions = [parse(one.text) if one.item is None else answer_alone(one.text) for one in generated]
    size = len(generated)
    versions = [
        [{"attempt": v.attempt, "number": v.number, "start": start, "end": end} for v, start, end in one.versions]
        for one in generated
    ]
    cot_tokens = [
        cot_token_span(texts) if one.item is None else (0, 0) for one, texts in zip(generated, pieces, strict=True)
    ]
    columns: dict[str, Any] = {
        "group": np.full(size, lease.group, np.int64),
        "sample": np.full(size, lease.sample, np.int64),
        "index": np.arange(size, dtype=np.int16),
        "prompt_ids": _ragged([lease.prompt_ids] * size, np.int32),
        "completion_ids": _ragged([one.token_ids for one in generated], np.int32),
        "logprobs": _ragged([one.logprobs for one in generated], np.float32),
        "versions": versions,
        "text": [one.text for one in generated],
        "item": [one.item for one in generated],
        "spans": [text_spans(completion) for completion in completions],
        "cot_tokens": [{"start": start, "end": end} for start, end in cot_tokens],
        "format": np.array([completion.format for completion in completions], np.int8),
        "finish_reason": [one.finish_reason for one in generated],
    }
    arrays = []
    for field_ in ROLLOUT_SCHEMA:
        values = columns.get(field_.name)
        if values is None:
            arrays.append(pa.nulls(size, field_.type))
        elif isinstance(values, pa.Array):
            arrays.append(values)
        else:
            arrays.append(pa.array(values, field_.type))
    return pa.RecordBatch.from_arrays(arrays, schema=ROLLOUT_SCHEMA)


def with_rewards(batch: pa.RecordBatch, scored: Scored) -> pa.RecordBatch:
    """The batch with its reward columns filled; rows of `scored.masked` keep nulls there.

    Raises ValueError when there are more or fewer scores than rows.
    """
    size = batch.num_rows
    if len(scored.masked) != size:
        raise ValueError(f"{len(scored.masked)} scores for {size} completions")
    hidden = np.asarray(scored.masked, dtype=bool)
    parts = [
        pa.array(np.asarray(scored.parts[name], np.float32), mask=hidden) if name in scored.parts else _no_part(size)
        for name in REWARD_PARTS
    ]
    part_fields = [ROLLOUT_SCHEMA.field("reward_parts").type.field(name) for name in REWARD_PARTS]
    filled = {
        "rank": pa.array(np.asarray(scored.rank, np.float64), mask=hidden),
        "reward_without_entropy": pa.array(np.asarray(scored.reward_without_entropy, np.float32), mask=hidden),
        "reward_parts": pa.StructArray.from_arrays(parts, fields=part_fields, mask=pa.array(hidden)),
        "masked": pa.array(hidden),
    }
    columns = [filled.get(name, batch.column(name)) for name in ROLLOUT_SCHEMA.names]
    return pa.RecordBatch.from_arrays(columns, schema=ROLLOUT_SCHEMA)


def ragged(batch: pa.RecordBatch, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (values [T], offsets int32 [R + 1]), views into the batch, never copies.

    Row i is `values[offsets[i]:offsets[i + 1]]`. Of a slice of a batch the offsets start at 0 too.
    """
    array = batch.column(column)
    offsets = array.offsets.to_numpy(zero_copy_only=True)
    values = array.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
    return values, offsets if offsets[0] == 0 else offsets - offsets[0]


def token_versions(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """(attempt, number), int32 [T] each: the weight version that sampled each completion token."""
    attempt, number, start, end = _version_fields(batch)
    return np.repeat(attempt, end - start), np.repeat(number, end - start)


def completions(batch: pa.RecordBatch) -> list[Completion]:
    """The parsed completions, cut from the text by the stored spans."""
    return [
        Completion(
            text=text, format=format_, **{part: text[span["start"] : span["end"]] for part, span in spans.items()}
        )
        for text, spans, format_ in zip(
            batch.column("text").to_pylist(),
            batch.column("spans").to_pylist(),
            batch.column("format").to_pylist(),
            strict=True,
        )
    ]


def split_groups(batch: pa.RecordBatch) -> list[pa.RecordBatch]:
    """One batch per group, in order; rows of a group are adjacent."""
    groups = batch.column("group").to_numpy()
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [len(groups)]])
    # Copies, by something to concatenate: a slice would be pickled with all of its parent's buffers.
    nothing = batch.slice(0, 0)
    slices = [batch.slice(start, end - start) for start, end in itertools.pairwise(bounds) if end > start]
    return [pa.concat_batches([one, nothing]) for one in slices]


def write_groups(path: Path, groups: Sequence[pa.RecordBatch]) -> None:
    """All groups in one Parquet file, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_batches(groups, schema=ROLLOUT_SCHEMA), temporary, compression="zstd")


def read_groups(path: Path) -> list[pa.RecordBatch]:
    """The groups of `write_groups`, in their order; none where there is no such file."""
    if not path.exists():
        return []
    batches = pq.read_table(path, schema=ROLLOUT_SCHEMA).combine_chunks().to_batches()
    return [group for batch in batches for group in split_groups(batch)]


def group_meta(batch: pa.RecordBatch, gaming: Mapping[str, float] | None = None) -> GroupMeta:
    """What the controller is told of one group, scored or not."""
    _, offsets = ragged(batch, "completion_ids")
    attempt, number, _, _ = _version_fields(batch)
    meta = GroupMeta(
        group=batch.column("group")[0].as_py(),
        tokens=int(offsets[-1]),
        lengths=tuple(np.diff(offsets).tolist()),
        versions=tuple(sorted({Version(a, n) for a, n in zip(attempt.tolist(), number.tolist(), strict=True)})),
        format=float(batch.column("format").to_numpy().mean()),
        gaming=dict(gaming or {}),
    )
    masked = batch.column("masked")
    if masked.null_count:
        return meta
    reward = batch.column("reward_without_entropy").drop_null().to_numpy()
    struct = batch.column("reward_parts")
    parts = {name: struct.field(name).drop_null().to_numpy() for name in REWARD_PARTS}
    return replace(
        meta,
        reward_mean=float(reward.mean()) if len(reward) else None,
        reward_std=float(reward.std()) if len(reward) else None,
        flat=is_flat(reward),
        masked=batch.num_rows - len(reward),
        parts={name: float(values.mean()) for name, values in parts.items() if len(values)},
    )


def text_spans(completion: Completion) -> dict[str, dict[str, int]]:
    """Character offsets of the five parts in the text; a part that is "" has an empty span."""
    if not completion.format or completion.answer == completion.text:
        alone = "answer" if completion.format else "cot"
        whole = {"start": 0, "end": len(completion.text)}
        return {part: whole if part == alone else {"start": 0, "end": 0} for part in PARTS}
    spans, cursor = {}, 0
    for part, tag in zip(PARTS, ("", *TAGS), strict=True):
        start = cursor + len(tag)
        cursor = start + len(getattr(completion, part))
        spans[part] = {"start": start, "end": cursor}
    return spans


def _version_fields(batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
    flat = batch.column("versions").flatten()
    return tuple(flat.field(name).to_numpy() for name in ("attempt", "number", "start", "end"))


def _check_tiling(group: int, index: int, versions: Sequence[tuple[Version, int, int]], tokens: int) -> None:
    cursor = 0
    for _, start, end in versions:
        if start != cursor or end < start:
            break
        cursor = end
    if cursor != tokens:
        raise ValueError(f"group {group}, completion {index}: version spans {versions} do not tile {tokens} tokens")


def _ragged(rows: Sequence[np.ndarray], dtype: type) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
    list_type = _list(pa.from_numpy_dtype(np.dtype(dtype)))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=list_type)


def _no_part(size: int) -> pa.Array:
    return pa.nulls(size, pa.float32())
