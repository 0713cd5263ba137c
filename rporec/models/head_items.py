"""The catalogue as the RecHead's networks see it: the vectors of all items, and how those of newcomers join them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class ItemVectors:
    """N items. `text` from the answer's table, `full` with the ID row, `past` as history tokens."""

    text: torch.Tensor  # [N, dim]; `full` itself where the fusion leaves no component for it
    full: torch.Tensor  # [N, dim]
    past: torch.Tensor  # [N, dim]
    bias: torch.Tensor | None  # [N]
    whole: torch.Tensor | None = None  # [N, D], where the others are views of it

    def of(self, component: str) -> torch.Tensor:
        """What a component's query meets, [N, dim]."""
        return self.text if component == "text" else self.full

    @property
    def matrix(self) -> torch.Tensor:
        """[N, D]: `full`, `text` where it is another, and the bias, side by side."""
        if self.whole is not None:
            return self.whole
        parts = [self.full] if self.text is self.full else [self.full, self.text]
        return torch.cat(parts if self.bias is None else [*parts, self.bias[:, None]], dim=1)

    def packed(self) -> ItemVectors:
        """The same as views of `matrix`, so that a large catalogue is held once."""
        return self._views(self.matrix, self.past)

    def joined(self, new: ItemVectors, source: np.ndarray) -> ItemVectors:
        """These and `new` behind them, then of all these the rows `source`; packed."""
        past = self.past if self.past is self.full else joined(self.past, new.past, source)
        return self._views(joined(self.matrix, new.matrix, source), past)

    def _views(self, matrix: torch.Tensor, past: torch.Tensor) -> ItemVectors:
        dim = self.full.shape[1]
        full = matrix[:, :dim]
        return ItemVectors(
            text=full if self.text is self.full else matrix[:, dim : 2 * dim],
            full=full,
            past=full if self.past is self.full else past,
            bias=None if self.bias is None else matrix[:, -1],
            whole=matrix,
        )


def joined(old: torch.Tensor, new: torch.Tensor, source: np.ndarray) -> torch.Tensor:
    """`old` and `new` behind it, then of all these the rows `source`."""
    both = torch.cat([old, new])
    return both if in_order(source) else both[source]


def in_order(source: np.ndarray) -> bool:
    """Whether taking the rows `source` would change nothing."""
    return np.array_equal(source, np.arange(len(source)))
