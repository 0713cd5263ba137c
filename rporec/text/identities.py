"""What stands for an item where the LLM writes items themselves (ReRe): a text that no other item has.

A title, made distinct where several items share it, or a semantic ID (`rporec.models.semantic_ids`).
Histories are written in identities too, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rporec.config import Config, ConfigError
from rporec.text.prompt import MARKER, SEPARATOR, ItemWriter, PromptWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rporec.data import Dataset


def distinct_titles(writer: ItemWriter) -> list[str]:
    """The title of every item; of equal ones the second is "title (2)" and so on, whatever is free."""
    titles = [writer.title(item) for item in range(len(writer.catalog))]
    taken, count = set(titles), Counter[str]()
    for item, title in enumerate(titles):
        count[title] += 1
        if count[title] > 1:
            while (name := f"{title} ({count[title]})") in taken:
                count[title] += 1
            taken.add(name)
            titles[item] = name
    return titles


def identity_tokens(identities: Sequence[str], tokenizer: PreTrainedTokenizerBase, tiny: bool) -> list[list[int]]:
    """The tokens of every identity as the LLM is to write it, closed by end of text.

    Behind the marker of a tiny prompt comes a blank, as before every word there. Raises ConfigError if
    the tokenizer writes two of them alike.
    """
    blank = " " if tiny else ""
    rows = [[*tokenizer.encode(f"{blank}{i}", add_special_tokens=False), tokenizer.eos_token_id] for i in identities]
    first: dict[tuple[int, ...], int] = {}
    for item, row in enumerate(rows):
        other = first.setdefault(tuple(row), item)
        if other != item:
            raise ConfigError(
                f"rere.identity: this tokenizer writes {identities[other]!r} and {identities[item]!r} alike; "
                "take semantic identities"
            )
    return rows


def tokenizer_texts(identities: Sequence[str]) -> list[str]:
    """Texts to fit a tiny tokenizer on: every item as prompts hold it."""
    return [f"{SEPARATOR} {identity}{MARKER}" for identity in identities]


class IdentityWriter(ItemWriter):
    """Writes an item as its identity."""

    def __init__(self, source: Dataset, config: Config, identities: Sequence[str]) -> None:
        super().__init__(source, config.text)
        self.identities = identities

    def short(self, item: int) -> str:
        return self.identities[int(item)]

    def labelled(self, item: int) -> str:
        return self.identities[int(item)]


class IdentityPrompts(PromptWriter):
    """Prompts of a history of identities, answered by an identity; arguments as of `PromptWriter`."""

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        identities: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        reserve: int,
    ) -> None:
        super().__init__(dataset, config.text, tokenizer, config.tiny_backbone, context, reserve)
        self.items = IdentityWriter(dataset, config, identities)

    def instruction(self) -> str:
        return (
            "The list holds the items that one user chose, oldest first. "
            "Write the item that the user will choose next as it would stand in the list, and nothing else.\n"
        )
