"""Policy losses and off-policy corrections as pure functions on flat per-token tensors.

Three policies give each completion token a log-probability: the behaviour policy that sampled it
(`mu`, from the engine), the proximal policy (`pi_prox`, the learner's forward before the update) and
the live policy (`pi`, with gradient). So a token has two ratios:

    w = exp(pi_prox - mu)    how stale, and how unlike the engine is to the learner   -> corrections
    r = exp(pi - pi_prox)    how far this update has gone                              -> clipping

Shapes: T tokens of R completions; `owner` int64 [T] names the completion of each token, `mask` bool
[T] the tokens that take part (a completion whose scoring failed has none).

Every loss is a weighted sum over tokens whose weights hold *global* counts (`Totals`), so the losses
and gradients of micro-batches and ranks add up to those of the whole batch, however it is cut. What
must not be cut is a completion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from rporec.config import RLConfig
    from rporec.rl.advantages import Advantage

LossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]
Estimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0  # nats; exp of more is no information, only overflow
TIED = 1e-4  # nats; entropies after the same tokens, read in two places, differ by rounding (1e-6 in float32)


@dataclass(frozen=True)
class LossSpec:
    """The part of `RLConfig` that shapes the loss; `max_tokens` is the constant of Dr. GRPO."""

    loss: LossName = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    correction: Literal["none", "tis", "icepop"] = "tis"
    tis_cap: float = 2.0
    icepop: tuple[float, float] = (0.5, 5.0)
    sequence_mask: tuple[float, float] | None = (0.5, 2.0)
    kl: float = 0.0
    kl_estimator: Estimator = "k3"
    max_tokens: int = 1

    @classmethod
    def from_config(cls, config: RLConfig, max_tokens: int) -> LossSpec:
        names = set(cls.__dataclass_fields__) - {"max_tokens"}
        return cls(**{name: getattr(config, name) for name in names}, max_tokens=max_tokens)

    @property
    def advantage(self) -> Advantage:
        """The advantage that belongs to the loss: centred only for Dr. GRPO, leave-one-out for RLOO."""
        return self.loss if self.loss in ("dr_grpo", "rloo") else "grpo"  # type: ignore[return-value]


@dataclass(frozen=True)
class Totals:
    """Counts over one optimiser step: all micro-batches of all ranks."""

    tokens: int
    completions: int

    @classmethod
    def count(cls, owner: torch.Tensor, mask: torch.Tensor) -> Totals:
        """Tokens that take part, and completions that have one."""
        return cls(int(mask.sum()), owner[mask].unique().numel())

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.tokens + other.tokens, self.completions + other.completions)


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the step's loss: shares add up. `total` carries the gradient."""

    total: torch.Tensor  # policy + coefficient * kl
    policy: torch.Tensor
    kl: torch.Tensor  # before the coefficient; 0 without a reference
    # Share of the step's tokens that carry the policy gradient and whose r left the clip range in the direction of A
    # (cispo: in either; rloo: none).
    clipped: torch.Tensor


def policy_loss(
    pi: torch.Tensor,
    pi_prox: torch.Tensor,
    mu: torch.Tensor,
    advantages: torch.Tensor,
    owner: torch.Tensor,
    mask: torch.Tensor,
    spec: LossSpec,
    totals: Totals,
    *,
    carries: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
) -> Loss:
    """The loss of one micro-batch, all tensors [T]; `advantages` are per token (`A[owner]`).

    `carries` bool [T]: tokens that carry the policy gradient, see `top_entropy`. It and the
    corrections act on the policy term alone; KL, added after them, is taken on every token of `mask`
    that the sequence mask kept. Counts in the denominators are those before any of these masks, so
    that a completion that is left out does not make the others count more.
    """
    weights = token_weights(owner, mask, spec, totals)
    log_w = _log_ratio(pi_prox, mu, mask)
    kept = mask
    if spec.sequence_mask is not None:
        kept = mask & sequence_mask(log_w, owner, mask, *spec.sequence_mask)
    active = kept if carries is None else kept & carries
    w = corrected(importance(log_w, owner, mask, spec.loss), spec)
    log_r = _log_ratio(pi, pi_prox, mask)
    low, high = 1 - spec.clip_low, 1 + spec.clip_high

    if spec.loss == "rloo":
        per_token = reinforce(pi, advantages, w)
        clipped = torch.zeros_like(active)
    elif spec.loss == "cispo":
        ratio = log_r.exp()
        per_token = cispo(pi, ratio, advantages, w, low, high)
        clipped = (ratio < low) | (ratio > high)
    else:
        ratio = gspo_ratio(log_r, owner, mask) if spec.loss == "gspo" else log_r.exp()
        per_token = clipped_surrogate(ratio, advantages, w, low, high)
        clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))

    policy = _masked_sum(per_token * weights, active)
    kl = policy.new_zeros(())
    if reference is not None:
        kl = _masked_sum(kl_estimate(torch.where(mask, pi, reference), reference, spec.kl_estimator) * weights, kept)
    return Loss(
        total=policy + spec.kl * kl if spec.kl else policy,
        policy=policy.detach(),
        kl=kl.detach(),
        clipped=(clipped & active).sum() / max(totals.tokens, 1),
    )


# Losses, per token.


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, w: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """-w * min(r * A, clip(r, low, high) * A) [T].

    Decoupled PPO: Hilton et al. 2022, arXiv 2110.00641; for language models AReaL, arXiv
    2505.24298, section 5.2. With w = 1 the clipped loss of PPO, arXiv 1707.06347, eq. 7; with
    high - 1 > 1 - low the clip-higher of DAPO, arXiv 2503.14476, section 3.1.
    """
    return -w * torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def gspo_ratio(log_r: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sg[s] * pi_t / sg[pi_t] [T], s = exp(mean over the completion of log r).

    GSPO, arXiv 2507.18071, eq. 7, in its token form (GSPO-token, eq. 14): the value of the sequence
    ratio with each token's own gradient, so that averaged over the completion it is GSPO, and masks
    on tokens stay possible.
    """
    sequence = completion_mean(log_r.detach(), owner, mask)[owner]
    return (sequence + log_r - log_r.detach()).exp()


def cispo(
    pi: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, w: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """-sg[w * clip(r, low, high)] * A * log pi [T]: the weight is clipped, no token loses its gradient.

    CISPO, MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5. The paper leaves the lower bound open
    (clip_low = 1).
    """
    return -(w * ratio.clamp(low, high)).detach() * advantages * pi


def reinforce(pi: torch.Tensor, advantages: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """-w * A * log pi [T]; summed over a completion, the REINFORCE loss of the whole completion.

    RLOO, arXiv 2402.14740, sections 2.3 and 3.2: a completion is one action, and nothing is clipped.
    """
    return -w * advantages * pi


def token_weights(owner: torch.Tensor, mask: torch.Tensor, spec: LossSpec, totals: Totals) -> torch.Tensor:
    """Weight [T] of each token's loss in the step's; 0 outside `mask`. n = tokens of its completion.

    grpo, gspo   1 / (n * completions)             DeepSeekMath, arXiv 2402.03300, eq. 3
    dr_grpo      1 / (max_tokens * completions)    Dr. GRPO, arXiv 2503.20783, section 3.2
    dapo, cispo  1 / tokens                        DAPO, arXiv 2503.14476, eq. 8
    rloo         1 / completions                   RLOO, arXiv 2402.14740, section 2.3
    """
    completions = max(totals.completions, 1)
    share = mask.to(torch.float32)
    if spec.loss in ("grpo", "gspo"):
        return share / (_lengths(owner, mask)[owner].clamp(min=1) * completions)
    if spec.loss in ("dapo", "cispo"):
        return share / max(totals.tokens, 1)
    return share / (completions * (spec.max_tokens if spec.loss == "dr_grpo" else 1))


# Corrections for tokens that another policy sampled.


def importance(log_w: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor, loss: LossName) -> torch.Tensor:
    """w [T] on the level at which the loss works: losses on sequences have one w for all of a completion.

    gspo: the geometric mean of its tokens' w, like its own ratio. rloo: their product, the ratio of
    the probabilities of the whole completion.
    """
    if loss == "gspo":
        log_w = completion_mean(log_w, owner, mask)[owner]
    elif loss == "rloo":
        log_w = _completion_sum(log_w, owner, mask)[owner].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_w.exp()


def corrected(w: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    """The factor [T] of the policy term: w after the configured correction, 1 without one."""
    if spec.correction == "tis":
        return truncated(w, spec.tis_cap)
    if spec.correction == "icepop":
        return icepop(w, *spec.icepop)
    return torch.ones_like(w)


def truncated(w: torch.Tensor, cap: float) -> torch.Tensor:
    """min(w, cap): truncated importance sampling.

    Ionides 2008, J. Comput. Graph. Stat. 17(2); between engine and learner: Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training".
    """
    return w.clamp(max=cap)


def icepop(w: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """w where low <= w <= high, else 0: tokens on which the policies disagree carry no gradient.

    IcePop, Ring-1T, arXiv 2510.18855, M(k) in the objective.
    """
    return torch.where((w >= low) & (w <= high), w, 0)


def sequence_mask(
    log_w: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """bool [T]: the token's completion has low <= exp(mean log w) <= high.

    The geometric mean does not drift with length as the product does. Masked importance sampling on
    sequences: Liu, Li et al. 2025, "When speed kills stability".
    """
    mean = completion_mean(log_w, owner, mask)[owner]
    return (mean >= math.log(low) if low > 0 else torch.ones_like(mask)) & (mean <= math.log(high))


# Distance to the reference policy.


def kl_estimate(pi: torch.Tensor, reference: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """KL(pi || reference) [T], estimated from the sampled token; d = reference - pi.

    k1 = -d    k2 = d^2 / 2    k3 = exp(d) - d - 1

    Schulman 2020, "Approximating KL divergence"; k3 in GRPO: arXiv 2402.03300, eq. 4. As a loss k1
    has a gradient of 0 in expectation, k2 that of the KL; k3 is never negative and the usual choice.
    """
    d = reference - pi
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        d = d.clamp(max=LOG_RATIO_LIMIT)
        return d.exp() - d - 1
    raise ValueError(f"kl_estimator: {estimator!r} is none of k1, k2, k3")


# Which tokens carry the policy gradient.


def entropy_threshold(entropies: torch.Tensor, share: float) -> float:
    """The entropy (nats) that the top `share` of tokens reach: the ceil(share * n)-th largest.

    `entropies` [n]: every token that takes part in the *global* batch, all micro-batches and ranks.
    -inf when all are wanted or there are none.

    Wang et al. 2025, "Beyond the 80/20 rule", arXiv 2506.01939.
    """
    n = entropies.numel()
    wanted = math.ceil(share * n - 1e-9)
    if n == 0 or wanted >= n:
        return -math.inf
    return torch.kthvalue(entropies, n - wanted + 1).values.item()


def top_entropy(entropies: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool [T]: tokens at or above the threshold.

    Ties all stay, and what is less than `TIED` below is one: completions of a group begin alike, and
    rounding must not decide which of them learns.
    """
    return entropies >= threshold - TIED


# What to watch.


def ratio_stats(
    pi_prox: torch.Tensor,
    mu: torch.Tensor,
    owner: torch.Tensor,
    mask: torch.Tensor,
    spec: LossSpec,
    current: torch.Tensor | None = None,
) -> dict[str, float]:
    """How far the learner is from the policies that sampled, over the tokens of one step.

    mean, min, max, p99   of w
    ess                   effective sample size as a share: (sum w)^2 / (n * sum w^2), Kong 1992
    clipped               share of tokens that the correction caps (tis) or zeroes (icepop)
    masked                share of completions that the sequence mask drops
    stale_tokens          share of tokens sampled by an older version than the current one
    stale_mean, stale_max of |log w| on those tokens (nats)

    `current` bool [T]: sampled by the version that pi_prox is of. The rest measures staleness and
    engine together; on current tokens alone see `engine_mismatch`. Zeros when no token takes part.
    """
    log_w = _log_ratio(pi_prox, mu, mask)
    stale = torch.zeros_like(mask) if current is None else mask & ~current
    tokens = int(mask.sum())
    if tokens == 0:
        names = "mean min max p99 ess clipped masked stale_tokens stale_mean stale_max"
        return dict.fromkeys(names.split(), 0.0)
    w = log_w[mask].double().exp()
    raw = importance(log_w, owner, mask, spec.loss)[mask]
    touched = int((corrected(raw, spec) != raw).sum()) if spec.correction != "none" else 0
    dropped = 0
    if spec.sequence_mask is not None:
        dropped = owner[mask & ~sequence_mask(log_w, owner, mask, *spec.sequence_mask)].unique().numel()
    distance = log_w[stale].abs()
    return {
        "mean": w.mean().item(),
        "min": w.min().item(),
        "max": w.max().item(),
        "p99": w.kthvalue(math.ceil(0.99 * tokens)).values.item(),
        "ess": (w.sum().square() / (tokens * w.square().sum())).item(),
        "clipped": touched / tokens,
        "masked": dropped / owner[mask].unique().numel(),
        "stale_tokens": int(stale.sum()) / tokens,
        "stale_mean": distance.mean().item() if len(distance) else 0.0,
        "stale_max": distance.max().item() if len(distance) else 0.0,
    }


def engine_mismatch(
    pi_prox: torch.Tensor, mu: torch.Tensor, mask: torch.Tensor, current: torch.Tensor
) -> dict[str, float]:
    """mean and max of |pi_prox - mu| (nats) on tokens of the current version: same weights, two programs."""
    distance = (pi_prox - mu)[mask & current].abs()
    if len(distance) == 0:
        return {"mean": 0.0, "max": 0.0}
    return {"mean": distance.mean().item(), "max": distance.max().item()}


# Sums over completions.


def completion_mean(values: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [T] over the masked tokens of each completion; 0 for one without any."""
    return _completion_sum(values, owner, mask) / _lengths(owner, mask).clamp(min=1)


def _completion_sum(values: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = int(owner.max()) + 1 if len(owner) else 0
    return values.new_zeros(rows).index_add_(0, owner, torch.where(mask, values, 0))


def _lengths(owner: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _completion_sum(mask.to(torch.float32), owner, mask)


def _log_ratio(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """new - old inside the mask and 0 outside, where a log-probability may be anything."""
    return (torch.where(mask, new, 0) - torch.where(mask, old, 0)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0).sum()
