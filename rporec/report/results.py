"""Sections of the report that answer how well it recommends: table, intervals, paired differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rporec.evaluation.table import IN_WORDS
from rporec.report.markup import Markup, element, join, table
from rporec.report.sources import Sources, mapping, number, words
from rporec.report.svg import Axis, Interval, axis_labels, interval_plot

SHOWN = ("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20")
LISTS = ("coverage@10", "diversity@10")  # where they were measured
COLORS = (("rporec_stage2", 2), ("rporec_stage1", 1), ("rechead", 0), ("rere", 3))
OTHER_COLOR = 6


def results(sources: Sources) -> Markup:
    """The headline convention open, the other folded."""
    conventions = mapping(sources.metrics.get("conventions"))
    if not conventions:
        return element("p", "Not evaluated yet.", class_="absent")
    headline = words(sources.metrics.get("headline"))
    parts = []
    for name in sorted(conventions, key=lambda name: name != headline):
        body = _convention(mapping(conventions[name]))
        if name == headline:
            lead = f"Split {words(sources.metrics.get('split'))}, whole catalogue ranked, {IN_WORDS.get(name, name)}. "
            lead += "Intervals: 95 % bootstrap over users."
            parts.append(join([element("p", lead), body]))
        else:
            summary = element("summary", f"The same with {IN_WORDS.get(name, name)}")
            parts.append(element("details", summary, body))
    return join(parts)


def _convention(part: dict[str, Any]) -> Markup:
    methods = {name: mapping(entry) for name, entry in mapping(part.get("methods")).items()}
    if not methods:
        return element("p", "No methods yet.", class_="absent")
    cold = mapping(part.get("cold"))
    cold_methods = {name: mapping(entry) for name, entry in mapping(cold.get("methods")).items()}
    return join(
        [
            element("h3", "NDCG@10"),
            _forest(
                [(name, *_estimate(entry, "ndcg@10", "ndcg@10_ci"), _color(name)) for name, entry in methods.items()]
            ),
            _paired(mapping(part.get("paired"))),
            element("h3", "Every metric"),
            _table(methods),
            *(
                element(
                    "details",
                    element("summary", f"The {number(mapping(stratum).get('samples')) or 0:,.0f} {name} targets"),
                    _table({method: mapping(e) for method, e in mapping(mapping(stratum).get("methods")).items()}),
                )
                for name, stratum in mapping(part.get("by_popularity")).items()
            ),
            element(
                "details",
                element("summary", f"The {number(cold.get('samples')) or 0:,.0f} targets that training never showed"),
                _table(cold_methods),
            )
            if cold_methods
            else None,
        ]
    )


def _paired(paired: dict[str, Any]) -> Markup | None:
    rows = []
    for pair, entry in paired.items():
        value, low, high = _estimate(mapping(entry), "ndcg@10", "ci")
        clear = low is not None and high is not None and (low > 0 or high < 0)
        rows.append((pair.replace("-", " − ", 1), value, low, high, _color(pair) if clear else OTHER_COLOR))
    if not rows:
        return None
    note = "NDCG@10 of the first minus the second on the same samples. Grey: the interval holds 0."
    return join([element("h3", "Paired differences"), element("p", note), _forest(rows, zero=True)])


Row = tuple[str, float | None, float | None, float | None, int]


def _forest(rows: Sequence[Row], *, zero: bool = False) -> Markup:
    drawn = [(name, value, low, high, color) for name, value, low, high, color in rows if value is not None]
    if not drawn:
        return element("p", "No values.", class_="absent")
    ends = [x for _, value, low, high, _ in drawn for x in (value, low, high) if x is not None]
    axis = Axis.over([*ends, 0.0], 5)
    lines = []
    for name, value, low, high, color in drawn:
        interval = Interval(value, value if low is None else low, value if high is None else high, color)
        written = [element("b", _figure(value, zero)), f" {_range(low, high, zero)}"]
        lines.append(
            element(
                "div",
                element("span", [[part, Markup("<wbr>")] for part in re.split(r"(?<=_)", name)], class_="name"),
                interval_plot(interval, axis, zero=zero),
                element("span", written, class_="value"),
                class_="row",
            )
        )
    lines.append(element("div", element("span"), axis_labels(axis), element("span"), class_="row last"))
    return element("div", lines, class_="forest pairs" if zero else "forest")


def _table(methods: dict[str, dict[str, Any]]) -> Markup:
    columns = (*SHOWN, *(m for m in LISTS if any(m in entry for entry in methods.values())))
    best = {m: max((v for e in methods.values() if (v := number(e.get(m))) is not None), default=None) for m in columns}
    rows = []
    for name, entry in methods.items():
        cells = []
        for metric in columns:
            value, low, high = _estimate(entry, metric, f"{metric}_ci")
            written = "–" if value is None else _figure(value)
            strong = value is not None and value == best[metric]
            small = element("small", _range(low, high)) if low is not None and high is not None else None
            cells.append(join([element("b", written) if strong else written, small]))
        rows.append((name, *cells))
    return table(("method", *(m.upper() for m in columns)), rows)


def _estimate(entry: dict[str, Any], metric: str, interval: str) -> tuple[float | None, float | None, float | None]:
    ends = entry.get(interval)
    low, high = (number(e) for e in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return number(entry.get(metric)), low, high


def _figure(value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.3f}".replace("-", "−")


def _range(low: float | None, high: float | None, signed: bool = False) -> str:
    return "" if low is None or high is None else f"[{_figure(low, signed)}, {_figure(high, signed)}]"


def _color(name: str) -> int:
    return next((color for prefix, color in COLORS if name.startswith(prefix)), OTHER_COLOR)
