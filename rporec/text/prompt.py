"""How items and histories are written for the LLM.

`ItemWriter` writes one item, `PromptWriter` a history. A catalogue is text that strangers wrote:
nothing in it may open or close a tag, a chat turn or a statement, so `clean` runs over all of it.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rporec.config import ConfigError, TextConfig
from rporec.text.completion import ANSWER, ANSWER_END, THINK, THINK_END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rporec.data import Catalog, Dataset

History = Sequence[int] | np.ndarray  # item indices, oldest first

SEPARATOR = " |"  # before every item of a tiny prompt
MARKER = " =>"  # ends a tiny prompt; the completion begins behind it
JOINT = " ; "  # between the attributes of an item
SHORT_COLUMN = 6  # words; the longest median of a column that prompts hold by default
LONGEST_WORD = 32  # characters; bounds text without blanks

_BRACKETS = str.maketrans({"<": "(", ">": ")", "|": " ", ";": ","})
_FIRST_VALUE = re.compile(r"[|,;]")
_ID_VALUE = re.compile(r"(?=.*\d)\S+")


def clean(text: str, max_words: int) -> str:
    """Catalogue text that is safe inside a prompt, an answer or a rationale, cut to `max_words` words.

    Control, format and separator characters become blanks; angle brackets become round ones, which
    defuses the four tags and `<|…|>` control tokens alike; "|" and ";" and a lone "." go, because
    they end items, attributes and statements.
    """
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)
    words = (word[:LONGEST_WORD] for word in text.translate(_BRACKETS).split() if word not in (".", ","))
    return " ".join(list(words)[:max_words])


class ItemWriter:
    """Writes items of one catalogue, title first.

    columns: what is written. Default: the title and every text column that is short (median of at
        most 6 words), is no id and differs between items.
    attribute: the column that rationales count; by default the written column other than the title
        with the fewest (but at least two) distinct first values. None: there is no such column.

    Raises ConfigError if `text.columns` or `text.attribute` names a column that the catalogue lacks.
    """

    def __init__(self, source: Catalog | Dataset, config: TextConfig) -> None:
        self.catalog = catalog = _catalog(source)
        self.config = config
        self.max_words = config.max_words
        self.prompt_items = config.prompt_items
        known = catalog.table.column_names
        for key, names in (("columns", config.columns or []), ("attribute", [config.attribute or "title"])):
            for name in names:
                if name not in known and name != "title":
                    raise ConfigError(f"text.{key}: the catalogue has no column {name!r}; it has {', '.join(known)}")
        chosen = config.columns if config.columns is not None else _short_columns(catalog)
        self.columns: tuple[str, ...] = ("title", *(name for name in chosen if name != "title"))
        self.attribute: str | None = config.attribute or self._countable()
        self._title: dict[int, str] = {}
        self._short: dict[int, str] = {}
        self._value: dict[int, str] = {}

    def fields(self, item: int) -> list[tuple[str, str]]:
        """(column, cleaned text) of the item, title first, blank ones left out."""
        written = [("title", self.title(item))]
        for column in self.columns[1:]:
            text = clean(str(self.catalog.value(column, item)), self.max_words)
            if text:
                written.append((column, text))
        return written

    def title(self, item: int) -> str:
        """The title as `short` begins with it; the item's id where it has none."""
        item = int(item)
        if item not in self._title:
            title = clean(self.catalog.title(item), self.max_words)
            self._title[item] = title or clean(self.catalog.ids[item], 1) or str(item)
        return self._title[item]

    def short(self, item: int) -> str:
        """ "title ; attribute ; attribute": what tiny prompts and all answers hold."""
        item = int(item)
        if item not in self._short:
            self._short[item] = JOINT.join(text for _, text in self.fields(item))
        return self._short[item]

    def labelled(self, item: int) -> str:
        """ "title (column: value ; column: value)": what the prompt of a large model holds."""
        (_, title), *others = self.fields(item)
        named = JOINT.join(f"{_words(column)}: {text}" for column, text in others)
        return f"{title} ({named})" if named else title

    def attribute_value(self, item: int) -> str:
        """First of the counted attribute's values ("a" of "a|b"), "" where blank or nothing is counted."""
        if self.attribute is None:
            return ""
        item = int(item)
        if item not in self._value:
            first = _first_value(str(self.catalog.value(self.attribute, item)))
            self._value[item] = clean(first, self.max_words)
        return self._value[item]

    @property
    def attribute_name(self) -> str:
        """The counted attribute in words, "" if there is none."""
        return _words(self.attribute or "")

    def visible(self, history: History) -> list[int]:
        """The newest items of a history that a prompt may hold, oldest first."""
        items = [int(item) for item in history]
        return items if self.prompt_items is None else items[-self.prompt_items :]

    def _countable(self) -> str | None:
        counts: dict[str, int] = {}
        for column in self.columns[1:]:
            values = (_first_value(str(self.catalog.value(column, i))) for i in range(len(self.catalog)))
            counts[column] = len({value for value in values if value})
        useful = [column for column, count in counts.items() if count > 1]
        return min(useful, key=lambda column: counts[column], default=None)


class ChatPrompt:
    """Fits "head, numbered lines, tail" into a token budget, as one user turn where the tokenizer has turns.

    budget: tokens. dropped: lines of all texts so far that did not fit. Raises ConfigError if not even the
    text without lines fits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, budget: int) -> None:
        self.tokenizer = tokenizer
        self.budget = budget
        self.dropped = 0
        special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._tokens: dict[str, int] = {}

    def ids(self, head: str, lines: Sequence[str], tail: str) -> list[int]:
        """Token ids; the oldest lines are dropped until the rest fits."""
        offered = len(lines)
        lines = [self._special.sub(" ", line) for line in lines] if self._special else list(lines)
        # The sum over single lines is a close guess, the encoding of the whole decides.
        spare = self.budget - sum(self._count(line) for line in lines)
        while lines and spare < 0:
            spare += self._count(lines.pop(0))
        while True:
            numbered = [f"{number}. {line}" for number, line in enumerate(lines, 1)]
            ids = self._encode("\n".join(filter(None, [head, *numbered, tail])))
            if len(ids) <= self.budget:
                self.dropped += offered - len(lines)
                return ids
            if not lines:
                raise ConfigError(
                    f"backbone: a prompt without items takes {len(ids)} tokens and {self.budget} are left for it; "
                    "lower sampling.max_tokens or take a model with a longer context"
                )
            lines.pop(0)

    def _count(self, line: str) -> int:
        if line not in self._tokens:
            self._tokens[line] = len(self.tokenizer.encode(line, add_special_tokens=False))
        return self._tokens[line]

    def _encode(self, text: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(f"{text}\n")
        turn = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(rendered, add_special_tokens=False)


class PromptWriter:
    """Turns a history into the token ids of a prompt, newest item last.

    tiny: True for the compact form (items one after the other, then a fixed marker), else an
        instruction and a numbered list, through the chat template if there is one.
    context, reserve: tokens of the model's window, and of them those kept for the completion. Items
        are dropped oldest first until the prompt fits into the rest.

    Raises ConfigError if `reserve` leaves no room for a prompt.
    """

    def __init__(
        self,
        source: Catalog | Dataset,
        config: TextConfig,
        tokenizer: PreTrainedTokenizerBase,
        tiny: bool,
        context: int,
        reserve: int,
    ) -> None:
        self.items = ItemWriter(source, config)
        self.tokenizer = tokenizer
        self.tiny = tiny
        self.reserve = reserve
        self.budget = context - reserve
        self._history = getattr(source, "history", None)
        self._item_ids: dict[int, list[int]] = {}
        self._chat = ChatPrompt(tokenizer, self.budget)
        if tiny:
            self._marker = tokenizer.encode(MARKER, add_special_tokens=False)
            if self.budget < len(self._marker):
                raise ConfigError(
                    f"tiny.context: {context} tokens leave no room for a prompt beside {reserve} for the completion"
                )
        else:
            self._chat.ids(self.instruction(), [], "")

    def with_catalog(self, catalog: Catalog) -> PromptWriter:
        """The same prompts for a catalogue that has grown: which columns are written does not change with it."""
        items = self.items
        config = items.config.model_copy(update={"columns": list(items.columns), "attribute": items.attribute})
        return PromptWriter(catalog, config, self.tokenizer, self.tiny, self.budget + self.reserve, self.reserve)

    def prompt_ids(self, history: History) -> list[int]:
        """Token ids of the prompt for a history (item indices, oldest first; may be empty)."""
        shown = self.items.visible(history)
        if not self.tiny:
            return self._chat.ids(self.instruction(), [self.items.labelled(item) for item in shown], "")
        spare = self.budget - len(self._marker)
        chunks = [self._marker]
        for item in reversed(shown):
            ids = self._tiny_ids(item)
            spare -= len(ids)
            if spare < 0:
                break
            chunks.append(ids)
        self._chat.dropped += len(shown) - len(chunks[1:])
        return [token for chunk in reversed(chunks) for token in chunk]

    @property
    def dropped(self) -> int:
        """How many items of all histories so far did not fit."""
        return self._chat.dropped

    def prompts(self, samples: Iterable[int]) -> list[list[int]]:
        """`prompt_ids` of samples; needs a writer that was made from a data set."""
        if self._history is None:
            raise ConfigError("prompts of samples need a data set, this writer was made from a catalogue")
        return [self.prompt_ids(self._history(int(sample))) for sample in samples]

    def instruction(self) -> str:
        """What a large model is asked; stands before the numbered history."""
        attributes = ", ".join(_words(column) for column in self.items.columns)
        return (
            "The list holds the items that one user chose, oldest first, each with its attributes. "
            "Work out which item the user will choose next.\n"
            f"First think about the user's taste in a few short sentences between {THINK} and {THINK_END}. "
            f"Then write your guess of the next item between {ANSWER} and {ANSWER_END}: {attributes}, "
            f'separated by "{JOINT.strip()}". Write nothing else.\n'
        )

    def _tiny_ids(self, item: int) -> list[int]:
        if item not in self._item_ids:
            text = f"{SEPARATOR} {self.items.short(item)}"
            self._item_ids[item] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._item_ids[item]


def _catalog(source: Catalog | Dataset) -> Catalog:
    return source.catalog if hasattr(source, "catalog") else source  # type: ignore[return-value]


def _short_columns(catalog: Catalog) -> list[str]:
    chosen = []
    for column in catalog.text_columns:
        if column in ("item_id", "title") or column == "id" or column.endswith("_id"):
            continue
        values = [value for i in range(len(catalog)) if (value := str(catalog.value(column, i)).strip())]
        distinct = set(values)
        is_id = len(distinct) == len(values) and all(map(_ID_VALUE.fullmatch, values))
        varies = len(distinct) > 1 or len(catalog) == 1
        if varies and not is_id and statistics.median(len(v.split()) for v in values) <= SHORT_COLUMN:
            chosen.append(column)
    return chosen


def _first_value(text: str) -> str:
    return next((part.strip() for part in _FIRST_VALUE.split(text) if part.strip()), "")


def _words(column: str) -> str:
    return clean(column.replace("_", " "), 4)
