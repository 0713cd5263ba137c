"""The RecHead: scores the whole catalogue from a history, a chain of thought and an answer.

After "MulRetriever" of RPORec (arXiv 2605.21967). One object is the reward of RL, the retriever of
serving and the method that evaluation ranks. The parts and their jobs:

    history encoder   the newest `window` items -> h (bag of their texts, or a causal transformer)
    text encoders     CoT -> y, answer -> z, item text -> E; the last two share one table, so an
                      answer that names an item lands near it even if training never showed it
    fusion            paper: gate and transformer over [x, y, s]; residual: h.E + a * t.E
    experts           `rporec.models.experts`, joined by scalars that are searched, not trained

Left out of the paper's head: its frozen pretrained item encoder. Without one, E is trained.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from rporec.config import ConfigError, HeadConfig
from rporec.data import Catalog
from rporec.files import replacing
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.head_items import ItemVectors, in_order, joined
from rporec.models.text_encoder import Ragged, TextEncoder, Vocabulary
from rporec.models.transformer import Transformer, mlp

SCORE_BATCH = 512  # samples scored at once
TEXT_SCALE = 3.0  # norm of a text's vector at the start: an exact match then scores 9, a stranger about 0


@dataclass(frozen=True)
class Encoded:
    """HeadInputs as numbers, ready to be cut into batches."""

    history: torch.Tensor  # int64 [B, W], oldest first, padded on the right with 0
    length: torch.Tensor  # int64 [B], history items that are there
    cot: Ragged  # words of B thoughts
    answer: Ragged  # of B answers
    format: torch.Tensor  # float32 [B]

    def __len__(self) -> int:
        return len(self.length)

    def take(self, rows: np.ndarray, device: str | torch.device = "cpu") -> Encoded:
        """The samples `rows`, int [R]: tensors on the device, histories [R, W'] as wide as their longest; words stay."""
        length = self.length[rows]
        width = int(length.max()) if len(rows) else 0
        return Encoded(
            self.history[rows, :width].to(device),
            length.to(device),
            self.cot.take(rows),
            self.answer.take(rows),
            self.format[rows].to(device),
        )

    def histories(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a row with each of the H different histories [H], which of them each row has [B])."""
        _, which = torch.unique(torch.cat([self.history, self.length[:, None]], dim=1), dim=0, return_inverse=True)
        row = which.new_zeros(int(which.max()) + 1).scatter_(0, which, torch.arange(len(self), device=which.device))
        return row, which


class RecHead(nn.Module):
    """See the module's docstring; `config.fusion` and `config.history` choose the parts."""

    def __init__(
        self,
        catalog: Catalog,
        config: HeadConfig,
        *,
        window: int,
        seed: int = 0,
        vocabulary: Vocabulary | None = None,
        extra_texts: Iterable[str] = (),
        experts: Experts | None = None,
    ) -> None:
        """window: newest history items that are read. extra_texts: whose words get vectors of their own."""
        super().__init__()
        texts = catalog.texts()
        self.catalog, self.config, self.window = catalog, config, window
        self.vocabulary = vocabulary or Vocabulary.fit(texts, extra_texts)
        self.experts = experts
        self._frozen_items: ItemVectors | None = None
        self.weights: dict[str, float] = {}  # of the components in the score; a network counts 1, an expert 0
        words = self.vocabulary.encode(texts)
        self.register_buffer("item_words", torch.from_numpy(words.ids), persistent=False)
        self.register_buffer("item_offsets", torch.from_numpy(words.offsets), persistent=False)
        self.register_buffer("known", torch.zeros(len(catalog), dtype=torch.bool))  # items that training showed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._make_parts()

    def _make_parts(self) -> None:
        config, dim = self.config, self.config.dim
        self.answer_encoder = TextEncoder(self.vocabulary, dim, TEXT_SCALE)
        self.cot_encoder = TextEncoder(self.vocabulary, dim, TEXT_SCALE)
        self.cot_mlp = mlp(dim, config.dropout)
        if config.history == "text":
            self.history_encoder = TextEncoder(self.vocabulary, dim, TEXT_SCALE)
            self.history_mlp = mlp(dim, config.dropout)
        else:
            self.item_table = nn.Parameter(torch.randn(len(self.catalog), dim) * 0.02)
            self.item_bias = nn.Parameter(torch.zeros(len(self.catalog)))
            self.text_projection = nn.Linear(dim, dim, bias=False)
            nn.init.eye_(self.text_projection.weight)  # so that an answer's vector lies near its item from the start
            self.text_bias = nn.Linear(dim, 1, bias=False)
            nn.init.zeros_(self.text_bias.weight)
            self.start = nn.Parameter(torch.randn(dim) * 0.02)
            self.positions = nn.Parameter(torch.randn(self.window + 1, dim) * 0.02)
            self.sequence = Transformer(config, causal=True)
        if config.fusion == "paper":
            self.fuser = Transformer(config, causal=False)
            self.gate = nn.Linear(2 * dim, dim)
        else:
            self.text_scale = nn.Parameter(torch.zeros(()))

    # -- vectors ---------------------------------------------------------------------------------

    def freeze(self) -> RecHead:
        """This head for scoring alone: the items' vectors are computed once and for all."""
        self.eval().requires_grad_(False)
        self._frozen_items = self.item_vectors().packed()
        return self

    def network_alone(self) -> RecHead:
        """The same networks without experts and unscaled: beside experts the search may have shrunk theirs to 0."""
        alone = copy.copy(self)
        alone.experts, alone.weights = None, {}
        return alone

    def item_vectors(self) -> ItemVectors:
        """All N items as the networks see them; costs one pass over the catalogue's words unless frozen."""
        if self._frozen_items is not None:
            return self._frozen_items
        items = self._by_words(self.item_words, self.item_offsets)
        if items.bias is None:  # without a table of items there is no more to add
            return items
        full = items.full + self.item_table * self.known[:, None]
        return self._items(items.text, full, full, items.bias + self.item_bias * self.known)

    def _by_words(self, words: torch.Tensor, offsets: torch.Tensor) -> ItemVectors:
        """M items that training never showed; words: int64 [T], offsets: int64 [M + 1], as in `Ragged`."""
        text = self.answer_encoder(words, offsets)
        if self.config.history == "text":
            return self._items(text, text, self.history_encoder(words, offsets), None)
        full = self.text_projection(text)
        return self._items(text, full, full, self.text_bias(text).squeeze(1))

    def _items(
        self, text: torch.Tensor, full: torch.Tensor, past: torch.Tensor, bias: torch.Tensor | None
    ) -> ItemVectors:
        return ItemVectors(full if self.config.fusion == "paper" else text, full, past, bias)

    def _history(self, history: torch.Tensor, length: torch.Tensor, items: ItemVectors) -> torch.Tensor:
        """[B, W + 1, dim] for `sequence` (row p has read p items), [B, 1, dim] for `text`."""
        vectors = F.embedding(history, items.past)
        if self.config.history == "text":
            there = torch.arange(history.shape[1], device=vectors.device) < length[:, None]
            mean = (vectors * there[:, :, None]).sum(1) / length.clamp_min(1)[:, None]
            return self.history_mlp(mean)[:, None]
        start = self.start.expand(len(vectors), 1, -1)
        width = vectors.shape[1] + 1
        tokens = torch.cat([start, vectors], dim=1) + self.positions[:width]
        tokens = F.dropout(tokens, self.config.dropout, self.training)
        # Padding stands on the right, so the causal mask alone keeps it from every real position.
        return self.sequence(tokens)

    def _newest(self, past: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        last = length if self.config.history == "sequence" else torch.zeros_like(length)
        return past[torch.arange(len(length), device=past.device), last]

    def _words(self, encoder: TextEncoder, words: Ragged) -> torch.Tensor:
        device = self.item_words.device
        return encoder(torch.from_numpy(words.ids).to(device), torch.from_numpy(words.offsets).to(device))

    def _fused(self, history: torch.Tensor, batch: Encoded) -> torch.Tensor:
        """The paper's output [B, dim] from x = `history`."""
        thought = self.cot_mlp(self._words(self.cot_encoder, batch.cot))
        written = batch.format[:, None] > 0
        chosen = torch.where(written, self._words(self.answer_encoder, batch.answer), history)
        fused = self.fuser(torch.stack([history, thought, chosen], dim=1))[:, 2]
        return chosen + 0.1 * torch.sigmoid(self.gate(torch.cat([chosen, fused], dim=1))) * fused

    def _text(self, batch: Encoded) -> torch.Tensor:
        """t [B, dim] from answer and CoT; zero where the format failed."""
        if not (self.training or batch.format.any()):
            return batch.format.new_zeros(len(batch), self.config.dim)  # histories alone, as serving often asks
        answer = self._words(self.answer_encoder, batch.answer)
        return batch.format[:, None] * (answer + self.cot_mlp(self._words(self.cot_encoder, batch.cot)))

    def _queries(self, newest: torch.Tensor, batch: Encoded) -> dict[str, torch.Tensor]:
        """Component -> what meets `ItemVectors.of` it, [B, dim]; newest [B, dim]: the history, read to its end."""
        if self.config.fusion == "paper":
            return {"fused": self._fused(newest, batch)}
        return {"history": newest, "text": self.text_scale * self._text(batch)}

    # -- training --------------------------------------------------------------------------------

    def forward(self, batch: Encoded, targets: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Cross-entropy loss (scalar) of a training batch; targets: int64 [B].

        The sequence encoder also predicts the history's own next items from the history alone, at as
        many random earlier positions as there are samples, which keeps it strong without text.
        """
        items = self.item_vectors()
        past = self._history(batch.history, batch.length, items)
        newest = self._newest(past, batch.length)
        queries = [(query, items.of(name)) for name, query in self._queries(newest, batch).items()]
        loss = self._cross_entropy(queries, items.bias, targets, generator)
        earlier = int(batch.length.sum()) if self.config.history == "sequence" else 0
        if earlier:
            drawn = torch.randint(earlier, (len(batch),), generator=generator)
            row = torch.repeat_interleave(torch.arange(len(batch)), batch.length.cpu())[drawn].to(past.device)
            place = (drawn.to(past.device) - (batch.length.cumsum(0) - batch.length)[row]).clamp_min(0)
            own = [(past[row, place], items.full)]
            loss = loss + self._cross_entropy(own, items.bias, batch.history[row, place], generator)
        return loss

    def _cross_entropy(
        self,
        queries: list[tuple[torch.Tensor, torch.Tensor]],
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Of the summed dot products of [B, dim] queries with their [N, dim] items."""
        if self.config.softmax == "full":
            logits = sum(query @ vectors.T for query, vectors in queries)
            logits = logits if bias is None else logits + bias
            return F.cross_entropy(logits, targets)
        shape = (len(targets), self.config.negatives)
        negatives = torch.randint(len(self.catalog), shape, generator=generator).to(targets.device)
        candidates = torch.cat([targets[:, None], negatives], dim=1)
        logits = sum((F.embedding(candidates, vectors) @ query[:, :, None]).squeeze(2) for query, vectors in queries)
        logits = logits if bias is None else logits + bias[candidates]
        hits = F.pad(negatives == targets[:, None], (1, 0))
        return F.cross_entropy(logits.masked_fill(hits, -torch.inf), torch.zeros_like(targets))

    # -- scoring ---------------------------------------------------------------------------------

    def encode(self, inputs: HeadInputs) -> Encoded:
        """B samples as numbers, on the CPU: the newest `window` items of each, and the words of its texts."""
        recent = [items[-self.window :] for items in inputs.seen]
        length = np.array([len(items) for items in recent], dtype=np.int64)
        history = np.zeros((len(recent), self.window), dtype=np.int64)
        history[np.arange(self.window) < length[:, None]] = np.concatenate(recent or [np.zeros(0, np.int64)])
        return Encoded(
            torch.from_numpy(history),
            torch.from_numpy(length),
            self.vocabulary.encode(inputs.cot),
            self.vocabulary.encode(inputs.answer),
            torch.from_numpy(np.asarray(inputs.format, dtype=np.float32)),
        )

    @torch.no_grad()
    def components(self, inputs: HeadInputs) -> dict[str, np.ndarray]:
        """The parts of the score that have a scalar, name -> float32 [B, N]: `fused` (paper) or `history` and
        `text` (residual), then one entry per expert, or the reranker's alone."""
        return {
            **self.network_components(self.encode(inputs)),
            **(self.experts.features(inputs, self.experts.joined) if self.experts else {}),
        }

    @torch.no_grad()
    def network_components(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """`components` without the experts."""
        names = ("fused",) if self.config.fusion == "paper" else ("history", "text")
        result = {name: np.zeros((len(encoded), len(self.catalog)), dtype=np.float32) for name in names}
        with self._scoring():
            items = self.item_vectors()
            for start in range(0, len(encoded), SCORE_BATCH):
                rows = np.arange(start, min(start + SCORE_BATCH, len(encoded)))
                for name, query in self._read(encoded.take(rows, items.full.device), items).items():
                    bias = 0 if items.bias is None or name == "text" else items.bias
                    result[name][rows] = (query @ items.of(name).T + bias).cpu().numpy()
        return result

    def _read(self, batch: Encoded, items: ItemVectors) -> dict[str, torch.Tensor]:
        row, which = batch.histories()  # completions of one prompt share theirs: it is read once
        history, length = batch.history[row], batch.length[row]
        return self._queries(self._newest(self._history(history, length, items), length)[which], batch)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Dropout off."""
        training = self.training
        if training:
            self.eval()
        yield
        if training:
            self.train()

    def weight(self, name: str) -> float:
        """Of a component in the score."""
        return self.weights.get(name, 1.0 if name in ("fused", "history", "text") else 0.0)

    def query_vectors(self, inputs: HeadInputs) -> torch.Tensor:
        """float32 [B, D]; the product with `ItemVectors.matrix` is the networks' weighted share of the score."""
        return self._query_vectors(inputs, self.item_vectors())

    @torch.no_grad()
    def _query_vectors(self, inputs: HeadInputs, items: ItemVectors) -> torch.Tensor:
        with self._scoring():
            queries = self._read(self.encode(inputs).take(np.arange(len(inputs)), items.full.device), items)
        first, *rest = [self.weight(name) * query for name, query in queries.items()]
        if rest and items.text is items.full:
            first, rest = first + rest[0], []
        if items.bias is not None:
            rest.append(first.new_full((len(inputs), 1), self.weight(next(iter(queries)))))
        return torch.cat([first, *rest], dim=1)

    @torch.no_grad()
    def scores(self, inputs: HeadInputs) -> torch.Tensor:
        """Scores of the whole catalogue, float32 [B, N] on the CPU; higher is better.

        Deterministic: dropout off, no gradient.
        """
        items = self.item_vectors()
        matrix = items.matrix.T
        result = np.zeros((len(inputs), len(self.catalog)), dtype=np.float32)
        for start in range(0, len(inputs), SCORE_BATCH):
            rows = np.arange(start, min(start + SCORE_BATCH, len(inputs)))
            part = inputs.take(rows)
            result[rows] = (self._query_vectors(part, items) @ matrix).cpu().numpy()
            if self.experts:
                result[rows] += self.experts.weigh(part, self.weights).scores()
        return torch.from_numpy(result)

    # -- catalogue and files ---------------------------------------------------------------------

    def with_catalog(self, catalog: Catalog) -> RecHead:
        """This head over a catalogue that holds all its items and more; the new ones by their text.

        It shares the networks of this one, and is frozen if this one is.
        Raises ConfigError when an item of the head's catalogue is missing.
        """
        rows = self._rows_in(catalog)
        new = np.setdiff1d(np.arange(len(catalog)), rows, assume_unique=True)
        source = np.argsort(np.concatenate([rows, new]))  # of each item among the old and then the new
        added = self.vocabulary.encode(Catalog(catalog.table.take(new)).texts())
        words = Ragged(self.item_words.cpu().numpy(), self.item_offsets.cpu().numpy()).joined(added)
        if not in_order(source):
            words = words.take(source)
        device = self.item_words.device
        replaced: list[tuple[Any, Any]] = [
            (self.catalog, catalog),
            (self.experts, self.experts and self.experts.with_catalog(catalog, rows)),
            (self.item_words, torch.from_numpy(words.ids).to(device)),
            (self.item_offsets, torch.from_numpy(words.offsets).to(device)),
            (self.known, joined(self.known, self.known.new_zeros(len(new)), source)),
        ]
        if self.config.history == "sequence":
            for old in (self.item_table, self.item_bias):
                value = joined(old.detach(), old.new_zeros(len(new), *old.shape[1:]), source)
                replaced.append((old, nn.Parameter(value, requires_grad=old.requires_grad)))
        if self._frozen_items is not None:
            vectors = self._by_words(torch.from_numpy(added.ids).to(device), torch.from_numpy(added.offsets).to(device))
            replaced.append((self._frozen_items, self._frozen_items.joined(vectors, source)))
        shared = [(part, part) for part in (*self.parameters(), *self.buffers(), self.vocabulary, self.config)]
        # A copy in which each `old` has become its `new`, for a copy is what the memo says it is.
        return copy.deepcopy(self, {id(old): new for old, new in shared + replaced})

    def _rows_in(self, catalog: Catalog) -> np.ndarray:
        """Index in `catalog` of each item, int64 [N]."""
        if catalog.begins_with(self.catalog):
            return np.arange(len(self.catalog))
        missing = [item for item in self.catalog.ids if item not in catalog.index]
        if missing:
            raise ConfigError(
                f"RecHead: the new catalogue lacks {len(missing)} items, such as {missing[0]}; add, never remove"
            )
        return np.array([catalog.index[item] for item in self.catalog.ids], dtype=np.int64)

    def save(self, folder: Path | str) -> None:
        """Write `head.json` and `head.safetensors`; an existing folder is replaced as a whole."""
        tensors = {f"network.{name}": value.contiguous().cpu() for name, value in self.state_dict().items()}
        tensors["vocabulary.idf"] = torch.from_numpy(self.vocabulary.idf)
        if self.experts:
            tensors |= {f"experts.{k}": torch.from_numpy(np.array(v)) for k, v in self.experts.arrays().items()}
        description = {
            "config": self.config.model_dump(),
            "window": self.window,
            "catalog": catalog_hash(self.catalog),
            "items": len(self.catalog),
            "weights": self.weights,
            "half_lives": self.experts.half_lives if self.experts else None,
            "unseen_idf": self.vocabulary.unseen_idf,
            "buckets": self.vocabulary.buckets,
            "words": self.vocabulary.words,
        }
        with replacing(Path(folder)) as temporary:
            temporary.mkdir()
            (temporary / "head.safetensors").write_bytes(save(tensors))
            (temporary / "head.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, catalog: Catalog) -> RecHead:
        """Read what `save` wrote. Raises ConfigError when `catalog` is not the one it was trained on."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{folder}: holds no RecHead (head.json is missing)") from None
        if description["catalog"] != catalog_hash(catalog):
            raise ConfigError(
                f"{folder}: the RecHead was trained on another catalogue ({description['items']} items, this one has "
                f"{len(catalog)}); load it with its own and call with_catalog to add items"
            )
        with safe_open(folder / "head.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        vocabulary = Vocabulary(
            description["words"],
            tensors["vocabulary.idf"].numpy(),
            description["unseen_idf"],
            description["buckets"],
        )
        half_lives = description["half_lives"]
        head = cls(
            catalog,
            HeadConfig(**description["config"]),
            window=description["window"],
            vocabulary=vocabulary,
            experts=Experts.from_arrays(_under("experts.", tensors), half_lives) if half_lives else None,
        )
        head.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
        head.weights = description["weights"]
        return head


def catalog_hash(catalog: Catalog) -> str:
    """SHA-256 of the item ids in order."""
    return hashlib.sha256("\n".join(catalog.ids).encode()).hexdigest()


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value.numpy() for name, value in tensors.items() if name.startswith(prefix)}
