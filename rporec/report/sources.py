"""What a run directory has to tell, read so that nothing in it can break the report.

A run may be half done, cut off in the middle of a line, or written by a newer version: what cannot
be read is left out and named in `problems`, and every value is asked for with `number`, `mapping`
or `records`, which answer None or empty for anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILES = (
    "status.json",
    "config.json",
    "stages.json",
    "steps.jsonl",
    "validation.jsonl",
    "rollouts.json",
    "metrics.json",
)


@dataclass(frozen=True)
class Sources:
    """The files of one run; what is missing is empty."""

    name: str
    status: dict[str, Any]  # the controller's last word
    config: dict[str, Any]
    stages: dict[str, Any]
    steps: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    metrics: dict[str, Any]
    written: datetime | None  # of the newest file
    problems: tuple[str, ...]

    @classmethod
    def read(cls, run: Path) -> Sources:
        problems: list[str] = []
        found = [path for path in (run / name for name in FILES) if path.is_file()]
        plain = {p.name: _json(p.name, _text(p), problems) for p in found if p.suffix == ".json"}
        lines = {p.name: _json_lines(p, problems) for p in found if p.suffix == ".jsonl"}
        config = mapping(plain.get("config.json"))
        newest = max((path.stat().st_mtime for path in found), default=None)
        name = config.get("name")
        return cls(
            name=name if isinstance(name, str) and name else run.resolve().name,
            status=mapping(plain.get("status.json")),
            config=config,
            stages=mapping(plain.get("stages.json")),
            steps=_in_order(lines.get("steps.jsonl", [])),
            validation=_in_order(lines.get("validation.jsonl", [])),
            rollouts=records(plain.get("rollouts.json")),
            metrics=mapping(plain.get("metrics.json")),
            written=None if newest is None else datetime.fromtimestamp(newest, UTC),
            problems=tuple(problems),
        )

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        if self.metrics:
            return "evaluated"
        state, planned = words(self.status.get("state")).lower(), number(self.config.get("steps"))
        if self.steps:
            at = f"step {step_of(self.steps[-1]):,.0f}" + (f" of {planned:,.0f}" if planned else "")
            return f"stage 2 {state}, {at}" if state else f"stage 2, {at}"
        if self.stages:
            return f"{list(self.stages)[-1]} done"
        return "begun" if self.written else "empty"


def number(value: Any) -> float | None:
    """A number that can be drawn (|x| < 1e30), or None; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # NaN compares false


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def words(value: Any) -> str:
    """Any value as one line of text; '' for None."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def dig(record: Any, *path: str) -> Any:
    """The value under nested keys, or None."""
    for key in path:
        record = mapping(record).get(key)
    return record


def step_of(record: dict[str, Any]) -> float:
    return number(record.get("step")) or 0.0


def points(lines: Iterable[dict[str, Any]], *path: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have a number under these nested keys."""
    pairs = ((step_of(line), number(dig(line, *path))) for line in lines)
    return [(step, value) for step, value in pairs if value is not None]


def keys(lines: Iterable[dict[str, Any]], *path: str) -> list[str]:
    """The keys of the mappings found at `path`, in the order of their first appearance."""
    return list(dict.fromkeys(key for line in lines for key in mapping(dig(line, *path))))


def _in_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {step_of(line): line for line in lines}  # the last line of a step counts
    return [by_step[step] for step in sorted(by_step)]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _json(where: str, text: str, problems: list[str]) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        problems.append(f"{where} is not valid JSON")
        return None


def _json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    lines = [(at, line) for at, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    return records([_json(f"{path.name}, line {at},", line, problems) for at, line in lines])
