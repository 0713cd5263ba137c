"""The template teacher: rationales made of facts that can be checked, and the check.

    <think> last T1 ; before T2 . genre v v v . run 2 .</think><answer> title ; attribute</answer>

`last` and `before` are the titles of the newest items, then come the counted attribute's values of
the last three items (oldest first), and `run` says how many of the newest items share the last value.
`TemplateTeacher` writes such text and `statements` holds any text against the history; both read
`facts`. Facts alone stand before the answer and the title leads it: naming the target's
attributes first costs a tiny model accuracy. `decision` adds them all the same, for worlds in
which the attribute decides.
"""

from __future__ import annotations

import re
from itertools import takewhile

from rporec.text.completion import ANSWER, ANSWER_END, THINK, THINK_END
from rporec.text.prompt import MARKER, SEPARATOR, History, ItemWriter

LONGEST_RUN = 5
VALUES = 3  # newest items whose attribute is stated
BLANK = "none"  # stands for an attribute value that the catalogue lacks

_END = re.compile(r"(?:^|\s)[.;](?=\s|$)")


def facts(history: History, writer: ItemWriter) -> dict[str, str]:
    """What the template states of a history (item indices, oldest first): {kind: text}, in order.

    Kinds are "last", "before", the attribute's name and "run", as far as the items and the
    attribute exist. Only items that the prompt shows are stated.
    """
    newest = writer.visible(history)[-max(VALUES, LONGEST_RUN) :]
    stated = {kind: writer.title(item) for kind, item in zip(("last", "before"), reversed(newest), strict=False)}
    if newest and writer.attribute is not None:
        values = [writer.attribute_value(item) or BLANK for item in newest]
        run = sum(1 for _ in takewhile(lambda value: value == values[-1], reversed(values)))
        stated[writer.attribute_name] = " ".join(values[-VALUES:])
        stated["run"] = str(min(run, LONGEST_RUN))
    return stated


def statements(cot: str, history: History, writer: ItemWriter) -> tuple[int, int]:
    """(true, checkable): the statements of a CoT that open with one of the kinds of `facts`.

    Statements end with a lone "." or ";". Equal ones count once, so that repeating a truth changes
    nothing. Any text is accepted; text that is not in the template's words holds nothing checkable.
    """
    truths = [(_normal(kind), _normal(text)) for kind, text in facts(history, writer).items()]
    true, checkable = 0, 0
    for statement in {_normal(part) for part in _END.split(cot)}:
        kind, truth = next(((kind, text) for kind, text in truths if statement.startswith(f"{kind} ")), ("", ""))
        if kind:
            checkable += 1
            true += statement == f"{kind} {truth}"
    return true, checkable


class TemplateTeacher:
    """Writes the rationale of a training sample; free, exact, and short enough for a tiny model.

    decision: also state whether the target's attribute value is among the last ones ("so again V")
        or not ("so new V"). It is read off the target, so it may shape training text only.
    """

    def __init__(self, writer: ItemWriter, decision: bool = False) -> None:
        self.writer = writer
        self.decision = decision

    def rationale(self, history: History, target: int) -> str:
        """The whole completion text for a history (item indices, oldest first) and its next item."""
        stated = facts(history, self.writer)
        titles = " ;".join(f" {kind} {stated[kind]}" for kind in ("last", "before") if kind in stated)
        others = [f" {kind} {text}" for kind, text in stated.items() if kind not in ("last", "before")]
        value = self.writer.attribute_value(target)
        if self.decision and value:
            recent = [self.writer.attribute_value(item) for item in self.writer.visible(history)[-VALUES:]]
            others.append(f" so {'again' if value in recent else 'new'} {value}")
        cot = "".join(f"{part} ." for part in [titles, *others] if part)
        return f"{THINK}{cot}{THINK_END}{ANSWER} {self.writer.short(target)}{ANSWER_END}"


def tokenizer_texts(writer: ItemWriter) -> list[str]:
    """Texts to fit a tiny tokenizer on: every item as prompts and answers hold it, and the template's words."""
    words = " ".join(map(str, range(1, LONGEST_RUN + 1)))
    template = f"{MARKER} last before {writer.attribute_name} run {words} so again new {BLANK} ."
    return [
        f"{SEPARATOR} {writer.short(item)} {writer.attribute_value(item)}{template}"
        for item in range(len(writer.catalog))
    ]


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
