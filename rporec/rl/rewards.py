"""What a completion is worth, in batches and without side effects.

    reward = format * (w_format + w_outside*outside + w_ndcg*ndcg + w_conciseness*conciseness
                       + w_faithfulness*faithfulness + custom + w_entropy*entropy)

(RPORec, arXiv 2605.21967.) `score` computes all but the entropy term, for which the policy's
full-vocabulary entropies are needed: the learner has them, and calls `entropy_terms` and `finish`.
A completion that could not be scored is masked, never worth 0. `gaming` measures how a policy
collects reward without getting better.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rporec.config import ConfigError, RewardConfig
from rporec.evaluation.ranking import ndcg, ranks
from rporec.text.completion import Completion

if TYPE_CHECKING:
    import torch

Embed = Callable[[list[str]], np.ndarray]  # n texts -> [n, D]
Custom = Callable[[Sequence[Completion], np.ndarray, np.ndarray], np.ndarray]  # completions, targets, rank -> [B]

OUTSIDE_CHARACTERS = 100  # text outside the tags that costs the whole `outside` term
FAITHFUL_COSINE = 0.5
FLAT = 1e-6  # rewards that differ by no more are equal


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of B completions; the values of masked rows mean nothing."""

    rank: np.ndarray  # float64 [B], counted from 1; NaN where nothing was ranked
    parts: dict[str, np.ndarray]  # float32 [B] each: the terms, unweighted and before the format gate
    reward_without_entropy: np.ndarray  # float32 [B]
    masked: np.ndarray  # bool [B]: scoring failed


def score(
    scores: np.ndarray,
    targets: np.ndarray,
    exclude: Sequence[np.ndarray] | None,
    completions: Sequence[Completion],
    weights: RewardConfig,
    *,
    summaries: Sequence[str | None] | None = None,
    embed: Embed | None = None,
    candidates: np.ndarray | None = None,
    custom: Custom | None = None,
) -> Scored:
    """Rewards of B completions, but for the entropy term.

    scores: RecHead's, [B, N]. targets: item indices [B].
    exclude: items that leave each ranking (None with `mask_history: false`).
    summaries: of the CoTs, as `parse_summary` returns them; None in a row: it could not be made.
    candidates: [B, 1 + n] with the target first, from `sampled_candidates`; None: the catalogue.
    custom: own reward, see `load_custom`; added inside the format gate, what is not finite means that it failed.

    A row is masked where its scores or its own reward are not finite, or its summary is missing.
    Raises ConfigError when a term with weight lacks what it needs.
    """
    targets = np.asarray(targets, np.int64)
    size = len(targets)
    masked = ~np.isfinite(scores).all(axis=1)
    rank = np.full(size, np.nan)
    rank[~masked] = _ranks(scores, targets, exclude, candidates, ~masked)
    gain = np.nan_to_num(ndcg(rank))
    if weights.faithfulness and embed is None:
        raise ConfigError("reward.faithfulness needs reward.embedder, a frozen text encoder; or set it to 0")
    if summaries is None and (weights.conciseness or weights.faithfulness):
        raise ConfigError("reward.conciseness and reward.faithfulness need summaries of the CoTs; or set both to 0")
    form = np.array([completion.format for completion in completions], np.float64)
    parts = {"format": form, "outside": outside(completions), "ndcg": gain}
    total = weights.format + weights.outside * parts["outside"] + weights.ndcg * gain
    if summaries is not None:
        masked |= np.array([summary is None for summary in summaries], bool)
        texts = [summary or "" for summary in summaries]
        parts["conciseness"] = conciseness(completions, texts)
        total = total + weights.conciseness * parts["conciseness"]
        if embed is not None:
            parts["faithfulness"] = faithfulness(completions, texts, embed)
            total = total + weights.faithfulness * parts["faithfulness"]
    if custom is not None:
        own = np.asarray(custom(completions, targets, rank), np.float64)
        if own.shape != (size,):
            raise ConfigError(f"reward.custom: returned shape {own.shape} for {size} completions")
        masked |= ~np.isfinite(own)
        parts["custom"] = np.nan_to_num(own)
        total = total + parts["custom"]
    reward = (form * total).astype(np.float32)
    return Scored(rank, {name: part.astype(np.float32) for name, part in parts.items()}, reward, masked)


def weights_for(weights: RewardConfig, *, tiny: bool) -> RewardConfig:
    """The weights in force: a tiny model cannot summarise, so its rambling must not be rewarded."""
    return weights.model_copy(update={"conciseness": 0.0, "faithfulness": 0.0}) if tiny else weights


# --- the terms


def outside(completions: Sequence[Completion]) -> np.ndarray:
    """`max(0, 1 - (len(pre) + len(post)) / 100)`, characters, float64 [B]."""
    written = np.array([len(c.pre) + len(c.post) for c in completions], np.float64)
    return np.maximum(0.0, 1.0 - written / OUTSIDE_CHARACTERS)


def conciseness(completions: Sequence[Completion], summaries: Sequence[str]) -> np.ndarray:
    """`min(1, len(summary) / len(CoT))`, characters, float64 [B]: a CoT that cannot be shortened scores 1."""
    thought = np.array([len(c.cot) if c.cot.strip() else 0 for c in completions], np.float64)
    summary = np.array([len(summary) for summary in summaries], np.float64)
    return np.where(thought > 0, np.minimum(1.0, summary / np.maximum(thought, 1.0)), 0.0)


def faithfulness(completions: Sequence[Completion], summaries: Sequence[str], embed: Embed) -> np.ndarray:
    """1 where `cosine(embed(CoT), embed(summary)) > 0.5`, float64 [B]; 0 where one of them is blank.

    `embed` is called once, with all texts that are not blank.
    """
    result = np.zeros(len(completions))
    rows = [i for i, c in enumerate(completions) if c.cot.strip() and summaries[i].strip()]
    if not rows:
        return result
    vectors = np.asarray(embed([completions[i].cot for i in rows] + [summaries[i] for i in rows]), np.float64)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = (vectors[: len(rows)] * vectors[len(rows) :]).sum(axis=1)
    result[rows] = cosine > FAITHFUL_COSINE
    return result


def sampled_candidates(
    targets: np.ndarray, samples: np.ndarray, items: int, *, negatives: int, seed: int
) -> np.ndarray:
    """[B, 1 + n] item indices: the target, then n distinct others, drawn from (seed, sample) alone.

    So all completions of a group, in whatever batch or worker, rank the same candidates. `n` is
    `negatives`, or all other items of a smaller catalogue.
    """
    n = min(negatives, items - 1)
    rows = np.empty((len(targets), 1 + n), np.int64)
    drawn: dict[int, np.ndarray] = {}
    for row, (target, sample) in enumerate(
        zip(np.asarray(targets).tolist(), np.asarray(samples).tolist(), strict=True)
    ):
        if sample not in drawn:
            others = np.random.default_rng((seed, sample)).choice(items - 1, n, replace=False)
            drawn[sample] = others + (others >= target)  # the target is stepped over
        rows[row, 0], rows[row, 1:] = target, drawn[sample]
    return rows


def _ranks(
    scores: np.ndarray,
    targets: np.ndarray,
    exclude: Sequence[np.ndarray] | None,
    candidates: np.ndarray | None,
    keep: np.ndarray,
) -> np.ndarray:
    rows = np.flatnonzero(keep)
    scores, targets = (scores, targets) if keep.all() else (scores[rows], targets[rows])
    exclude = exclude if exclude is None else [exclude[row] for row in rows]
    if candidates is None:
        return ranks(scores, targets, exclude)
    candidates = candidates[rows]
    if not np.array_equal(candidates[:, 0], targets):
        raise ValueError("candidates: the first of each row must be its target")
    if exclude is not None:
        exclude = [np.flatnonzero(np.isin(row, gone)) for row, gone in zip(candidates, exclude, strict=True)]
    return ranks(np.take_along_axis(scores, candidates, axis=1), np.zeros(len(rows), np.int64), exclude)


# --- the learner's half


def entropy_terms(
    entropies: torch.Tensor, owner: torch.Tensor, in_cot: torch.Tensor, format: torch.Tensor
) -> torch.Tensor:
    """Mean of the top ceil(0.2 n) of the n token entropies inside each CoT minus the mean of all n, float32 [R];
    0 where n or the format is 0.

    entropies [T] of all completion tokens, owner int64 [T] their rows, in_cot bool [T], format [R].
    """
    import torch

    rows = len(format)
    entropies, owner = entropies.detach()[in_cot].double(), owner[in_cot]
    order = torch.argsort(entropies, descending=True)
    order = order[torch.argsort(owner[order], stable=True)]  # by row, highest entropy first
    entropies, owner = entropies[order], owner[order]
    n = torch.bincount(owner, minlength=rows)
    place = torch.arange(len(owner), device=owner.device) - (n.cumsum(0) - n)[owner]
    highest = place < _top(n)[owner]
    total = entropies.new_zeros(rows).index_add_(0, owner, entropies)
    top = entropies.new_zeros(rows).index_add_(0, owner[highest], entropies[highest])
    term = top / _top(n).clamp(min=1) - total / n.clamp(min=1)
    return (term * (format > 0)).float()


def finish(
    reward_without_entropy: torch.Tensor, format: torch.Tensor, entropy_terms: torch.Tensor, weights: RewardConfig
) -> torch.Tensor:
    """The whole reward, [R]. Masked rows stay NaN if they come as NaN: mask them before any mean."""
    return reward_without_entropy + weights.entropy * format * entropy_terms


def _top(n: torch.Tensor) -> torch.Tensor:
    return (n + 4) // 5  # ceil(0.2 n) in integers: 0.2 * 15 is a little more than 3


# --- summaries


def summary_prompt(cot: str) -> str:
    """What the frozen model is asked; it ends in `<answer>`, so the summary ends at `</answer>`."""
    return (
        "Shorten the following reasoning about a user's taste as far as possible. "
        "Keep every fact and conclusion, leave out repetition and filler, add nothing.\n\n"
        f"Reasoning:\n{cot}\n\nShortened reasoning:\n<answer>"
    )


def parse_summary(text: str) -> str:
    """The summary in the text that follows `summary_prompt`: all up to `</answer>`, without outer blanks."""
    return text.partition("</answer>")[0].strip()


# --- own rewards


def load_custom(spec: str) -> Custom:
    """The own reward `module:function`, a function of (completions, targets [B], rank [B]) that returns [B].

    Raises ConfigError when there is no such function.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"reward.custom: {spec!r} is not module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"reward.custom: cannot import {module_name!r} ({error}); is it on PYTHONPATH?") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward.custom: module {module_name!r} has no function {name!r}")
    return function


# --- how a reward gets gamed


def gaming(answers: Sequence[str], seen: Sequence[np.ndarray], name: Callable[[int], str]) -> dict[str, float]:
    """Warning signs in R completions: `seen_answers` (share), `distinct_answers` (count).

    seen: per completion all the user's earlier items. name: how an item is written, its title before any
    " ; " (`Catalog.title` or `ItemWriter.short`). An answer names an item when its own part before " ; " equals
    the title, case and blanks aside.
    """
    named = [_title(answer) for answer in answers]
    titles = {item: _title(name(item)) for item in {item for items in seen for item in items.tolist()}}
    known = [
        bool(title) and title in {titles[item] for item in items.tolist()}
        for title, items in zip(named, seen, strict=True)
    ]
    distinct = {" ".join(answer.split()).casefold() for answer in answers}
    return {"seen_answers": float(np.mean(known)) if known else 0.0, "distinct_answers": float(len(distinct - {""}))}


def is_flat(reward: np.ndarray) -> bool:
    """Whether all rewards [R] of a group agree to 1e-6; those that are NaN do not count."""
    reward = np.asarray(reward, np.float64)
    return bool(np.fmax.reduce(reward, initial=-np.inf) - np.fmin.reduce(reward, initial=np.inf) <= FLAT)


def _title(text: str) -> str:
    return " ".join(text.split(" ; ")[0].split()).casefold()
