"""Sections of the report that follow stage 2 over its steps: learning, gaming, time, dropped groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rporec.report.markup import Markup, element, join, table
from rporec.report.sources import Sources, dig, keys, mapping, number, points, step_of
from rporec.report.svg import Series, figure, line_chart, stacked_chart

SECONDS = ("wait", "forward", "backward", "publish", "reward", "other")

GAMING = (
    (
        "seen_answers",
        "Answers already seen",
        "Share of answers that name an item the user already has. If it rises with the reward, the policy has "
        "found that removing seen items lifts the target.",
    ),
    (
        "statement_truth",
        "Truth of checkable statements",
        "Share of the CoT's checkable statements that hold for the history. If it falls, the words have become a "
        "private code between policy and head.",
    ),
    (
        "distinct_answers",
        "Distinct answers",
        "How varied the answers are. If it falls, everyone is told the same: prototype collapse.",
    ),
    (
        "flat_groups",
        "Flat groups",
        "Share of groups whose completions all earned the same reward. Such a group teaches nothing; near 1 "
        "learning has stopped.",
    ),
    (
        "entropy",
        "Entropy",
        "Mean entropy of the next token, in nats. Near 0 nothing is explored any more; a sudden rise means that "
        "the text is falling apart.",
    ),
)


def card(title: str, chart: Markup, note: str = "") -> Markup:
    return element("figure", element("figcaption", title), chart, element("p", note) if note else None, class_="card")


def grid(cards: Sequence[Markup | None], absent: Sequence[str]) -> Markup:
    """The charts that there are, and one line that names those that there are not."""
    drawn = [c for c in cards if c is not None]
    missing = element("p", f"Not recorded: {', '.join(absent)}.", class_="absent") if absent else None
    return join([element("div", drawn, class_="cards") if drawn else None, missing])


def learning(sources: Sources) -> Markup:
    """Curves of stage 2: what it is paid, what validation says, and how far off-policy it runs."""
    steps, bound = sources.steps, number(sources.config.get("max_staleness"))
    plans: list[tuple[str, list[Series], str]] = [
        ("Mean reward", [Series("", points(steps, "reward_mean"), 2)], "What a completion earns on average."),
        (
            "Parts of the reward",
            [
                Series(name, points(steps, "reward_parts", name), i)
                for i, name in enumerate(keys(steps, "reward_parts"))
            ],
            "",
        ),
        ("Validation NDCG@10", [Series("", points(sources.validation, "ndcg@10"), 0)], _best(sources)),
        ("Loss", [Series("", points(steps, "loss"), 6)], ""),
        ("KL to the policy before RL", [Series("", points(steps, "kl"), 3)], "In nats a token."),
        ("Entropy", [Series("", points(steps, "entropy"), 4)], "Of the next token, in nats."),
        (
            "Staleness",
            [
                Series("mean", points(steps, "staleness_mean"), 0),
                Series("max", points(steps, "staleness_max"), 1, False),
            ],
            "Versions between the oldest token of a group and its learner step.",
        ),
        (
            "Engine mismatch",
            _one_or_many(sources, "engine_mismatch", ("mean", "max")),
            "|log p of the learner − log p of the sampler| with the same weights, in nats.",
        ),
        (
            "Importance ratio",
            _one_or_many(sources, "ratio_stats", ("mean", "p99")),
            "Learner's probability of a token over the sampler's; 1 is on-policy.",
        ),
        (
            "Effective sample",
            _one_or_many(sources, "ratio_stats", ("ess", "clipped", "masked", "stale_tokens")),
            "Effective sample size, and shares that the correction caps or masks, or that are stale, all of 1.",
        ),
        ("Tokens a second", [Series("", points(steps, "tokens_per_second"), 2)], ""),
        ("Reward workers, share of time busy", [Series("", points(steps, "reward_worker_busy"), 4)], ""),
    ]
    cards, absent = [], []
    for title, series, note in plans:
        if any(s.points for s in series):
            limit = (f"bound {figure(bound)}", bound) if title == "Staleness" and bound is not None else None
            cards.append(card(title, line_chart(series[:8], title, bound=limit), note))
        else:
            absent.append(title[0].lower() + title[1:])
    alarm = _alarm(sources)
    return join([element("p", alarm, class_="alarm") if alarm else None, grid(cards, absent)])


def _one_or_many(sources: Sources, key: str, names: Sequence[str]) -> list[Series]:
    """A number at every step, or these numbers of a mapping."""
    single = points(sources.steps, key)
    if single:
        return [Series("", single, 5)]
    return [Series(n.replace("_", " "), points(sources.steps, key, n), i) for i, n in enumerate(names)]


def _best(sources: Sources) -> str:
    values = points(sources.validation, "ndcg@10")
    if not values:
        return ""
    step, value = max(values, key=lambda point: point[1])
    return f"Same users every time, greedy. Best {figure(value)} at step {figure(step)}."


def _alarm(sources: Sources) -> str | None:
    """In words, when the reward went on rising while validation fell by more than 5 %."""
    validation, reward = points(sources.validation, "ndcg@10"), points(sources.steps, "reward_mean")
    if len(validation) < 3 or len(reward) < 6:
        return None
    step, best = max(validation, key=lambda point: point[1])
    before = [value for at, value in reward if at <= step][-5:]
    if not before or step == validation[-1][0] or validation[-1][1] > 0.95 * best:
        return None
    then, now = sum(before) / len(before), sum(value for _, value in reward[-5:]) / 5
    if now <= then:
        return None
    return (
        f"Since step {figure(step)} the reward rose from {figure(then)} to {figure(now)} while validation NDCG@10 fell "
        f"from {figure(best)} to {figure(validation[-1][1])}: the reward is being gamed."
    )


def gaming(sources: Sources) -> Markup:
    """One curve for each way in which RL gets gamed, with how to read it."""
    cards, absent = [], []
    for key, title, reading in GAMING:
        # a figure of the whole step says more than the mean over its groups
        training = points(sources.steps, key) or points(sources.steps, "gaming", key)
        series = [Series("training", training, 0), Series("validation", points(sources.validation, key), 1)]
        series = [s for s in series if s.points]
        if series:
            cards.append(card(title, line_chart(series, title), reading))
        else:
            absent.append(title.lower())
    return grid(cards, absent)


def time(sources: Sources) -> Markup:
    """Where the learner's wall clock goes, and what each stage cost."""
    parts: list[Markup] = []
    timed = [line for line in sources.steps if any(number(dig(line, "seconds", k)) is not None for k in SECONDS)]
    if timed:
        series = [
            Series(k, [(step_of(line), max(number(dig(line, "seconds", k)) or 0.0, 0.0)) for line in timed], i)
            for i, k in enumerate(SECONDS)
        ]
        totals = {s.name: sum(y for _, y in s.points) for s in series}
        rows = [(name, f"{seconds:,.1f} s", f"{seconds / len(timed):.2f} s") for name, seconds in totals.items()]
        rows.append(("total", f"{sum(totals.values()):,.1f} s", f"{sum(totals.values()) / len(timed):.2f} s"))
        parts.append(card("Learner, share of each step", stacked_chart(series, "Time of the learner by part")))
        parts.append(card(f"Learner, {len(timed):,} steps", table(("part", "all steps", "a step"), rows)))
    stages = []
    for stage, cost in sources.stages.items():
        seconds, cpu, peak = (number(mapping(cost).get(k)) for k in ("seconds", "cpu_seconds", "peak_rss_mb"))
        stages.append((stage, _with_unit(seconds, "s"), _with_unit(cpu, "s"), _with_unit(peak, "MB")))
    if stages:
        shown = 4 if any(row[3] != "–" for row in stages) else 3
        header = ("stage", "wall", "CPU", "peak memory")[:shown]
        parts.append(card("Stages", table(header, [row[:shown] for row in stages])))
    absent = [name for name, there in (("learner seconds", timed), ("cost of the stages", stages)) if not there]
    return grid(parts, absent)


def dropped(sources: Sources) -> Markup:
    """Groups that were dropped since the start of stage 2, by reason; a step's counts include those before it."""
    counted = [mapping(line["dropped"]) for line in sources.steps if "dropped" in line]
    if not counted:
        return grid([], ["dropped groups"])
    counts = Counter({reason: int(number(count) or 0) for reason, count in counted[-1].items()})
    if not +counts:
        return element("p", "No group was dropped.")
    rows = [(reason.replace("_", " "), f"{count:,}") for reason, count in counts.most_common() if count > 0]
    return table(("reason", "groups"), rows)


def _with_unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
