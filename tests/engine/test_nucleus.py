"""The cheap top-p keeps the tokens that vLLM's own keeps."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
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
    half, whole = SamplingParams(extra_args={"nucleus": 0.5}), SamplingParams()

    def cut_rows(size: int, **changes: list) -> list[int]:
        processor.update_state(BatchUpdate(size, **{"removed": [], "added": [], "moved": [], **changes}))
        logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(size, 1)
        found = processor.apply(logits.clone())
        cut = found.isinf().any(dim=1)
        assert torch.equal(found[~cut], logits[~cut])
        assert all(row == [2.0, -torch.inf, -torch.inf] for row in found[cut].tolist())
        return cut.nonzero().flatten().tolist()

    assert cut_rows(2, added=[(0, whole, None, []), (1, half, None, [])]) == [1]
    assert cut_rows(2, moved=[(0, 1, MoveDirectionality.SWAP)]) == [0]
    assert cut_rows(3, added=[(2, half, None, [])]) == [0, 2]
    assert cut_rows(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]) == [0]
    assert cut_rows(2, added=[(0, whole, None, [])]) == []
