"""GRU4Rec: a recurrent network reads the history.

Hidasi et al. 2016, arXiv 1511.06939; with cross entropy over the whole catalogue and tied item
vectors, as Hidasi and Karatzoglou 2018, arXiv 1706.03847, recommend where the catalogue is small.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from rporec.baselines.family import Parameters
from rporec.baselines.next_item_network import DIM, NetworkFamily


class Recurrent(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, 2 * DIM, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(2 * DIM, DIM)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.dropout(self.gru(vectors)[0]))


class GRU4Rec(NetworkFamily):
    name: ClassVar[str] = "gru4rec"
    grid: ClassVar[tuple[Parameters, ...]] = tuple({"dropout": rate, "lr": 2e-3} for rate in (0.2, 0.5))

    def encoder(self, window: int, parameters: Parameters) -> nn.Module:
        return Recurrent(parameters["dropout"])
