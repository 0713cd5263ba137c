"""Attention over packed rows: a prompt sees itself, a completion its prompt and itself, and nothing else is computed.

A mask over a whole row of one prompt of P tokens and completions of C_1, C_2, … costs (P + ΣC)² products; the parts
that it lets through are P² / 2 + Σ C (P + C), a third of that for 8 completions of 48 tokens behind 256. Completions
are taken together with those of about their length, so that a long one pads few; everything but attention reads the
tokens of all rows as one sequence without padding.

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

    prompts: torch.Tensor  # int64 [R, P], where the prompt's tokens lie
    tokens: torch.Tensor  # int64 [R, C], where its own lie; of padding the completion's first
    seen: torch.Tensor  # bool [R, 1, C, P + C]

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive [R, 1, C, P + C]."""
        nothing = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
        return nothing.masked_fill_(~self.seen, torch.finfo(dtype).min)


class SharedPrefix:
    """Where the parts of packed rows lie among their N tokens, one behind the other without padding."""

    def __init__(self, branches: torch.Tensor) -> None:
        """branches: int64 [B, L], of every token as in `rporec.models.policy.Packed`: 0 in prompts, c + 1 in the c-th
        completion of a row, negative in padding."""
        rows, length = branches.shape
        flat = branches.flatten()
        self.tokens = (flat >= 0).nonzero()[:, 0]  # [N] in the flattened rows
        self._order = torch.full_like(flat, -1)
        self._order[self.tokens] = torch.arange(len(self.tokens), device=flat.device)
        prompts = (branches == 0).sum(1)
        self.prompt = int(prompts.max())
        step = torch.arange(self.prompt, device=flat.device)
        inside = step < prompts[:, None]
        self.front = self._order.view(rows, length)[:, :1] + torch.where(inside, step, 0)  # [B, P]

        row, branch = self.tokens // length, flat[self.tokens]
        new = torch.ones_like(branch, dtype=torch.bool)
        new[1:] = (branch[1:] != branch[:-1]) | (row[1:] != row[:-1])
        starts = new.nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([len(branch)]))
        starts, lengths = (one[branch[starts] > 0] for one in (starts, lengths))

        # Where the output of each token lies: among the prompts', or in one of the parts behind them.
        self.places = torch.empty_like(self.tokens)
        self.places[self.front[inside]] = inside.flatten().nonzero()[:, 0]
        self.parts: list[Completions] = []
        offset = inside.numel()
        size = lengths.float().log2().ceil()
        for one in size.unique().tolist():
            chosen = size == one
            owner = row[starts[chosen]]
            part = _completions(starts[chosen], lengths[chosen], self.front[owner], prompts[owner])
            whole = torch.arange(part.tokens.shape[1], device=flat.device) < lengths[chosen, None]
            self.places[part.tokens[whole]] = offset + whole.flatten().nonzero()[:, 0]
            offset += part.tokens.numel()
            self.parts.append(part)
        self._masks: dict[torch.dtype, list[torch.Tensor]] = {}

    def find(self, rows: torch.Tensor) -> torch.Tensor:
        """Places among the N tokens of places in the flattened rows."""
        return self._order[rows]

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Of each of the parts; the layers of a model share them."""
        if dtype not in self._masks:
            self._masks[dtype] = [part.mask(dtype) for part in self.parts]
        return self._masks[dtype]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """query [1, H, N, D], key and value [1, K, N, D] with K a divisor of H; returns [1, N, H, D]."""
        flat = [one[0].transpose(0, 1) for one in (query, key, value)]
        repeats = query.shape[1] // key.shape[1]

        def result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
            key, value = (_repeated(one, repeats).transpose(1, 2) for one in (key, value))
            found = scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale, **how)
            return found.transpose(1, 2).flatten(0, 1)

        outputs = [result(*(one[self.front] for one in flat), is_causal=True)]
        for part, mask in zip(self.parts, self.masks(query.dtype), strict=True):
            keys = torch.cat([part.prompts, part.tokens], 1)
            outputs.append(result(flat[0][part.tokens], flat[1][keys], flat[2][keys], attn_mask=mask))
        return torch.cat(outputs).index_select(0, self.places)[None]


def _completions(
    starts: torch.Tensor, lengths: torch.Tensor, prompts: torch.Tensor, prompt_lengths: torch.Tensor
) -> Completions:
    """starts, lengths, prompt_lengths: int64 [R]; prompts: int64 [R, P], as of `Completions`."""
    step = torch.arange(int(lengths.max()), device=starts.device)
    inside = step < lengths[:, None]  # [R, C]
    before = torch.arange(prompts.shape[1], device=starts.device)
    own = (step[None, :] <= step[:, None]) & inside[:, None]  # [R, C, C]
    front = (before < prompt_lengths[:, None])[:, None].expand(-1, len(step), -1)
    return Completions(
        prompts=prompts,
        tokens=starts[:, None] + torch.where(inside, step, 0),
        seen=torch.cat([front, own], 2)[:, None],
    )


def _repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
    """[B, L, K, D] with every head `times` times, [B, L, K * times, D]."""
    if times == 1:
        return heads
    return heads[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)


def install(lm: Any) -> bool:
    """Have a transformers model that uses `sdpa` use this instead; whether it does.

    Not one with windows: some architectures hand them on in masks alone, and here there are none.
    """
    config = lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windows = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if config._attn_implementation == "sdpa" and not windows and lm._can_set_attn_implementation():
        lm.set_attn_implementation(NAME)
    return config._attn_implementation == NAME


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: SharedPrefix | None = None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    return packed.attend(query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
