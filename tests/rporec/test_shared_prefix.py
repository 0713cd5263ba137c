"""Attention by parts gives what attention under a mask over the whole row gives, and the same gradients."""

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from rporec.models.shared_prefix import SharedPrefix
from rporec.rl.packing import GroupTokens, pack

HEADS, SHARED_BY, WIDTH = 4, 2, 8


def rows(*groups):
    """Packed rows of prompts and completions of so many tokens."""
    return pack([GroupTokens(np.arange(prompt), [np.arange(n) for n in sizes]) for prompt, sizes in groups], 0)


def test_parts_are_what_a_mask_over_the_row_gives():
    packed = rows((11, [5, 1, 7]), (1, [3, 0, 2]), (6, [4]), (9, []), (3, [17, 16, 2]))
    generator = torch.Generator().manual_seed(0)
    shape = (packed.branches.shape[0], packed.branches.shape[1], WIDTH)
    query = torch.randn(shape[0], HEADS, *shape[1:], generator=generator, requires_grad=True)
    key, value = (
        torch.randn(shape[0], HEADS // SHARED_BY, *shape[1:], generator=generator, requires_grad=True) for _ in range(2)
    )
    prefix = SharedPrefix(packed.branches)

    def dense(one):
        """Without padding: [B, H, L, D] as [1, H, N, D]."""
        return one.transpose(1, 2).flatten(0, 1)[prefix.tokens].transpose(0, 1)[None]

    found = prefix.attend(dense(query), dense(key), dense(value), 0.3)[0]
    repeated = (one.repeat_interleave(SHARED_BY, 1) for one in (key, value))
    wanted = scaled_dot_product_attention(query, *repeated, attn_mask=packed.allowed(), scale=0.3).transpose(1, 2)
    wanted = wanted.flatten(0, 1)[prefix.tokens]
    torch.testing.assert_close(found, wanted)

    weights = torch.randn(found.shape, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (query, key, value)),
        torch.autograd.grad((wanted * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_completions_are_padded_to_others_of_about_their_length():
    packed = rows((5, [1, 2, 3, 4, 5, 9, 16, 17]))
    assert [part.tokens.shape for part in SharedPrefix(packed.branches).parts] == [
        (1, 1),
        (1, 2),
        (2, 4),
        (1, 5),
        (2, 16),
        (1, 17),
    ]
