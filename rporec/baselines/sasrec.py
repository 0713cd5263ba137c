"""SASRec: a causal transformer reads the history.

Kang and McAuley 2018, arXiv 1808.09781; with cross entropy over the whole catalogue instead of one
negative, which Klenitskiy and Vasilev 2023, arXiv 2309.07602, found to be the stronger baseline. The
transformer is the one of the RecHead's history encoder.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from rporec.baselines.family import Parameters
from rporec.baselines.next_item_network import DIM, NetworkFamily
from rporec.config import HeadConfig
from rporec.models.transformer import Transformer

LAYERS, HEADS = 2, 2


class SelfAttentive(nn.Module):
    def __init__(self, window: int, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(window, DIM) * 0.02)
        self.transformer = Transformer(HeadConfig(dim=DIM, layers=LAYERS, heads=HEADS, dropout=dropout), causal=True)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.transformer(vectors + self.positions[: vectors.shape[1]])


class SASRec(NetworkFamily):
    name: ClassVar[str] = "sasrec"
    grid: ClassVar[tuple[Parameters, ...]] = tuple({"dropout": rate, "lr": 1e-3} for rate in (0.2, 0.5))

    def encoder(self, window: int, parameters: Parameters) -> nn.Module:
        return SelfAttentive(window, parameters["dropout"])
