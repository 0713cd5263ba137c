"""Tokens a second of a learner's step, against a bare torch loop over the same packed batches.

    rporec bench learner [--json]

`learner` is one whole step: rows of Arrow to micro-batches, the reference's forward and the proximal one (that of
the first micro-batch serves its backward too), rewards, advantages, loss, backward, optimiser. `bare` is the same
passes of the same model over batches that are laid out already, and AdamW, in plain torch.
A token is one of a prompt or completion, counted once. `share_of_peak` is of what a product of two large matrices
reaches here, with 2 floating-point operations a parameter and token of a forward pass and 4 of a backward.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.result import result
from benchmarks.rounds import in_turns
from benchmarks.weights import groups as made_up
from benchmarks.workload import LARGE, SMALL
from rporec.config import Config, TinyConfig, parse_config
from rporec.engine.types import Version

SHAPES = {"0.9M": (SMALL, 16), "10M": (LARGE, 4)}  # and groups of a step, two micro-batches
PROMPT, COMPLETION, SIZE = 256, 64, 8
KL = 0.05
ROUNDS = 7


def measure(shape: TinyConfig, count: int, folder: Path, rounds: int) -> dict[str, Any]:
    """`{tokens, flops, rounds}` of a step of `count` groups; both ways in turns."""
    from rporec.models.trainable import learner_environment

    os.environ.update(learner_environment(False, threads=1))  # before DeepSpeed is imported
    from rporec.models.backbone import load_model, make_tiny
    from rporec.models.policy import token_logprobs
    from rporec.rl.learner import Clock, Learner

    config = _config(count)
    model = make_tiny([" ".join(map(str, range(2000)))] * 2, shape, config.seed, folder)
    learner = Learner(model, config)
    batch = made_up(count, SIZE, learner.policy.engine.module.config.vocab_size, prompt=PROMPT, completion=COMPLETION)
    alone = load_model(model)
    alone.train()
    optimiser = torch.optim.AdamW(alone.parameters(), lr=config.rl.lr, betas=(0.9, 0.95), weight_decay=0.0)
    packed = [one.packed for one in learner.micro_batches(batch, Version(0, 0))]

    def bare(_: int) -> None:
        with torch.no_grad():
            for one in packed:
                token_logprobs(alone, one)  # the reference's
            for one in packed[1:]:
                token_logprobs(alone, one, with_entropy=True)  # the proximal ones
        for one in packed:
            logprobs, _ = token_logprobs(alone, one, with_entropy=one is packed[0])
            logprobs.mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    ways = {"learner": lambda _: learner.step(batch, Version(0, 0), Clock()), "bare": bare}
    parameters = sum(parameter.numel() for parameter in alone.parameters())
    tokens = count * (PROMPT + SIZE * COMPLETION)
    return {
        "tokens": tokens,
        # Reference, forward and backward of all, proximal of all but the first.
        "flops": (2 + 2 + 4 + 2 * (1 - 1 / len(packed))) * parameters * tokens,
        "rounds": in_turns(f"{parameters / 1e6:.1f} M parameters", ways, rounds),
    }


def peak(size: int = 1536, rounds: int = 5) -> float:
    """Floating-point operations a CPU second of torch's product of two square float32 matrices: the best round."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(rounds + 1):
        began = time.process_time()
        left @ right
        seconds.append(time.process_time() - began)
    return 2 * size**3 / min(seconds[1:])


def _config(count: int) -> Config:
    return parse_config(
        {
            "device": "cpu",
            "groups_per_step": count,
            "group_size": SIZE,
            "sampling": {"max_tokens": COMPLETION},
            "rl": {"kl": KL, "lr": 1e-6, "micro_batch_groups": count // 2},
        }
    )


QUICK = {"rounds": 2}


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    torch.set_num_threads(1)
    ratios: dict[str, Any] = {}
    seconds: dict[str, dict[str, float]] = {"wall": {}, "cpu": {}}
    highest = peak()
    for name, (shape, count) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(shape, count, Path(folder) / "model", rounds)
        timed = found["rounds"]
        median = timed.median("cpu")
        pairs = timed.cpu["bare"] / timed.cpu["learner"]
        ratios |= {
            f"learner_over_bare_{name}": round(timed.times("bare", "learner"), 3),
            f"learner_over_bare_wall_{name}": round(timed.times("bare", "learner", "wall"), 3),
            f"learner_over_bare_pairs_{name}": [round(float(pair), 3) for pair in pairs],
            f"tokens_per_cpu_second_{name}": round(found["tokens"] / median["learner"], 1),
            f"share_of_peak_{name}": round(found["flops"] / median["learner"] / highest, 3),
            f"share_of_peak_bare_{name}": round(found["flops"] / median["bare"] / highest, 3),
        }
        for clock, taken in seconds.items():
            taken |= {f"{way}_{name}": value for way, value in timed.median(clock).items()}  # type: ignore[arg-type]
    return result("learner", ratios, seconds["wall"], seconds["cpu"], peak_gflops=round(highest / 1e9, 1))
