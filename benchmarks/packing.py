"""A group as one training sequence against one sequence for each completion: what the prompt's repetition costs.

    rporec bench packing [--json]

Forward and backward pass of one group, a prompt of 256 tokens and 8 completions of 64, through a Qwen3 in
float32 on one thread. Both layouts give the same log-probabilities, see `max_difference_…` (nats).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.result import result
from benchmarks.rounds import Rounds, in_turns
from rporec.config import TinyConfig
from rporec.models.policy import Packed, check_packing, token_logprobs
from rporec.rl.packing import GroupTokens, pack, plain

PROMPT, COMPLETION, GROUP = 256, 64, 8  # tokens, tokens, completions
SHAPES = {
    "0.9M": TinyConfig(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384, vocabulary=1000),
    "10M": TinyConfig(hidden=320, layers=7, heads=10, kv_heads=5, intermediate=960, vocabulary=4096),
}


def qwen3(shape: TinyConfig) -> nn.Module:
    """Random, with weights so large that a wrong mask would show in what it says next."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def group(vocabulary: int, prompt: int, completion: int, size: int) -> GroupTokens:
    rng = np.random.default_rng(0)
    return GroupTokens(rng.integers(vocabulary, size=prompt), list(rng.integers(vocabulary, size=(size, completion))))


def measure(
    name: str, shape: TinyConfig, *, prompt: int = PROMPT, completion: int = COMPLETION, size: int = GROUP, rounds: int
) -> tuple[Rounds, float]:
    """Both layouts in turns, "packed" and "plain", and the largest difference of their log-probabilities."""
    model, tokens = qwen3(shape), group(shape.vocabulary, prompt, completion, size)
    layouts = {"packed": pack([tokens], 0), "plain": plain([tokens], 0)}

    def learn(layout: Packed) -> None:
        logprobs, _ = token_logprobs(model, layout)
        logprobs.mean().neg().backward()
        model.zero_grad()

    difference = check_packing(model, layouts["packed"], layouts["plain"])
    ways = {way: lambda _, layout=layout: learn(layout) for way, layout in layouts.items()}
    return in_turns(f"{name} parameters", ways, rounds), difference


QUICK = {"rounds": 5}


def run(rounds: int = 11) -> dict[str, Any]:
    ratios: dict[str, float] = {}
    seconds: dict[str, dict[str, float]] = {"wall": {}, "cpu": {}}
    for name, shape in SHAPES.items():
        timed, difference = measure(name, shape, rounds=rounds)
        ratios[f"packed_over_plain_{name}"] = round(timed.times("plain", "packed"), 3)
        ratios[f"max_difference_{name}"] = difference
        for clock, found in seconds.items():
            found |= {f"{way}_{name}": value for way, value in timed.median(clock).items()}  # type: ignore[arg-type]
    return result("packing", ratios, seconds["wall"], seconds["cpu"])
