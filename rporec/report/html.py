"""`RUN/report.html`: one self-contained page about a run, finished or not.

Reads what is there (`rporec.report.sources` lists the files) and leaves out the rest with a word.
No script and no network: charts are inline SVG, colours follow the reader's light or dark setting.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from rporec.files import replacing
from rporec.report.markup import Markup, element, join
from rporec.report.results import results
from rporec.report.rollouts import rollouts
from rporec.report.sources import Sources, mapping, number, words
from rporec.report.style import CSS
from rporec.report.training import dropped, gaming, learning, time

SECTIONS = (
    ("results", "Results", results),
    ("learning", "Stage 2, step by step", learning),
    ("gaming", "Is the reward being gamed?", gaming),
    ("rollouts", "The same users before and after RL", rollouts),
    ("time", "Where the time goes", time),
    ("dropped", "Dropped groups", dropped),
)


def write_report(run: Path) -> Path:
    """Write `run/report.html`, all or nothing, and return its path; works on a run of any age."""
    path = Path(run) / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page(Sources.read(Path(run))), encoding="utf-8", errors="replace")
    return path


def page(sources: Sources) -> str:
    """The whole document."""
    sections = [element("section", element("h2", title), body(sources), id=id_) for id_, title, body in SECTIONS]
    sections.append(element("section", element("h2", "Data and config"), _settings(sources), id="config"))
    links = [element("a", title, href=f"#{id_}") for id_, title, _ in SECTIONS]
    links.append(element("a", "Data and config", href="#config"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{sources.name} · rporec"),
        element("style", Markup(CSS)),
    )
    failure = words(sources.status.get("failure"))
    alarm = element("p", f"Stage 2 failed: {failure}", class_="alarm") if failure else None
    header = element("header", element("h1", sources.name), _facts(sources), alarm, element("nav", links))
    body = element("body", element("main", header, sections, _footer(sources)))
    return "<!doctype html>\n" + element("html", head, body, lang="en")


def _facts(sources: Sources) -> Markup:
    seeds = sources.metrics.get("seeds")
    facts = {
        "State": sources.state,
        "Data": _data(sources),
        "Backbone": words(sources.config.get("backbone")),
        "Learner steps": f"{len(sources.steps):,}" if sources.steps else "",
        "Time of all stages": _duration(sum(number(mapping(s).get("seconds")) or 0.0 for s in sources.stages.values())),
        "Seeds": ", ".join(words(s) for s in seeds) if isinstance(seeds, list) else words(sources.config.get("seed")),
        "As of": f"{sources.written:%Y-%m-%d %H:%M} UTC" if sources.written else "",
    }
    return element(
        "dl", [element("div", element("dt", k), element("dd", v)) for k, v in facts.items() if v], class_="facts"
    )


def _data(sources: Sources) -> str:
    data = mapping(sources.metrics.get("dataset"))
    given = words(mapping(sources.config.get("data")).get("path"))
    name = words(data.get("name")) or (Path(given).name if given else "synthetic")
    sizes = [f"{size:,.0f} {noun}" for noun in ("users", "items", "interactions") if (size := number(data.get(noun)))]
    return ", ".join([name, *sizes])


def _duration(seconds: float) -> str:
    if seconds <= 0:
        return ""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"


def _settings(sources: Sources) -> Markup:
    data = mapping(sources.metrics.get("dataset"))
    parts = []
    for title, content in (("Data", data), ("Config", sources.config)):
        if content:
            written = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
            parts.append(element("details", element("summary", title), element("pre", written)))
        else:
            parts.append(element("p", f"{title}: nothing written yet.", class_="absent"))
    return join(parts)


def _footer(sources: Sources) -> Markup | None:
    if not sources.problems:
        return None
    shown = "; ".join(sources.problems[:5]) + (
        f"; and {len(sources.problems) - 5} more" if len(sources.problems) > 5 else ""
    )
    return element("footer", element("p", f"Left out: {shown}."))
