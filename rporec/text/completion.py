"""How a completion is cut into its five pieces; standard library only, since every process parses.

    pre <think> cot </think> mid <answer> answer </answer> post

A completion is well formed (`format` 1) if each of the four tags occurs exactly once in the whole
text, in this order. A repeated or nested tag, wherever it stands, makes it malformed: otherwise a
policy could hide text in a second block that the head never reads and no penalty counts. Tags are
case sensitive and hold no blanks. A malformed completion is all CoT (RPORec, "Text format").
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

TAGS = THINK, THINK_END, ANSWER, ANSWER_END = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Completion:
    """`text` and its pieces. They rejoin to it with the tags between (format 1), or as `cot` alone (format 0); of
    `answer_alone` as `answer`."""

    text: str
    pre: str
    cot: str
    mid: str
    answer: str
    post: str
    format: int  # 1 or 0

    @property
    def cot_start(self) -> int:
        """Offset of the CoT's first character in `text`."""
        return len(self.pre) + len(THINK) if self.format else 0


def parse(text: str) -> Completion:
    """Cut a completion; never raises, whatever the text."""
    at = [text.find(tag) for tag in TAGS]
    if at != sorted(at) or any(text.count(tag) != 1 for tag in TAGS):
        return Completion(text, pre="", cot=text, mid="", answer="", post="", format=0)
    pre, rest = text.split(THINK)
    cot, rest = rest.split(THINK_END)
    mid, rest = rest.split(ANSWER)
    answer, post = rest.split(ANSWER_END)
    return Completion(text, pre, cot, mid, answer, post, format=1)


def answer_alone(text: str) -> Completion:
    """A completion that is nothing but an answer, well formed without tags."""
    return Completion(text, pre="", cot="", mid="", answer=text, post="", format=1)


def cot_token_span(pieces: Sequence[str]) -> tuple[int, int]:
    """Tokens of the CoT as the index range [start, end), from the text of each token.

    `pieces` must rejoin to the completion (see `rporec.text.tokenizer.token_pieces`). A token that
    straddles a tag counts as inside if it holds a character of the CoT; an empty piece (the first
    bytes of a character) goes with the character that it begins. Format 0: all tokens.
    """
    completion = parse("".join(pieces))
    if not completion.format:
        return 0, len(pieces)
    ends = list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    first_character, after_last = completion.cot_start, completion.cot_start + len(completion.cot)
    first = bisect_left(starts, first_character)
    if not completion.cot:
        return first, first
    if ends[first - 1] > first_character:
        first -= 1
    return first, bisect_left(starts, after_last)
