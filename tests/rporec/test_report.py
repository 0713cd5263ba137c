import io
import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rporec.report.html import write_report
from rporec.report.live import LiveTable, progress
from rporec.report.sources import FILES, Sources
from rporec.report.svg import Axis, Series, line_chart

HOSTILE = '<script>alert("x")</script> & "quotes"'


def step(at: int, **more) -> dict:
    return {
        "attempt": 0,
        "step": at,
        "version": at,
        "reward_mean": 0.3 + at / 100,
        "reward_parts": {"format": 1.0, "ndcg": 0.2, HOSTILE: 0.1},
        "loss": -0.01 * at,
        "kl": 0.001 * at,
        "entropy": 1 / at,
        "staleness_mean": 0.5,
        "staleness_max": 1,
        "ratio_stats": {"mean": 1.0, "p99": 1.2, "ess": 0.9, "masked": 0.0},
        "engine_mismatch": {"mean": 1e-6, "max": 1e-5},
        "tokens": 1000,
        "tokens_per_second": 500.0,
        "dropped": {"stale": at, HOSTILE: 2},
        "reward_worker_busy": 0.2,
        "seconds": {"wait": 1, "forward": 1, "backward": 1, "publish": 0.5, "reward": 0.25, "other": 0.25, "total": 4},
        "gaming": {"seen_answers": 0.1, "statement_truth": 0.8, "distinct_answers": 20, "flat_groups": 0.1},
        **more,
    }


def entry(value: float) -> dict:
    return dict.fromkeys(("ndcg@10", "hr@10"), value) | {
        f"{m}_ci": [value - 0.1, value + 0.1] for m in ("ndcg@10", "hr@10")
    }


FULL = {
    "status.json": {"state": "FAILED", "step": 3, "failure": HOSTILE},
    "config.json": {"name": "trial " + HOSTILE, "steps": 3, "max_staleness": 1, "backbone": HOSTILE, "note": HOSTILE},
    "stages.json": {HOSTILE: {"seconds": 3.0, "cpu_seconds": 4.0, "peak_rss_mb": 900}},
    "steps.jsonl": [step(1), step(2), step(3)],
    "validation.jsonl": [{"step": 0, "version": 0, "ndcg@10": 0.4}, {"step": 2, "ndcg@10": 0.5, "seen_answers": 0.1}],
    "rollouts.json": [
        {
            "user_id": HOSTILE,
            "history": [HOSTILE],
            "target": HOSTILE,
            "before": {"cot": HOSTILE, "answer": HOSTILE, "rank": 12},
            "after": {"cot": "better", "answer": "The Answer", "rank": 2.5},
        }
    ],
    "metrics.json": {
        "dataset": {"name": HOSTILE, "users": 9},
        "split": "test",
        "seeds": [0],
        "headline": "exclude_history",
        "conventions": {
            "exclude_history": {
                "samples": 9,
                "users": 9,
                "methods": {"rporec_stage1": entry(0.4), "rporec_stage2": entry(0.5), HOSTILE: entry(0.2)},
                "paired": {
                    "rporec_stage2-rporec_stage1": {"ndcg@10": 0.1, "ci": [0.05, 0.15]},
                    f"{HOSTILE}-x": {"ndcg@10": 0.1, "ci": [-0.05, 0.15]},
                },
                "cold": {"samples": 2, "methods": {"rporec_stage1": entry(0.1)}},
                "by_popularity": {
                    "tail": {"samples": 5, "methods": {HOSTILE: {**entry(0.3), "coverage@10": 0.25}}},
                    HOSTILE: {"samples": 2, "methods": {}},
                },
            },
            "all": {"methods": {"rporec_stage2": entry(0.45)}},
        },
    },
}


def save(run: Path, files: dict) -> None:
    for name, content in files.items():
        lines = content if name.endswith(".jsonl") and isinstance(content, list) else [content]
        (run / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")


class Tags(HTMLParser):
    """Every tag that is opened is closed in turn; collects what the page would load or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href") and v]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_full_run_is_told_whole_and_every_text_is_escaped(tmp_path):
    save(tmp_path, FULL)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert not list(tmp_path.glob("*.tmp"))
    page = path.read_text(encoding="utf-8")
    tags = Tags(page)
    assert re.search(r"stale</th><td>3<", page)  # counts since the start: the last step's stand
    assert "script" not in tags.seen
    assert all(address.startswith("#") for address in tags.addresses)  # nothing is fetched
    assert "http" not in page
    assert page.count("&lt;script&gt;") >= 12
    for told in ("0.500", "[+0.050, +0.150]", "Flat groups", "bound 1", "The Answer", "rank 12 → 2.5", "wait 25%"):
        assert told in page, told
    assert "Not recorded" not in page
    assert "Left out" not in page


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_costs_its_sections_alone(tmp_path, name):
    save(tmp_path, {k: v for k, v in FULL.items() if k != name})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    Tags(page)
    others = {
        "metrics.json": "Not evaluated yet",
        "rollouts.json": "No rollouts were saved",
        "steps.jsonl": "Not recorded: mean reward",
    }
    for file, words in others.items():
        assert (words in page) == (file == name)


def test_an_empty_folder_still_has_a_report(tmp_path):
    page = write_report(tmp_path).read_text(encoding="utf-8")
    Tags(page)
    assert "empty" in page
    assert "Not evaluated yet" in page


def test_a_line_cut_off_by_a_crash_is_named_and_the_others_are_used(tmp_path):
    save(tmp_path, FULL)
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "steps.jsonl, line 4, is not valid JSON" in page
    assert len(Sources.read(tmp_path).steps) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)


def paths(value, at=()):
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*at, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@given(st.lists(st.tuples(st.sampled_from(list(paths(FULL))[1:]), json_values), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_of_an_unexpected_kind_breaks_the_report(changes):
    files = FULL
    for path, value in changes:
        if path in set(paths(files)):
            files = replaced(files, path, value)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), files)
        Tags(write_report(Path(folder)).read_text(encoding="utf-8"))


def test_reward_that_rises_while_validation_falls_is_said_aloud(tmp_path):
    validation = [{"step": s, "ndcg@10": v} for s, v in ((1, 0.40), (5, 0.50), (12, 0.30))]
    save(tmp_path, {"steps.jsonl": [step(s) for s in range(1, 13)], "validation.jsonl": validation})
    assert "the reward is being gamed" in write_report(tmp_path).read_text(encoding="utf-8")
    validation[-1]["ndcg@10"] = 0.49
    save(tmp_path, {"validation.jsonl": validation})
    assert "the reward is being gamed" not in write_report(tmp_path).read_text(encoding="utf-8")


@given(st.lists(st.floats(-1e29, 1e29), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_a_chart_draws_any_numbers_inside_its_frame(values):
    axis = Axis.over(values)
    assert len(axis.ticks) < 12
    drawn = line_chart([Series("a", list(enumerate(values)), 0), Series("b", [(0.0, values[0])], 1)], "any")
    assert "nan" not in drawn
    assert "inf" not in drawn
    heights = [float(y) for path in re.findall(r' d="M([^"]*)"', drawn) for y in re.findall(r",(-?[\d.]+)", path)]
    assert all(0 <= y <= 210 for y in heights)


def test_neighbouring_ticks_are_written_apart():
    axis = Axis.over([0.3201, 0.3299])
    assert [axis.written(t) for t in axis.ticks] == ["0.32", "0.3225", "0.325", "0.3275", "0.33"]
    assert Axis.over([0.0, -3e-6]).written(-3e-6) == "−3e−6"


STATUS = {
    "state": "running",
    "step": 2,
    "version": 2,
    "groups": {"PENDING": 1, "RUNNING": 7, "READY": 3, "DROPPED": {"stale": 4, "flat": 0}},
    "actors": [
        {"role": "rollout", "state": "alive"},
        {"role": "rollout", "state": "starting"},
        {"role": "learner", "state": "alive"},
    ],
}


def test_without_a_terminal_each_step_is_one_plain_line():
    out = io.StringIO()
    with LiveTable(steps=30, max_staleness=1, console=Console(file=out, width=60)) as live:
        live.update(STATUS)
        live.update(STATUS, step(2), {"ndcg@10": 0.5})
        live.update(STATUS, step(2))
        live.update(STATUS | {"step": 3, "version": 3}, step(3), {"ndcg@10": 0.4})
    first, second = out.getvalue().splitlines()
    assert first == (
        "step 2/30  version 2  reward 0.320  ndcg 0.200  validation 0.500  staleness mean 0.50 max 1 of 1  "
        "500 tokens/s  wait 25%  dropped: stale 4"
    )
    assert "validation 0.400 (best 0.500)" in second
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_the_table_shows_groups_drops_and_actors():
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=True, color_system=None, _environ={})
    with LiveTable(steps=30, max_staleness=1, console=console) as live:
        live.update(STATUS, step(2), {"ndcg@10": 0.5})
    text = out.getvalue()
    for told in (
        "2/30",
        "pending 1   running 7   ready 3",
        "stale 4",
        "rollout 1 alive, 1 starting",
        "wait 25%   forward 25%",
    ):
        assert told in text, told
    assert "flat" not in text


def test_progress_without_a_terminal_ends_with_count_and_rate():
    out = io.StringIO()
    with progress("rationales", 100, console=Console(file=out)) as bar:
        for done in range(2, 101, 2):
            bar.update(done, tokens=1000 * done)
    (line,) = out.getvalue().splitlines()
    assert re.fullmatch(r"rationales: 100/100, [\d,]+ tokens/s, 0 s", line)


def test_progress_lines_say_what_changed():
    out = io.StringIO()
    with progress("RecHead", console=Console(file=out), every=0.0) as bar:
        bar.update(3, total=20, note="loss [0.5]")
        bar.update(description="ranking")
    lines = [re.sub(r"[\d.,]+/s", "R/s", line) for line in out.getvalue().splitlines()]
    assert lines == ["RecHead: 3/20, R/s, loss [0.5], 0 s", *["ranking: 3/20, R/s, loss [0.5], 0 s"] * 2]


def test_progress_on_a_terminal_draws_a_bar_with_its_rate():
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=True, color_system=None, _environ={})
    with progress("training", console=console) as bar:
        bar.update(4, total=4, tokens=80, note="loss [0.5]")
    for told in ("training", "4/4", "tokens/s", "loss [0.5]"):
        assert told in out.getvalue(), told
