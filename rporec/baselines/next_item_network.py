"""What GRU4Rec and SASRec share: item vectors, the loss at every position, training by epochs, scoring.

No maintained library of sequential recommenders installs beside this project's torch, so both are
written out. Items have IDs alone: what training never showed is only ever a negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rporec.baselines.family import Baseline, Parameters, Validation
from rporec.data.slices import rows_of

if TYPE_CHECKING:
    from rporec.data import Dataset

BATCH = 32  # pieces of histories
EPOCHS = 40  # at most
DIM = 64
WEIGHT_DECAY = 0.01


class NextItemNetwork(nn.Module):
    """States of a history meet the item vectors: score = state · item + bias."""

    def __init__(self, items: int, encoder: nn.Module, dropout: float) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.randn(items, DIM) * 0.1)
        self.bias = nn.Parameter(torch.zeros(items))
        self.encoder = encoder
        self.dropout = dropout

    def states(self, history: torch.Tensor) -> torch.Tensor:
        """[B, W, dim], row p after items 0 … p; history: int64 [B, W], padded on the right with anything."""
        return self.encoder(F.dropout(F.embedding(history, self.items), self.dropout, self.training))

    def loss(self, pieces: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over the catalogue at every position; pieces: int64 [B, W + 1], length: int64 [B]."""
        there = torch.arange(1, pieces.shape[1]) < length[:, None]
        states = self.states(pieces[:, :-1])[there]
        return F.cross_entropy(torch.addmm(self.bias, states, self.items.T), pieces[:, 1:][there])


@dataclass(frozen=True)
class Network:
    """A trained network, asked for the newest `window` items of a history."""

    network: NextItemNetwork
    window: int

    @torch.no_grad()
    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        history, length = _padded([items[-self.window :] for items in dataset.seen_of(samples)], self.window)
        self.network.eval()
        last = self.network.states(history)[torch.arange(len(history)), length - 1]
        return torch.addmm(self.network.bias, last, self.network.items.T).numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.network.state_dict().items()}


class NetworkFamily:
    """A grid of regularisation and learning rate; along a path the epochs of one training."""

    name: ClassVar[str]
    random: ClassVar[bool] = True
    grid: ClassVar[tuple[Parameters, ...]]

    def encoder(self, window: int, parameters: Parameters) -> nn.Module:
        """Maps [B, W, dim] to [B, W, dim], each position from itself and earlier ones."""
        raise NotImplementedError

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        for parameters in self.grid:
            yield self._epochs(dataset, samples, parameters, seed)

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> Network:
        for found, network in self._epochs(dataset, samples, parameters, seed):
            if found["epochs"] == parameters["epochs"]:
                return network
        raise ValueError(f"{self.name}: {parameters['epochs']} epochs are more than {EPOCHS}")

    def restore(self, dataset: Dataset, arrays: Mapping[str, np.ndarray], parameters: Parameters) -> Network:
        network = self._fresh(dataset, parameters, 0)
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
        return Network(network, dataset.window)

    def _fresh(self, dataset: Dataset, parameters: Parameters, seed: int) -> NextItemNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = self.encoder(dataset.window, parameters)
            return NextItemNetwork(len(dataset.catalog), encoder, parameters["dropout"])

    def _epochs(
        self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int
    ) -> Iterator[tuple[Parameters, Network]]:
        network = self._fresh(dataset, parameters, seed)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=parameters["lr"], weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), fused=True
        )
        histories, rng = _histories(dataset, samples), np.random.default_rng(seed)
        for epoch in range(1, EPOCHS + 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * EPOCHS + epoch)
                network.train()
                for batch in _batches(_pieces(histories, dataset.window, rng), rng):
                    optimizer.zero_grad()
                    network.loss(*_padded(batch)).backward()
                    optimizer.step()
            yield {**parameters, "epochs": epoch}, Network(network, dataset.window)


def _histories(dataset: Dataset, samples: np.ndarray) -> list[np.ndarray]:
    """Items of each user that `samples` hold, oldest first; users with fewer than two are left out."""
    rows = rows_of(dataset, samples)
    cuts = np.flatnonzero(np.diff(dataset.owner[rows])) + 1
    return [items for items in np.split(dataset.items[rows], cuts) if len(items) > 1]


def _pieces(histories: list[np.ndarray], window: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Histories cut into at most window + 1 items, at other places in every epoch.

    Pieces overlap by one item, so that each item but a history's first is predicted once.
    """
    result = []
    for items in histories:
        first = int(rng.integers(1, window + 1)) if len(items) > window + 1 else window
        cuts = [0, *range(first, len(items) - 1, window), len(items) - 1]
        result += [items[start : end + 1] for start, end in pairwise(cuts) if end > start]
    return result


def _batches(pieces: list[np.ndarray], rng: np.random.Generator) -> list[list[np.ndarray]]:
    """A random partition into batches of like length."""
    lengths = np.array([len(piece) for piece in pieces])
    order = np.lexsort((rng.random(len(pieces)), lengths))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [[pieces[row] for row in batches[number]] for number in rng.permutation(len(batches))]


def _padded(rows: list[np.ndarray], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [B, W], padded on the right with 0; lengths int64 [B])."""
    length = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.zeros((len(rows), width or int(length.max(initial=0))), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < length[:, None]] = np.concatenate([*rows, np.zeros(0, np.int64)])
    return torch.from_numpy(padded), torch.from_numpy(length)
