"""The layers that read vectors: a pre-norm transformer (Xiong et al. 2020, arXiv 2002.04745) and a small perceptron."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from rporec.config import HeadConfig


def mlp(dim: int, dropout: float) -> nn.Sequential:
    """Maps [..., dim] to [..., dim]: layer norm, then one hidden layer of the same width."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim))


class Transformer(nn.Module):
    """Maps [B, L, dim] to [B, L, dim], each position from all of them or, if causal, from itself and earlier ones.

    Dropout stands on the outputs of its blocks alone, because masks cost CPU time.
    """

    def __init__(self, config: HeadConfig, causal: bool) -> None:
        super().__init__()
        dim, layers = config.dim, range(config.layers)
        self.causal, self.heads, self.dropout = causal, config.heads, config.dropout
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * config.layers + 1))
        self.inner = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in layers)
        self.outer = nn.ModuleList(nn.Linear(dim, dim) for _ in layers)
        self.widen = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in layers)
        self.narrow = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(len(self.inner)):
            projected = self.inner[layer](self.norms[2 * layer](x)).unflatten(2, (3, self.heads, -1))
            query, key, value = projected.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            x = x + F.dropout(self.outer[layer](mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
            hidden = F.gelu(self.widen[layer](self.norms[2 * layer + 1](x)), approximate="tanh")
            x = x + F.dropout(self.narrow[layer](hidden), self.dropout, self.training)
        return self.norms[-1](x)
