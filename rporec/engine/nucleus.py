"""Top-p on CPUs without sorting the vocabulary: vLLM's own does so at every step, and takes half of the engine's time."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

TOP = 64  # tokens that hold the nucleus of a trained model; where they do not, all are sorted


class Nucleus(LogitsProcessor):
    """Does what `top_p` does for requests that have it in `extra_args["nucleus"]` instead."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._shares: dict[int, float] = {}  # row of the batch -> share of the probability that stays

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._shares, batch_update, lambda params, *_: (params.extra_args or {}).get("nucleus"))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: float [B, V] after temperature, changed in place."""
        if self._shares:
            rows = torch.tensor(list(self._shares))
            logits[rows] = nucleus(logits[rows], torch.tensor(list(self._shares.values())))
        return logits


def nucleus(logits: torch.Tensor, shares: torch.Tensor, top: int = TOP) -> torch.Tensor:
    """The logits with -inf for every token that more probable ones leave no room for.

    A token stays while those before it hold less than the share, and with it all that are as probable.
    logits: float [B, V]; shares: float [B], in (0, 1]; top: how many are looked at first.
    """
    best = logits.topk(min(top, logits.shape[1]), dim=1).values
    held = (best - logits.logsumexp(1, keepdim=True)).exp().cumsum(1)
    stays = torch.cat([held.new_zeros(len(held), 1), held[:, :-1]], dim=1) < shares[:, None]
    least = best.gather(1, stays.sum(1, keepdim=True) - 1)
    result = logits.masked_fill(logits < least, -torch.inf)
    wider = (held[:, -1] < shares) & (best.shape[1] < logits.shape[1])
    if wider.any():
        result[wider] = nucleus(logits[wider], shares[wider], logits.shape[1])
    return result
