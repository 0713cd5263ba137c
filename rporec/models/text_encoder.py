"""Static text encoders: a bag of word vectors, as in the RecHead's paper, trained from the catalogue's words."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WORD = re.compile(r"\w+")
BUCKETS = 256  # shared rows for words that no catalogue text holds


@dataclass(frozen=True)
class Ragged:
    """Word numbers of B texts, end to end: text b is `ids[offsets[b]:offsets[b + 1]]`."""

    ids: np.ndarray  # int64 [T]
    offsets: np.ndarray  # int64 [B + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> Ragged:
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.ids[positions], offsets)

    def joined(self, other: Ragged) -> Ragged:
        """The texts of `other` behind these."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return Ragged(np.concatenate([self.ids, other.ids]), offsets)


@dataclass(frozen=True)
class Vocabulary:
    """Words with the weight of their rarity; unseen words share `buckets` rows by a stable hash."""

    words: list[str]
    idf: np.ndarray  # float32 [len(words)], 1 + ln((1 + texts) / (1 + texts with the word))
    unseen_idf: float  # of a word that no fitted text holds
    buckets: int = BUCKETS

    @classmethod
    def fit(cls, texts: Sequence[str], extra: Iterable[str] = (), limit: int = 50_000) -> Vocabulary:
        """Words of the catalogue's `texts`, the most frequent `limit` of them, then those of `extra`.

        Rarity is counted over `texts` alone; a word of `extra` only counts as unseen there.
        """
        counts = Counter(word for text in texts for word in set(WORD.findall(text.lower())))
        words = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
        known = set(words)
        words += sorted({word for text in extra for word in WORD.findall(text.lower())} - known)[: limit - len(words)]
        frequency = np.array([counts[word] for word in words], dtype=np.float64)
        idf = 1 + np.log((1 + len(texts)) / (1 + frequency))
        return cls(words, idf.astype(np.float32), float(1 + np.log(1 + len(texts))))

    def __len__(self) -> int:
        return len(self.words) + self.buckets

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str]) -> Ragged:
        """The distinct words of each text in order of first appearance."""
        index, start = self._index, len(self.words)
        ids: list[int] = []
        offsets = [0]
        for text in texts:
            for word in dict.fromkeys(WORD.findall(text.lower())):
                number = index.get(word)
                ids.append(start + zlib.crc32(word.encode()) % self.buckets if number is None else number)
            offsets.append(len(ids))
        return Ragged(np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64))

    def weights(self) -> np.ndarray:
        """float32 [len(self)]: idf of every row, hashed rows included."""
        return np.concatenate([self.idf, np.full(self.buckets, self.unseen_idf, np.float32)])


class TextEncoder(nn.Module):
    """[B] texts -> [B, dim]: idf-weighted sum of word vectors, divided by the norm of the weights.

    At the start the dot product of two texts is `scale**2` times their TF-IDF cosine, give or take
    the noise of random projection, so a word that training never touches still means itself.
    An empty text is the zero vector.
    """

    def __init__(self, vocabulary: Vocabulary, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(len(vocabulary), dim) * (scale / dim**0.5))
        self.register_buffer("idf", torch.from_numpy(vocabulary.weights()), persistent=False)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """ids: int64 [T]; offsets: int64 [B + 1]."""
        weights = self.idf[ids]
        total = torch.cat([weights.new_zeros(1), weights.double().square().cumsum(0)])
        norm = (total[offsets[1:]] - total[offsets[:-1]]).clamp_min(1e-12).sqrt().to(weights.dtype)
        bags = F.embedding_bag(
            ids, self.table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return bags / norm[:, None]
