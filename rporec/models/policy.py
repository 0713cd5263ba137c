"""Log-probabilities and entropies of completion tokens under a Hugging Face causal LM.

Logits exist only for the tokens that are trained on, and only a chunk of them at a time: with a
vocabulary of 152k the logits of 4,000 tokens would be 2.4 GB in float32, twice that with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rporec.models import shared_prefix
from rporec.models.shared_prefix import SharedPrefix

PAD = -1
LOGITS_BUDGET = 1 << 26  # logits of one chunk: 256 MB in float32, a few such buffers at the peak


@dataclass(frozen=True)
class Packed:
    """B rows of L tokens, and where to read the T completion tokens of R completions from them.

    The branch of a token is 0 in a prompt, c + 1 in the c-th completion of its row and `PAD` in
    padding.
    """

    input_ids: torch.Tensor  # int64 [B, L]
    position_ids: torch.Tensor  # int64 [B, L]
    branches: torch.Tensor  # int64 [B, L]
    rows: torch.Tensor  # int64 [T], index into the flattened [B * L] of the position that predicts each token
    labels: torch.Tensor  # int64 [T]
    owner: torch.Tensor  # int64 [T], completion of each token, 0 … R - 1
    group: torch.Tensor  # int64 [R], group of each completion, from 0
    causal: bool  # no row holds more than one completion: the plain causal mask is right

    @property
    def tokens(self) -> int:
        return self.labels.numel()

    @property
    def completions(self) -> int:
        return self.group.numel()

    @cached_property
    def prefix(self) -> SharedPrefix:
        """Where the prompts and completions lie; of one layout for all passes over it."""
        return SharedPrefix(self.branches)

    def allowed(self, window: int | None = None) -> torch.Tensor:
        """bool [B, 1, L, L]: may the query token (third axis) see the key token (fourth)?

        `window`: see only keys fewer than `window` positions back, as a sliding attention layer does.
        Padding sees padding, so that no row of the softmax is empty.
        """
        query, key = self.branches[:, :, None], self.branches[:, None, :]
        mask = (key == query) | ((key == 0) & (query > 0))
        mask &= torch.ones(mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
        if window is not None:
            mask &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return mask[:, None]

    def to(self, device: torch.device | str) -> Packed:
        if self.input_ids.device == torch.device(device):
            return self  # with the layout that it has found
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: one.to(device) for name, one in present.items() if isinstance(one, torch.Tensor)}
        return replace(self, **moved)


def token_logprobs(
    model: nn.Module,
    packed: Packed,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    budget: int = LOGITS_BUDGET,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 log-probabilities [T] and full-vocabulary entropies [T] (nats) of completion tokens.

    Both are of the distribution that was sampled from, softmax(logits / temperature). `model` is a
    transformers causal LM, bare or inside peft, DistributedDataParallel or a DeepSpeed engine; the
    latter two run through their own forward, so their hooks see the pass. Entropies carry no
    gradient and are None unless asked for. `budget` is the number of logits held at once: beyond it
    they are computed in chunks, and computed again in the backward pass.
    """

    def score(packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
        lm = _causal_lm(model)
        packed = packed.to(lm.device)
        tokens, positions, rows = packed.input_ids, packed.position_ids, packed.rows
        how: dict[str, Any] = {}
        if not packed.causal and shared_prefix.install(lm):
            prefix = packed.prefix
            tokens, positions = (one.flatten()[prefix.tokens][None] for one in (tokens, positions))
            rows = prefix.find(rows)
            # So that no mask is made, and that a layer that does not hand `packed` on is found out.
            nothing = torch.full((1, 1, 1, 1), math.nan, dtype=lm.dtype, device=tokens.device)
            how = {"packed": prefix, "attention_mask": nothing}
        elif not packed.causal:
            how = {"attention_mask": _attention_mask(lm, packed)}
        output = lm.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False, **how)
        hidden = output.last_hidden_state.flatten(0, 1)[rows]
        return _score_chunks(lm, hidden, packed.labels, temperature, with_entropy, budget)

    return _through(model, score)(packed)


def check_packing(model: nn.Module, packed: Packed, plain: Packed) -> float:
    """Largest absolute difference (nats) between log-probabilities of one group laid out both ways.

    Below `packing_tolerance` the model may train on packed rows; a model that cannot take such a
    mask at all gives infinity. Choose a long group: a window shows only in rows that are longer.
    """
    if _causal_lm(model).config._attn_implementation not in ("sdpa", "eager", shared_prefix.NAME):
        return math.inf
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected, _ = token_logprobs(model, plain)
            try:
                found, _ = token_logprobs(model, packed)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                # The plain pass worked, so it is the mask that this architecture has no place for.
                return math.inf
    finally:
        model.train(training)
    difference = (found - expected).abs().max().item() if len(expected) else 0.0
    return math.inf if math.isnan(difference) else difference


def packing_tolerance(model: nn.Module) -> float:
    """What rounding alone may make of `check_packing`: 1e-3 nats in float32, 0.25 in half precision."""
    return 1e-3 if _causal_lm(model).dtype == torch.float32 else 0.25


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _through(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in the place of the wrapped module's forward, so that calling it runs the wrapper's.

    DeepSpeed and DistributedDataParallel arm their gradient hooks in their own forward.
    """
    inner = getattr(model, "module", None)
    if inner is None:
        return function

    def call(*args: Any) -> Any:
        own = vars(inner).get("forward")
        inner.forward = function
        try:
            return model(*args)
        finally:
            del inner.forward
            if own is not None:
                inner.forward = own

    return call


def _attention_mask(lm: Any, packed: Packed) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive 4-D masks of packed rows, as the decoder takes them.

    transformers uses a 4-D mask as it is, in sliding layers too, so windows are cut in here.
    """

    def additive(window: int | None) -> torch.Tensor:
        blocked = ~packed.allowed(window)
        return torch.zeros(blocked.shape, dtype=lm.dtype, device=blocked.device).masked_fill_(
            blocked, torch.finfo(lm.dtype).min
        )

    config = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        return {"full_attention": additive(None), "sliding_attention": additive(window)}
    return additive(None if kinds else window)


def _score_chunks(
    lm: Any, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, with_entropy: bool, budget: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = lm.get_output_embeddings()
    config = lm.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= (getattr(config, "logits_scaling", None) or 1.0) * temperature  # Granite

    def score(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(hidden).float()
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        if scale != 1.0:
            logits = logits * scale
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.gather(-1, labels[:, None])[:, 0]
        if not with_entropy:
            return chosen, chosen.new_zeros(0)
        with torch.no_grad():
            return chosen, -(logprobs.exp() * logprobs).sum(-1)

    size = max(1, budget // config.vocab_size)
    if len(labels) <= size:
        chosen, entropies = score(hidden, labels)
    else:
        recompute = torch.is_grad_enabled()
        parts = [
            checkpoint(score, *part, use_reentrant=False) if recompute else score(*part)
            for part in zip(hidden.split(size), labels.split(size), strict=True)
        ]
        chosen, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return chosen, entropies if with_entropy else None
