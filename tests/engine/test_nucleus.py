"""The cheap top-p keeps the tokens that vLLM's own keeps."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from rporec.engine.nucleus import Nucleus, nucleus


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0], ids=lambda spread: f"spread {spread:g}")
def test_it_keeps_what_a_sort_of_all_tokens_keeps(spread):
    """Flat distributions, whose nucleus is nearly all of the vocabulary, among them."""
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(40, 1000, generator=generator) + 1e-4 * torch.rand(40, 1000, generator=generator)
    shares = torch.rand(40, generator=generator).clamp_min(0.01)
    expected = apply_top_k_top_p_pytorch(logits.clone(), None, shares)
    found = nucleus(logits, shares)
    # Where a sum meets the share to the last bit, either rounding is right.
    differing = (found.isinf() != expected.isinf()).sum(1)
    assert differing.max() <= 1
    assert differing.count_nonzero() <= 2
    kept = ~found.isinf()
    assert torch.equal(found[kept], logits[kept])
    assert kept.any(dim=1).all()


def test_a_row_without_a_share_stays_as_it_is():
    processor = Nucleus(None, torch.device("cpu"), False)
    processor._shares = {1: 0.5}
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    found = processor.apply(logits.clone())
    assert torch.equal(found[0], logits[0])
    assert found[1].tolist() == [2.0, -torch.inf, -torch.inf]
