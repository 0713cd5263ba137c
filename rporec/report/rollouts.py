"""Section of the report that shows what the model writes about the same users before and after RL."""

from __future__ import annotations

from typing import Any

from rporec.report.markup import Markup, element, join
from rporec.report.sources import Sources, mapping, number, words

OPEN = 3  # rollouts that are unfolded


def rollouts(sources: Sources) -> Markup:
    """Users with their history, target, and the thoughts, answers and ranks on both sides of RL."""
    if not sources.rollouts:
        return element("p", "No rollouts were saved.", class_="absent")
    return join(
        [
            element("p", "Rank: where the target stands in the whole catalogue once the head has read the text."),
            [_rollout(rollout, at < OPEN) for at, rollout in enumerate(sources.rollouts)],
        ]
    )


def _rollout(rollout: dict[str, Any], unfolded: bool) -> Markup:
    before, after = mapping(rollout.get("before")), mapping(rollout.get("after"))
    ranks = number(before.get("rank")), number(after.get("rank"))
    history = rollout.get("history")
    titles = [words(title) for title in history] if isinstance(history, list) else []
    return element(
        "details",
        element(
            "summary",
            element("span", words(rollout.get("user_id")) or "user", class_="user"),
            element("span", "→ ", words(rollout.get("target")) or "unknown target", class_="target"),
            element("span", f"rank {_rank(ranks[0])} → {_rank(ranks[1])}", class_=f"rank {_direction(*ranks)}"),
        ),
        element("div", element("h4", "History, newest last"), element("ol", [element("li", t) for t in titles]))
        if titles
        else None,
        element("div", _side("Before RL", before), _side("After RL", after), class_="sides"),
        class_="rollout",
        open="" if unfolded else None,
    )


def _side(title: str, side: dict[str, Any]) -> Markup:
    if not side:
        return element("div", element("h4", title), element("p", "Not there yet.", class_="absent"))
    return element(
        "div",
        element("h4", title),
        element("blockquote", words(side.get("cot")) or "(no chain of thought)"),
        element("p", element("b", words(side.get("answer")) or "(no answer)"), class_="answer"),
        element("p", f"Rank of the target: {_rank(number(side.get('rank')))}", class_="absent"),
    )


def _rank(rank: float | None) -> str:
    return "–" if rank is None else f"{rank:,.1f}".removesuffix(".0")


def _direction(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == after:
        return "same"
    return "better" if after < before else "worse"
