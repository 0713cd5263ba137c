"""What a running command shows: one live table for stage 2, one progress bar for everything else.

On a terminal they redraw in place; where there is none (a CI log, a file) they print plain lines,
one for each step or every few seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rporec.files import read_lines
from rporec.report.sources import dig, mapping, number, records, words
from rporec.status import STATES


def say(console: Console, text: str) -> None:
    """Print text as it is, however long a line and whatever is in it."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


class LiveTable:
    """Stage 2 at a glance; `update` it as often as you like.

    steps: planned learner steps. max_staleness: its bound, in versions. Used as a context manager.
    """

    def __init__(self, steps: int, max_staleness: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._steps, self._bound = steps, max_staleness
        self._status: dict[str, Any] = {}
        self._step: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        self._best: float | None = None
        self._printed: tuple[Any, Any] | None = None
        self._began = time.monotonic()
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(
        self,
        status: dict[str, Any],
        step: dict[str, Any] | None = None,
        validation: dict[str, Any] | None = None,
    ) -> None:
        """status: as of `rporec status --json`. step, validation: newest lines of their JSONL files, if any."""
        self._status = status
        if validation is not None:
            self._validation = validation
            values = [v for v in (self._best, number(validation.get("ndcg@10"))) if v is not None]
            self._best = max(values, default=None)
        if step is not None:
            self._step = step
            key = (step.get("attempt"), step.get("step"))
            if not self.console.is_terminal and key != self._printed:
                say(self.console, self.plain())
                self._printed = key

    def plain(self) -> str:
        """The state as one line of text."""
        parts = [f"step {self._at()}/{self._steps}", f"version {words(self._version())}", *self._learning()]
        staleness = self._staleness()
        parts += [f"staleness {staleness}" if staleness else "", self._tokens(), *self._shares()[:1]]
        drops = self._drops()
        return "  ".join([p for p in parts if p] + ([f"dropped: {drops}"] if drops else []))

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        seconds = int(time.monotonic() - self._began)
        head = Table.grid(padding=(0, 2))
        clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        head.add_row(
            Text(f"{self._at()}/{self._steps}", style="bold"),
            ProgressBar(total=max(self._steps, 1), completed=self._at(), width=28),
            f"version {words(self._version())}",
            words(self._status.get("state")).lower(),
            Text(clock, style="dim"),
        )
        table.add_row("step", head)
        rows = {
            "learning": self._learning(),
            "staleness": [self._staleness()],
            "speed": [self._tokens()],
            "time": self._shares(),
            "groups": self._groups(),
            "dropped": [self._drops()],
            "actors": self._actors(),
        }
        for name, cells in rows.items():
            written = "   ".join(cell.lower() if name == "actors" else cell for cell in cells if cell)
            table.add_row(name, Text(written or "–"))
        return table

    def _at(self) -> int:
        at = number(self._status.get("step"))
        return int(at if at is not None else number(self._step.get("step")) or 0)

    def _version(self) -> Any:
        return self._status.get("version", self._step.get("version"))

    def _learning(self) -> list[str]:
        reward, ndcg = number(self._step.get("reward_mean")), number(dig(self._step, "reward_parts", "ndcg"))
        validation = number(self._validation.get("ndcg@10"))
        cells = [f"reward {reward:.3f}" if reward is not None else "", f"ndcg {ndcg:.3f}" if ndcg is not None else ""]
        if validation is not None:
            best = f" (best {self._best:.3f})" if self._best is not None and self._best > validation else ""
            cells.append(f"validation {validation:.3f}{best}")
        return cells

    def _staleness(self) -> str:
        mean, worst = number(self._step.get("staleness_mean")), number(self._step.get("staleness_max"))
        if mean is None or worst is None:
            return ""
        return f"mean {mean:.2f} max {worst:.0f} of {self._bound}"

    def _tokens(self) -> str:
        rate = number(self._step.get("tokens_per_second"))
        return "" if rate is None else f"{rate:,.0f} tokens/s"

    def _shares(self) -> list[str]:
        """Parts of the learner's last step, the wait first."""
        parts = {k: number(v) for k, v in mapping(self._step.get("seconds")).items() if k != "total"}
        known = {name: seconds for name, seconds in parts.items() if seconds is not None}
        total = sum(known.values())
        order = sorted(known, key=lambda name: name != "wait")
        return [f"{name} {known[name] / total:.0%}" for name in order] if total > 0 else []

    def _groups(self) -> list[str]:
        groups = mapping(self._status.get("groups"))
        return [f"{s.lower()} {n:,.0f}" for s in STATES if (n := number(groups.get(s))) is not None]

    def _drops(self) -> str:
        reasons = mapping(dig(self._status, "groups", "DROPPED"))
        counts = {reason: number(n) or 0 for reason, n in reasons.items()}
        return ", ".join(f"{reason} {n:,.0f}" for reason, n in counts.items() if n)

    def _actors(self) -> list[str]:
        states: dict[str, Counter[str]] = {}
        for actor in records(self._status.get("actors")):
            states.setdefault(words(actor.get("role")), Counter())[words(actor.get("state"))] += 1
        return [f"{role} " + ", ".join(f"{n} {state}".strip() for state, n in c.items()) for role, c in states.items()]


class Progress:
    """What `progress` yields: how much is done, and how fast."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.note = description, total, ""
        self.done, self.tokens = 0, 0
        self.began = time.monotonic()

    def update(
        self,
        done: int | None = None,
        *,
        total: int | None = None,
        tokens: int | None = None,
        description: str | None = None,
        note: str | None = None,
    ) -> None:
        """Set what is given and keep the rest: counts so far, not increments; `tokens` makes the rate tokens/s."""
        self.done = self.done if done is None else int(done)
        self.total = self.total if total is None else int(total)
        self.tokens = self.tokens if tokens is None else int(tokens)
        self.description = self.description if description is None else description
        self.note = self.note if note is None else note
        self._show()

    @property
    def rate(self) -> str:
        """Mean rate since the start, as text; empty before anything is done."""
        seconds = time.monotonic() - self.began
        speed = (self.tokens or self.done) / seconds if seconds > 0 else 0.0
        written = f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
        return f"{written}{' tokens' if self.tokens else ''}/s" if speed else ""

    def _show(self) -> None: ...


class _Bar(Progress):
    def __init__(self, description: str, total: int | None, bar: RichProgress) -> None:
        super().__init__(description, total)
        self._bar = bar
        self._task = bar.add_task(escape(description), total=total, rate="", note="")

    def _show(self) -> None:
        self._bar.update(
            self._task,
            description=escape(self.description),
            total=self.total,
            completed=self.done,
            rate=self.rate,
            note=escape(self.note),
        )


class _Lines(Progress):
    def __init__(self, description: str, total: int | None, console: Console, every: float) -> None:
        super().__init__(description, total)
        self._console, self._every, self._last = console, every, self.began

    def _show(self) -> None:
        if time.monotonic() - self._last >= self._every:
            self.line()

    def line(self) -> None:
        self._last = time.monotonic()
        of = f"/{self.total:,}" if self.total is not None else ""
        count = f"{self.done:,}{of}" if self.done or of else ""
        cells = [cell for cell in (count, self.rate, self.note, f"{self._last - self.began:.0f} s") if cell]
        say(self._console, f"{self.description}: {', '.join(cells)}")


@contextmanager
def progress(
    description: str, total: int | None = None, *, console: Console | None = None, every: float = 15.0
) -> Iterator[Progress]:
    """A bar with count, rate, times and a note; total: None when it is not known (yet).

    Without a terminal: a line when something changes and the last is `every` seconds old, and one at the end.
    """
    console = console or Console()
    if not console.is_terminal:
        lines = _Lines(description, total, console, every)
        try:
            yield lines
        finally:
            lines.line()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(28),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as bar:
        yield _Bar(description, total, bar)


@contextmanager
def following(
    log: Path, show: Callable[[Progress, dict[str, Any]], None], description: str, total: int | None, console: Console
) -> Iterator[Callable[[], None]]:
    """A bar that shows the newest line of a JSONL file, whenever what is yielded is called and at the end."""
    with progress(description, total, console=console) as bar:

        def watch() -> None:
            if lines := read_lines(log):
                show(bar, lines[-1])

        yield watch
        watch()
