"""Training the RecHead: gradient descent on its networks, then a search for the experts' scalars."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from rporec.config import HeadConfig
from rporec.data.slices import evenly_spread
from rporec.evaluation.ranking import ndcg, ranks
from rporec.models.weight_search import search_weights

if TYPE_CHECKING:
    from rporec.models.head_inputs import HeadInputs
    from rporec.models.rechead import Encoded, RecHead

VALIDATION_ROWS = 2000  # ranked after each epoch, evenly spread over the validation samples
SEARCH_ROWS = 2000  # ranked in the search for the scalars: as many as a baseline is chosen on
SCALE_LR = 10.0  # the text's one scalar learns faster: its vectors get no gradient while it is near 0


@dataclass(frozen=True)
class HeadReport:
    epochs: int  # whose state the head holds
    ndcg: float  # NDCG@10 of that state on the validation rows, networks alone; nan without validation
    history: tuple[float, ...]  # NDCG@10 after each epoch that ran


def train_head(
    head: RecHead,
    train: HeadInputs,
    targets: np.ndarray,
    valid: HeadInputs | None = None,
    valid_targets: np.ndarray | None = None,
    *,
    exclude_history: bool = True,
    seed: int = 0,
    device: str = "cpu",
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, float, float], None] | None = None,
) -> HeadReport:
    """Train `head` in place with its own config and leave it in its best state by validation NDCG@10.

    targets: int [B] of `train`. Without `valid` exactly `head.config.epochs` epochs run (a refit).
    exclude_history: whether validation removes the user's earlier items. world: ranks, each of which takes
    every world-th row of the same batches; gradients are averaged. progress: called with (epoch, mean loss, NDCG@10).
    The same seed, inputs and world give the same head.
    """
    config = head.config
    head.to(device).train()
    head.known[_shown(train, targets)] = True
    optimizer = _optimizer(head, config)
    encoded, wanted = head.encode(train), torch.from_numpy(np.asarray(targets, dtype=np.int64))
    check = _Validation(head, valid, valid_targets, exclude_history) if valid is not None else None
    order_rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed * world + rank)
    best, best_state, history = HeadReport(0, -1.0, ()), None, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * world + rank)
        for epoch in range(1, config.epochs + 1):
            losses = []
            for rows in _batches(encoded, config.batch_size, world, order_rng):
                mine = rows[rank::world]
                loss = head(encoded.take(mine, device), wanted[mine].to(device), generator)
                optimizer.zero_grad()
                loss.backward()
                if world > 1:
                    _average_gradients(head, world)
                optimizer.step()
                losses.append(loss.detach())
            value = check.ndcg(world, device) if check else float("nan")
            history.append(value)
            if progress:
                progress(epoch, float(torch.stack(losses).mean()), value)
            if check is None:
                best = HeadReport(epoch, value, ())
            elif value > best.ndcg:
                best, best_state = HeadReport(epoch, value, ()), copy.deepcopy(head.state_dict())
            elif epoch - best.epochs >= config.patience:
                break
    if best_state is not None:
        head.load_state_dict(best_state)
    head.eval()
    return HeadReport(best.epochs, best.ndcg, tuple(history))


def fit_weights(head: RecHead, valid: HeadInputs, targets: np.ndarray, *, exclude_history: bool = True) -> float:
    """Search the scalars of the head's components on validation samples and store them in the head.

    Returns the NDCG@10 reached. A head without experts has nothing to weigh and keeps its scales at 1.
    """
    chosen = evenly_spread(len(valid), SEARCH_ROWS)
    inputs, targets = valid.take(chosen), np.asarray(targets)[chosen]
    exclude = inputs.seen if exclude_history else None
    if head.experts is None:
        return float(ndcg(ranks(head.scores(inputs).numpy(), targets, exclude), 10).mean())
    weights, value = search_weights(head.components(inputs), targets, exclude)
    head.weights = head.experts.whole(weights)
    return value


class _Validation:
    def __init__(self, head: RecHead, inputs: HeadInputs, targets: np.ndarray | None, exclude_history: bool) -> None:
        rows = evenly_spread(len(inputs), VALIDATION_ROWS)
        inputs = inputs.take(rows)
        self.head, self.encoded, self.targets = head, head.encode(inputs), np.asarray(targets)[rows]
        self.exclude = inputs.seen if exclude_history else None

    def ndcg(self, world: int, device: str) -> float:
        scores = sum(self.head.network_components(self.encoded).values())
        value = float(ndcg(ranks(scores, self.targets, self.exclude), 10).mean())
        if world > 1:  # one number for all ranks, or they might stop at different epochs
            shared = torch.tensor(value, dtype=torch.float64, device=device)
            dist.broadcast(shared, 0)
            value = float(shared)
        return value


def _shown(train: HeadInputs, targets: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.unique(np.concatenate([*train.seen, targets])).astype(np.int64))


def _optimizer(head: RecHead, config: HeadConfig) -> torch.optim.Optimizer:
    scalars = [value for name, value in head.named_parameters() if name == "text_scale"]
    others = [value for name, value in head.named_parameters() if name != "text_scale"]
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": scalars, "weight_decay": 0.0, "lr": SCALE_LR * config.lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=True)


def _batches(encoded: Encoded, size: int, world: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A random partition into batches of like history lengths, each a multiple of `world` long.

    Samples are sorted by length within random blocks of 16 batches: little padding, still random.
    """
    order = rng.permutation(len(encoded))
    lengths = encoded.length.numpy()
    blocks = [order[start : start + 16 * size] for start in range(0, len(order), 16 * size)]
    order = np.concatenate([block[np.argsort(lengths[block], kind="stable")] for block in blocks])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [batch[: len(batch) // world * world] for batch in batches if len(batch) >= world]
    return [batches[number] for number in rng.permutation(len(batches))]


def _average_gradients(head: RecHead, world: int) -> None:
    parameters = [value for value in head.parameters() if value.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)
