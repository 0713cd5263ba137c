"""Attention over packed rows: a prompt sees itself, a completion its prompt and itself, and nothing else is computed.

A mask over a whole row of one prompt of P tokens and completions of C_1, C_2, … costs (P + ΣC)² products; the parts
that it lets through are P² / 2 + Σ C (P + C), a third of that for 8 completions of 48 tokens behind 256. Completions
are taken together with those of about their length, so that a long one pads few.

It is one of transformers' attention functions, which hand on the keyword `packed` from the decoder's call; without
it, it is `sdpa`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "rporec_shared_prefix"


@dataclass(frozen=True)
class Completions:
    """R completions, padded to the C tokens of the longest, behind prompts that are padded to P."""

    prompts: torch.Tensor  # int64 [R], the row of each
    tokens: torch.Tensor  # int64 [R, C] in the flattened rows [B * L]; of padding the completion's first
    seen: torch.Tensor  # bool [R, 1, C, P + C]
    distance: torch.Tensor  # int64 [R, C, P + C], from the position of a key to that of the query

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive [R, 1, C, P + C]; `window`: only keys fewer than so many positions back are seen."""
        seen = self.seen if window is None else self.seen & (self.distance < window)[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


class SharedPrefix:
    """Where the parts of packed rows lie, from the branch of every token (see `rporec.models.policy.Packed`)."""

    def __init__(self, branches: torch.Tensor) -> None:
        """branches: int64 [B, L], 0 in prompts, c + 1 in the c-th completion of a row, negative in padding."""
        rows, length = branches.shape
        self.prompt = int((branches == 0).sum(1).max())
        flat = branches.flatten()
        inside = (flat > 0).nonzero()[:, 0]
        new = torch.ones_like(inside, dtype=torch.bool)
        new[1:] = (flat[inside[1:]] != flat[inside[:-1]]) | (inside[1:] // length != inside[:-1] // length)
        starts = inside[new]
        lengths = torch.diff(new.nonzero()[:, 0], append=new.new_tensor([len(inside)], dtype=torch.int64))
        prompts = (branches == 0).sum(1)

        # The output of a token of a prompt, or of padding behind one, lies where `places` finds it among the prompts'.
        at = torch.arange(rows * length, device=branches.device)
        self.places = at // length * self.prompt + (at % length).clamp(max=self.prompt - 1)
        self.parts: list[Completions] = []
        offset = rows * self.prompt
        size = lengths.float().log2().ceil()
        for one in size.unique().tolist():
            chosen = size == one
            part = _completions(starts[chosen], lengths[chosen], prompts, length, self.prompt)
            whole = torch.arange(part.tokens.shape[1], device=at.device) < lengths[chosen, None]
            self.places[part.tokens[whole]] = offset + whole.flatten().nonzero()[:, 0]
            offset += part.tokens.numel()
            self.parts.append(part)
        self._masks: dict[Any, list[torch.Tensor]] = {}

    def masks(self, window: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
        """Of each of the parts; the layers of a model share them."""
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = [part.mask(window, dtype) for part in self.parts]
        return self._masks[window, dtype]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query [B, H, L, D], key and value [B, K, L, D] with K a divisor of H; returns [B, L, H, D]."""
        rows, heads, length, _ = query.shape
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        repeats = heads // key.shape[2]
        flat = [one.flatten(0, 1) for one in (query, key, value)]
        front = [one[:, : self.prompt] for one in (query, key, value)]

        def result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
            key, value = (_repeated(one, repeats).transpose(1, 2) for one in (key, value))
            found = scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale, **how)
            return found.transpose(1, 2).flatten(0, 1)

        narrow = window is not None and window < self.prompt
        outputs = [result(*front, **({"attn_mask": self._band(window, query)} if narrow else {"is_causal": True}))]
        for part, mask in zip(self.parts, self.masks(window, query.dtype), strict=True):
            own = [one[part.tokens] for one in flat]
            behind = [torch.cat([one[part.prompts], mine], 1) for one, mine in zip(front[1:], own[1:], strict=True)]
            outputs.append(result(own[0], *behind, attn_mask=mask))
        return torch.cat(outputs).index_select(0, self.places).unflatten(0, (rows, length))

    def _band(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """bool [P, P]: what a token of a prompt sees within a window."""
        at = torch.arange(self.prompt, device=like.device)
        distance = at[:, None] - at[None, :]
        return (distance >= 0) & (distance < (window or self.prompt))


def _completions(
    starts: torch.Tensor, lengths: torch.Tensor, prompts: torch.Tensor, length: int, prompt: int
) -> Completions:
    """starts, lengths: int64 [R] in the flattened rows of `length` tokens; prompts: tokens of each row's, P at most."""
    rows = starts // length
    step = torch.arange(int(lengths.max()), device=starts.device)
    inside = step < lengths[:, None]  # [R, C]
    before = torch.arange(prompt, device=starts.device)
    own = (step[None, :] <= step[:, None]) & inside[:, None]  # [R, C, C]
    front = (before < prompts[rows, None])[:, None].expand(-1, len(step), -1)
    position = prompts[rows, None] + step  # [R, C], of queries and own keys
    keys = torch.cat([before.expand(len(rows), -1), position], 1)
    return Completions(
        prompts=rows,
        tokens=starts[:, None] + torch.where(inside, step, 0),
        seen=torch.cat([front, own], 2)[:, None],
        distance=position[:, :, None] - keys[:, None],
    )


def _repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
    """[B, L, K, D] with every head `times` times, [B, L, K * times, D]."""
    if times == 1:
        return heads
    return heads[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)


def install(lm: Any) -> bool:
    """Have a transformers model that uses `sdpa` use this instead; whether it does."""
    if lm.config._attn_implementation == "sdpa":
        lm.set_attn_implementation(NAME)
    return lm.config._attn_implementation == NAME


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: SharedPrefix | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **more
        )
    return packed.attend(query, key, value, scaling, sliding_window), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
