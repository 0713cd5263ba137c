"""Supervised warm-up: the learner group alone, on the pairs of the recipe."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from actors import checkpoints
from rporec.config import ConfigError
from rporec.files import append_line, cut_lines


def warmup_loop(spec: dict[str, Any]) -> None:
    """Cross entropy over the completion tokens; from its newest checkpoint."""
    run, config = spec["run"], spec["config"]
    run.require_here()
    import torch
    import torch.distributed as dist

    from rporec.models.policy import token_logprobs
    from rporec.models.trainable import Trainable, all_sum
    from rporec.recipes import load_recipe
    from rporec.rl.packing import GroupTokens, by_length, plain

    recipe = load_recipe(run, config)
    warmup = config.warmup
    pairs = recipe.pairs()
    rank, world = dist.get_rank(), dist.get_world_size()
    if warmup.batch_size < world:
        raise ConfigError(f"warmup.batch_size: {warmup.batch_size} leaves none for some of {world} learners")
    share = math.ceil(warmup.batch_size / world)
    accumulation = math.ceil(share / warmup.micro_batch_size)
    steps = spec["steps"] or max(1, math.ceil(warmup.epochs * len(pairs) / warmup.batch_size))
    torch.manual_seed(config.seed)
    policy = Trainable(
        run.backbone,
        config,
        lr=warmup.lr,
        accumulation=accumulation,
        micro_batch=warmup.micro_batch_size,
        schedule=lambda step: min(1.0, (step + 1) / max(1, steps // 50)) * (1 - step / steps),
    )
    pad = recipe.writer.tokenizer.pad_token_id
    order = Shuffled(len(pairs), config.seed)
    kept = spec["folder"] / "checkpoints"
    first = checkpoints.resume(kept, policy)
    order.take(first * warmup.batch_size)
    before = (cut_lines(spec["log"], first) if rank == 0 else [])[-1:]
    began, cpu = time.monotonic(), time.process_time()
    for step in range(first, steps):
        rows = order.take(warmup.batch_size)
        mine = [pairs[row] for row in rows[rank::world]]
        groups = [GroupTokens(pair.prompt_ids, [np.asarray(pair.completion_ids)]) for pair in mine]
        tokens = all_sum(torch.tensor([sum(len(pair.completion_ids) for pair in mine)])).item()
        total = torch.zeros(1)
        parts = by_length(groups, warmup.micro_batch_size)
        for part in range(accumulation):
            chosen = parts[part] if part < len(parts) else parts[-1][:1]
            logprobs, _ = token_logprobs(policy.engine, plain([groups[i] for i in chosen], pad))
            # A rank with fewer micro-batches joins the others with a part that weighs nothing.
            loss = -logprobs.sum() / tokens if part < len(parts) else 0.0 * logprobs.sum()
            policy.backward(loss)
            total += loss.detach().cpu()
        loss = all_sum(total).item()
        if rank == 0:
            spent = {"seconds": time.monotonic() - began, "cpu_seconds": (time.process_time() - cpu) * world}
            spent = {key: value + sum(record[key] for record in before) for key, value in spent.items()}
            record = {"step": step, "steps": steps, "loss": loss, "lr": policy.lr, "tokens": tokens, **spent}
            append_line(spec["log"], record)
        if (step + 1) % warmup.checkpoint_every == 0 and step + 1 < steps:
            checkpoints.save(kept, step + 1, policy)
    policy.save_model(recipe.writer.tokenizer, spec["folder"] / "model")


class Shuffled:
    """Endless passes over `size` rows, each pass in a new order that follows from the seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng = size, np.random.default_rng([seed, 4])
        self.rest = np.empty(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        while len(self.rest) < count:
            self.rest = np.concatenate([self.rest, self.rng.permutation(self.size)])
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken
