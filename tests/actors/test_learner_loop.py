"""What ranks do with weights that another one publishes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

from actors.learner import take_part


def test_a_rank_that_publishes_nothing_sees_every_tensor_through_and_keeps_none() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(3):
            assert not any(tensor() is not None for tensor in seen)
            tensor = torch.ones(2)
            seen.append(weakref.ref(tensor))
            yield f"w{index}", tensor
            del tensor

    take_part(weights())
    assert len(seen) == 3
