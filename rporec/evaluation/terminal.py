"""What `metrics.json` holds, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rporec.evaluation.table import IN_WORDS


def print_table(summary: dict[str, Any], console: Console) -> None:
    """The headline convention as a table with 95 % intervals, and the paired differences below it."""
    convention = summary["headline"]
    part = summary["conventions"].get(convention)
    if not part:
        console.print(f"No ranks in the convention {convention}.")
        return
    kept = IN_WORDS[convention]
    title = f"{summary['split']}: {part['samples']:,} samples of {part['users']:,} users, whole catalogue, {kept}"
    further: tuple[str, ...] = ("ndcg@5", "hr@5", "ndcg@20", "hr@20") if console.width >= 108 else ()
    if console.width >= 134:
        further += tuple(m for m in ("coverage@10", "diversity@10") if any(m in e for e in part["methods"].values()))
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for metric in ("ndcg@10", "hr@10", *further):
        table.add_column(metric.upper(), justify="right", no_wrap=True)
    best = max(entry["ndcg@10"] for entry in part["methods"].values())
    for method, entry in part["methods"].items():
        cells = [_with_interval(entry[m], entry[f"{m}_ci"]) for m in ("ndcg@10", "hr@10")]
        cells += [f"{entry[m]:.3f}" if m in entry else "–" for m in further]
        table.add_row(method, *cells, style="bold" if entry["ndcg@10"] == best else "")
    console.print(table)
    if part["paired"]:
        title = "Paired differences on the same samples"
        table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
        table.add_column("A − B", no_wrap=True)
        for heading in ("NDCG@10", "HR@10")[: 2 if console.width >= 108 else 1]:
            table.add_column(heading, justify="right", no_wrap=True)
        for pair, entry in part["paired"].items():
            clear = entry["ci"][0] > 0 or entry["ci"][1] < 0
            cells = [
                _with_interval(entry[m], entry[ci], sign="+") for m, ci in (("ndcg@10", "ci"), ("hr@10", "hr@10_ci"))
            ]
            table.add_row(pair.replace("-", " − ", 1), *cells[: len(table.columns) - 1], style="" if clear else "dim")
        console.print(table)
        console.print("Brackets: 95 % bootstrap over users. Dim: the interval of the NDCG difference holds 0.")
    _print_by_popularity(part.get("by_popularity", {}), console)
    if part.get("cold", {}).get("samples"):
        cold = part["cold"]
        listed = ", ".join(f"{method} {entry['ndcg@10']:.3f}" for method, entry in cold["methods"].items())
        console.print(f"NDCG@10 on the {cold['samples']:,} targets that training never showed: {listed}")


def _print_by_popularity(strata: dict[str, Any], console: Console) -> None:
    """NDCG@10 of every method by how often train has the target."""
    strata = {name: part for name, part in strata.items() if part["samples"]}
    if not strata:
        return
    table = Table(
        title="NDCG@10 by the target's popularity in train", title_justify="left", title_style="", box=SIMPLE_HEAD
    )
    table.add_column("method", no_wrap=True)
    for name, part in strata.items():
        table.add_column(f"{name} ({part['samples']:,})", justify="right", no_wrap=True)
    for method in next(iter(strata.values()))["methods"]:
        cells = [part["methods"].get(method, {}).get("ndcg@10") for part in strata.values()]
        table.add_row(method, *("–" if value is None else f"{value:.3f}" for value in cells))
    console.print(table)


def _with_interval(value: float, interval: Sequence[float], sign: str = "") -> str:
    low, high = interval
    return rf"{value:{sign}.3f} \[{low:{sign}.3f}, {high:{sign}.3f}]"
