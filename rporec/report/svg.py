"""Charts as inline SVG: drawn at the size they are read at, coloured by the page's CSS variables.

Line charts are 360 units wide because that is a phone; wider pages put several side by side.
Interval plots use percentages and stretch with their column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rporec.report.markup import Markup, element

WIDTH, HEIGHT = 360, 210
LEFT, TOP, BOTTOM = 44, 12, 32
LABEL_GAP = 13  # between the baselines of two labels
BARS = 60  # of a stacked chart at most; more steps share a bar


@dataclass(frozen=True)
class Series:
    """A line: `points` are (x, y) in order of x; `color` is the number of a page colour."""

    name: str
    points: list[tuple[float, float]]
    color: int = 0
    smooth: bool = True  # False where a mean would hide what matters, as for a maximum

    @property
    def line(self) -> list[tuple[float, float]]:
        """What the strong line follows: from 25 points on a running mean."""
        return _running_mean(self.points) if self.smooth and len(self.points) >= 25 else self.points


@dataclass(frozen=True)
class Interval:
    """A row of an interval plot."""

    value: float
    low: float
    high: float
    color: int = 0


@dataclass(frozen=True)
class Axis:
    """A linear scale with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], count: int = 4, *, tight: bool = False) -> Axis:
        """Round ticks over `values`; tight: the range itself, with the ticks inside it."""
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # flat: open it, so that the line runs in the middle
            low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
        step = _round_step((high - low) / count)
        if not (math.isfinite(step) and step > 0):
            return cls(low, high, ())
        first = math.floor(low / step) if not tight else math.ceil(low / step - 1e-9)
        last = math.ceil(high / step) if not tight else math.floor(high / step + 1e-9)
        ticks = tuple(i * step for i in range(first, last + 1))
        return cls(low, high, ticks) if tight else cls(ticks[0], ticks[-1], ticks)

    def written(self, tick: float) -> str:
        """A tick with as many digits as tell it from its neighbours."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 0.0
        digits = next((d for d in range(5) if step and abs(round(step, d) - step) < 1e-6 * step), None)
        if digits is None or abs(tick) >= 10_000:
            return figure(round(tick, 10))
        plain = f"{tick:.{digits}f}"
        return (plain.rstrip("0").rstrip(".") if digits else plain).replace("-", "−")

    def share(self, value: float) -> float:
        """Position on the axis, 0 at its low end and 1 at its high end."""
        return (value - self.low) / ((self.high - self.low) or 1.0)


def _round_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough)) if rough > 0 and math.isfinite(rough) else 1.0
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)


def figure(value: float) -> str:
    """A number in about four characters."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 5e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    if size >= 10_000:
        return f"{value / 1000:.0f}k".replace("-", "−")
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2 if size >= 1 else 3
    written = f"{value:.{digits}f}"
    return (written.rstrip("0").rstrip(".") if "." in written else written).replace("-", "−")


def line_chart(series: Sequence[Series], label: str, *, bound: tuple[str, float] | None = None) -> Markup:
    """Lines over steps, each labelled at its end with name and last value.

    bound: name and value of a dashed horizontal line; the axis then starts at 0. Where a line is a running mean, the points
    themselves stand pale behind it.
    """
    series = [s for s in series if s.points]
    values = [y for s in series for _, y in s.points]
    values += [0.0, 1.2 * bound[1]] if bound else []  # room for its name above it
    y_axis = Axis.over(values)
    x_axis = Axis.over([x for s in series for x, _ in s.points], tight=True)
    names = [f"{s.name} {figure(s.line[-1][1])}".strip() for s in series]
    right = WIDTH - min(120, 12 + 6.4 * max(len(name) for name in names))

    def x_at(x: float) -> float:
        return LEFT + x_axis.share(x) * (right - LEFT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - y_axis.share(y) * (HEIGHT - TOP - BOTTOM)

    drawn: list[Markup] = [_grid(y_axis, right, y_at), _steps(x_axis, x_at)]
    if bound:
        y = y_at(bound[1])
        drawn.append(element("line", x1=LEFT, x2=_r(right), y1=_r(y), y2=_r(y), class_="bound"))
        drawn.append(element("text", bound[0], x=LEFT + 4, y=_r(y - 4), class_="tick"))
    for s in series:
        if s.line is not s.points:
            drawn.append(_path(s.points, x_at, y_at, f"line pale c{s.color}"))
        drawn.append(_path(s.line, x_at, y_at, f"line c{s.color}"))
        x, y = s.line[-1]
        drawn.append(element("circle", cx=_r(x_at(x)), cy=_r(y_at(y)), r=2.6, class_=f"dot c{s.color}"))
    ends = [y_at(s.line[-1][1]) for s in series]
    for s, name, y in zip(series, names, _spread(ends), strict=True):
        drawn.append(element("text", name, x=_r(right + 7), y=_r(y + 4), class_=f"label c{s.color}"))
    return _svg(label, drawn)


def stacked_chart(series: Sequence[Series], label: str) -> Markup:
    """Shares of a whole at each step, as stacked bars; the series have the same steps."""
    steps = [x for x, _ in series[0].points]
    per_bar = math.ceil(len(steps) / BARS)
    bars = [range(i, min(i + per_bar, len(steps))) for i in range(0, len(steps), per_bar)]
    right = WIDTH - min(130, 12 + 6.4 * (max(len(s.name) for s in series) + 5))
    width = (right - LEFT) / len(bars)
    height = HEIGHT - TOP - BOTTOM
    axis = Axis(0.0, 100.0, (0.0, 25.0, 50.0, 75.0, 100.0))
    drawn = [_grid(axis, right, lambda y: HEIGHT - BOTTOM - axis.share(y) * height, "%")]
    total = sum(y for s in series for _, y in s.points) or 1.0
    for at, bar in enumerate(bars):
        whole = sum(s.points[i][1] for s in series for i in bar) or 1.0
        top = float(HEIGHT - BOTTOM)
        for s in series:
            part = height * sum(s.points[i][1] for i in bar) / whole
            top -= part
            x = LEFT + at * width
            drawn.append(
                element("rect", x=_r(x), y=_r(top), width=_r(width * 0.86), height=_r(part), class_=f"fill c{s.color}")
            )
    shares = [sum(y for _, y in s.points) / total for s in series]
    bottoms = [sum(shares[:i]) for i in range(len(shares))]
    middles = [HEIGHT - BOTTOM - height * (b + s / 2) for b, s in zip(bottoms, shares, strict=True)]
    for s, share, y in zip(series, shares, _spread(middles), strict=True):
        drawn.append(element("text", f"{s.name} {share:.0%}", x=_r(right + 7), y=_r(y + 4), class_=f"label c{s.color}"))
    drawn.append(element("text", figure(steps[0]), x=LEFT, y=HEIGHT - BOTTOM + 19, class_="tick"))
    drawn.append(element("text", f"step {figure(steps[-1])}", x=_r(right), y=HEIGHT - BOTTOM + 19, class_="tick end"))
    return _svg(label, drawn)


def interval_plot(row: Interval, axis: Axis, *, zero: bool = False) -> Markup:
    """One row of a forest plot: the interval as a bar, the value as a dot; as wide as its place."""

    def at(value: float) -> str:
        return f"{100 * min(max(axis.share(value), 0.0), 1.0):.2f}%"

    drawn = [element("line", x1=at(t), x2=at(t), y1=0, y2="100%", class_="grid") for t in axis.ticks]
    if zero:
        drawn.append(element("line", x1=at(0), x2=at(0), y1=0, y2="100%", class_="zero"))
    drawn.append(element("line", x1=at(row.low), x2=at(row.high), y1="50%", y2="50%", class_=f"bar c{row.color}"))
    drawn.append(element("circle", cx=at(row.value), cy="50%", r=4.5, class_=f"dot c{row.color}"))
    return element("svg", drawn, class_="interval", aria_hidden="true")


def axis_labels(axis: Axis) -> Markup:
    """The ticks of an interval plot, for the row below it."""
    drawn = []
    for tick in axis.ticks:
        share = axis.share(tick)
        anchor = " start" if share < 0.04 else " end" if share > 0.96 else " middle"
        drawn.append(element("text", axis.written(tick), x=f"{100 * share:.2f}%", y=12, class_=f"tick{anchor}"))
    return element("svg", drawn, class_="interval axis", aria_hidden="true")


def _svg(label: str, drawn: Sequence[Markup]) -> Markup:
    return element(
        "svg",
        element("title", label),
        drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def _grid(axis: Axis, right: float, y_at: Callable[[float], float], unit: str = "") -> Markup:
    drawn = []
    for tick in axis.ticks:
        y = _r(y_at(tick))
        drawn.append(element("line", x1=LEFT, x2=_r(right), y1=y, y2=y, class_="grid"))
        drawn.append(element("text", axis.written(tick) + unit, x=LEFT - 7, y=_r(y_at(tick) + 4), class_="tick end"))
    return element("g", drawn)


def _steps(axis: Axis, x_at: Callable[[float], float]) -> Markup:
    y = HEIGHT - BOTTOM + 19
    ticks = [t for t in axis.ticks if t == int(t)]  # a step is whole
    drawn = [element("text", axis.written(t), x=_r(x_at(t)), y=y, class_="tick middle") for t in ticks]
    drawn.append(element("text", "step", x=LEFT - 7, y=y, class_="tick end"))
    return element("g", drawn)


def _path(
    points: Sequence[tuple[float, float]], x_at: Callable[[float], float], y_at: Callable[[float], float], class_: str
) -> Markup:
    return element("path", d="M" + "L".join(f"{_r(x_at(x))},{_r(y_at(y))}" for x, y in points), class_=class_)


def _running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(1, len(points) // 16)
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in w) / len(w)) for (x, _), w in zip(points, windows, strict=True)]


def _spread(heights: Sequence[float]) -> list[float]:
    """Moves labels apart until none covers another, keeping their order and the chart's frame."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    limit = float(TOP)
    for i in order:
        placed[i] = limit = max(placed[i], limit)
        limit += LABEL_GAP
    limit = float(HEIGHT - BOTTOM)
    for i in reversed(order):
        placed[i] = limit = min(placed[i], limit)
        limit -= LABEL_GAP
    return placed


def _r(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
