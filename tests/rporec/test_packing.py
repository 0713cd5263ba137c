"""Rows of `pack` mean what rows of `plain` mean, to the layout and to real transformers models."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rporec.models import shared_prefix
from rporec.models.policy import check_packing, packing_tolerance, token_logprobs
from rporec.rl.packing import GroupTokens, by_length, pack, plain

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "attn_implementation": "sdpa",
}


def causal_lm(kind: str = "Qwen3", **changes) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    # Fresh weights are so small that any mask gives nearly the same answer.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def qwen3() -> nn.Module:
    return causal_lm()


@pytest.fixture(scope="module")
def groups() -> list[GroupTokens]:
    rng = np.random.default_rng(1)

    def ids(n: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, n)

    return [
        GroupTokens(ids(11), [ids(5), ids(1), ids(7)]),
        GroupTokens(ids(1), [ids(3), ids(0), ids(2)]),
        GroupTokens(ids(20), [ids(4)]),
    ]


def test_layout_of_a_group_is_the_prompt_once_and_completions_behind_it():
    packed = pack([GroupTokens([7, 8, 9], [np.array([1, 2]), np.array([3])]), GroupTokens([5], [np.array([6])])], 0)
    assert packed.input_ids.tolist() == [[7, 8, 9, 1, 2, 3], [5, 6, 0, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 4, 5]]
    assert packed.branches.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, -1, -1, -1, -1]]
    assert packed.rows.tolist() == [2, 3, 2, 6]  # both first tokens are read from the prompt's last
    assert packed.labels.tolist() == [1, 2, 3, 6]
    assert packed.owner.tolist() == [0, 0, 1, 2]
    assert packed.group.tolist() == [0, 0, 1]
    assert not packed.causal
    assert packed.allowed()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_a_window_counts_positions_not_places_in_the_row():
    packed = pack([GroupTokens([7, 8, 9], [np.array([1, 2]), np.array([3])])], 0)
    assert packed.allowed(window=2)[0, 0, 5].int().tolist() == [0, 0, 1, 0, 0, 1]


def test_both_layouts_share_the_order_of_tokens(groups):
    packed, rows = pack(groups, 0), plain(groups, 0)
    for name in ("labels", "owner", "group"):
        assert torch.equal(getattr(packed, name), getattr(rows, name))
    assert packed.group.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert packed.input_ids.shape == (3, 24)
    assert rows.input_ids.shape == (7, 24)
    assert (packed.tokens, packed.completions) == (22, 7)
    assert rows.causal
    assert pack(groups[2:], 0).causal


def test_micro_batches_hold_every_group_once_longest_first(groups):
    cut = by_length(groups, 2)
    assert [batch.tolist() for batch in cut] == [[0, 2], [1]]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt without tokens"):
        pack([GroupTokens([], [np.array([1])])], 0)


def test_no_groups_at_all_make_an_empty_batch():
    assert pack([], 0).tokens == 0


def test_packed_logprobs_entropies_and_gradients_are_those_of_plain_sequences(qwen3, groups):
    results = []
    for layout in (pack, plain):
        qwen3.zero_grad()
        logprobs, entropies = token_logprobs(qwen3, layout(groups, 0), with_entropy=True)
        weights = torch.linspace(-1, 1, len(logprobs))
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), entropies, [p.grad.clone() for p in qwen3.parameters()]))
    (logprobs, entropies, gradients), (expected, expected_entropies, expected_gradients) = results
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_the_models_own_logits(qwen3, groups, temperature):
    group = groups[0]
    with torch.no_grad():
        logprobs, entropies = token_logprobs(qwen3, pack([group], 0), temperature=temperature, with_entropy=True)
        start = 0
        for completion in group.completions:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion]))[None]
            logits = qwen3(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1] / temperature
            wanted = torch.distributions.Categorical(logits=logits)
            end = start + len(completion)
            own = torch.from_numpy(completion)
            torch.testing.assert_close(logprobs[start:end], wanted.log_prob(own), atol=1e-5, rtol=0)
            torch.testing.assert_close(entropies[start:end], wanted.entropy(), atol=1e-5, rtol=0)
            start = end


def test_chunks_of_logits_change_neither_value_nor_gradient(qwen3, groups):
    packed = pack(groups, 0)
    results = []
    for budget in (1 << 26, 5 * VOCABULARY):
        qwen3.zero_grad()
        logprobs, entropies = token_logprobs(qwen3, packed, with_entropy=True, budget=budget)
        logprobs.square().sum().backward()
        results.append((logprobs.detach(), entropies, qwen3.lm_head.weight.grad.clone()))
        assert not entropies.requires_grad
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_entropies_are_left_out_unless_asked_for(qwen3, groups):
    assert token_logprobs(qwen3, pack(groups, 0))[1] is None


def test_logits_that_the_model_caps_or_scales_are_capped_and_scaled_here_too(groups):
    for model in (
        causal_lm(
            "Gemma2", final_logit_softcapping=0.5, layer_types=["full_attention"] * 2, attn_implementation="eager"
        ),
        causal_lm("Cohere", logit_scale=0.3),
        causal_lm("Granite", logits_scaling=3.0),
    ):
        packed = plain(groups[2:], 0)
        with torch.no_grad():
            found, _ = token_logprobs(model, packed)
            logits = model(input_ids=packed.input_ids).logits.flatten(0, 1)[packed.rows]
        wanted = torch.distributions.Categorical(logits=logits).log_prob(packed.labels)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen3", {}),
        ("Llama", {}),
        ("Mistral", {"sliding_window": 6}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("Mistral", {"sliding_window": 6, "attn_implementation": "eager"}),
    ],
)
def test_packing_is_right_for_models_with_and_without_windows(kind, changes, groups):
    model = causal_lm(kind, **changes).train()
    group = [groups[0]]
    for _ in range(2):  # once packed rows were read, plain ones are read as before
        assert check_packing(model, pack(group, 0), plain(group, 0)) < 1e-4 < packing_tolerance(model)
    assert model.training


def test_a_window_changes_what_a_model_says(groups):
    group = plain(groups[:1], 0)
    with torch.no_grad():
        wide, narrow = (token_logprobs(causal_lm("Mistral", sliding_window=w), group)[0] for w in (None, 6))
    assert (wide - narrow).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Bloom", {"n_layer": 1, "n_head": 4, "attn_implementation": "eager"}),  # ALiBi
        ("Mamba", {"num_hidden_layers": 1, "state_size": 4, "attn_implementation": "eager"}),  # no attention at all
    ],
)
def test_models_that_packed_rows_would_mislead_are_found_out(kind, changes, groups):
    model = causal_lm(kind, **changes)
    group = [groups[0]]
    assert check_packing(model, pack(group, 0), plain(group, 0)) > packing_tolerance(model)


def test_attention_goes_by_parts_where_no_layer_has_a_window(groups):
    for changes, wanted in (({}, shared_prefix.NAME), ({"kind": "Mistral", "sliding_window": 6}, "sdpa")):
        model = causal_lm(**changes)
        with torch.no_grad():
            token_logprobs(model, pack(groups, 0))
        assert model.config._attn_implementation == wanted


def test_a_layer_that_does_not_hand_the_layout_on_is_found_out(groups, monkeypatch):
    model = causal_lm()
    assert shared_prefix.install(model)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        shared_prefix.NAME,
        lambda *given, packed=None, **more: sdpa_attention_forward(*given, **more),
    )
    assert check_packing(model, pack(groups, 0), plain(groups, 0)) == math.inf


def test_an_attention_kernel_without_such_masks_is_found_out(groups):
    model = causal_lm(attn_implementation="flex_attention")
    assert check_packing(model, pack(groups, 0), plain(groups, 0)) == math.inf


def test_lora_adapters_take_part(groups):
    import peft

    model = peft.get_peft_model(causal_lm(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    packed = pack(groups, 0)
    with torch.no_grad():
        adapted, _ = token_logprobs(model, packed)
        with model.disable_adapter():
            bare, _ = token_logprobs(model, packed)
    assert (adapted - bare).abs().max() > 1e-3
    assert check_packing(model, packed, plain(groups, 0)) < 1e-4


def test_a_wrapped_model_runs_through_the_forward_of_its_wrapper(qwen3, groups):
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.passes = module, 0

        def forward(self, *args):
            self.passes += 1
            return self.module(*args)

    wrapper = Wrapper(qwen3)
    packed = pack(groups, 0)
    with torch.no_grad():
        found, _ = token_logprobs(wrapper, packed)
        expected, _ = token_logprobs(qwen3, packed)
        assert qwen3(input_ids=packed.input_ids).logits.shape[-1] == VOCABULARY  # its own forward is back
    assert wrapper.passes == 1
    assert torch.equal(found, expected)
