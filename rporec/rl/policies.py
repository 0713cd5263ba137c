"""The policy in training, its frozen reference, and how both read groups: what learners have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rporec.config import Config
from rporec.models.backbone import load_model
from rporec.models.policy import Packed, check_packing, packing_tolerance
from rporec.models.trainable import Trainable
from rporec.rl.packing import GroupTokens, pack, plain


def start_policy(model: Path | str, config: Config, world: int) -> Trainable:
    """The model of a folder under the optimiser of `config.rl`, for `world` ranks that share a step's groups."""
    torch.manual_seed(config.seed)
    return Trainable(
        model,
        config,
        lr=config.rl.lr,
        accumulation=math.ceil(config.groups_per_step // world / config.rl.micro_batch_groups),
        micro_batch=config.rl.micro_batch_groups,
        schedule=lr_schedule(config),
        grad_clip=config.rl.grad_clip,
        dropout=False,
    )


def frozen_reference(model: Path | str, policy: Trainable) -> torch.nn.Module:
    """The model of a folder as it is there, in the precision and on the device of the policy."""
    dtype = next(policy.engine.module.parameters()).dtype
    return load_model(model, dtype).requires_grad_(False).eval().to(policy.device)


def lr_schedule(config: Config) -> Callable[[int], float] | None:
    """Factor of `rl.lr` at an optimiser step (from 0): a linear rise over `warmup_steps`, then `schedule`; None: 1."""
    rise, steps = config.rl.warmup_steps, config.steps
    if config.rl.schedule == "cosine":
        return lambda step: (step + 1) / rise if step < rise else _cosine((step - rise) / max(1, steps - rise))
    return (lambda step: min(1.0, (step + 1) / rise)) if rise else None


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Layout:
    """Lays groups out for one model: packed, or as plain sequences for a model that packed rows would mislead.

    Which of them the longest group of the first call decides, since a window shows only in rows that are longer.
    """

    def __init__(self, policy: Trainable) -> None:
        self._policy = policy
        pad = policy.engine.module.config.pad_token_id
        self.pad_id = 0 if pad is None else int(pad)
        self.packs: bool | None = None

    def __call__(self, groups: Sequence[GroupTokens]) -> Packed:
        """On the CPU."""
        if self.packs is None:
            self.packs = self._may_pack(max(groups, key=lambda group: group.packed_length))
        return (pack if self.packs else plain)(groups, self.pad_id)

    def _may_pack(self, group: GroupTokens) -> bool:
        module = self._policy.engine.module
        layouts = (pack([group], self.pad_id), plain([group], self.pad_id))
        difference = check_packing(module, *(layout.to(self._policy.device) for layout in layouts))
        if difference <= packing_tolerance(module):
            return True
        print(
            f"learner: this model reads packed groups differently (by {difference:.2g} nats); "
            "training on plain sequences, which costs the prompt once per completion",
            flush=True,
        )
        return False
