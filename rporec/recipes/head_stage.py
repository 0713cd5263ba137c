"""Stage 1, and what comes after RL: what a RecHead is trained on, and the head itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rporec.config import Config
from rporec.data.slices import rows_of, tuning_samples
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.head_training import fit_weights, train_head
from rporec.models.rechead import RecHead
from rporec.recipes import StagedRecipe
from rporec.run import Run
from rporec.text.completion_store import read_completions

REWARDING = "head"  # the head that rewards, and ranks test too
RECOMMENDER = "recommender"  # one that rewards or judges, and ranks nothing; all others rank test alone


@dataclass(frozen=True)
class HeadData:
    """What a head is trained on, B samples, and V that validate it."""

    samples: np.ndarray  # int64 [B], numbers of those in `train`
    train: HeadInputs  # of B
    targets: np.ndarray  # int [B], items
    valid: HeadInputs  # of V
    valid_targets: np.ndarray  # int [V]

    def blank(self) -> HeadData:
        """The same without text."""
        return HeadData(self.samples, self.train.blank(), self.targets, self.valid.blank(), self.valid_targets)


def head_data(recipe: StagedRecipe, run: Run, stage: str = "stage1", slices: Sequence[str] = ("head",)) -> HeadData:
    """The training slices named and validation, with what the LLM of `stage` wrote for them."""
    parts = [_part(recipe, run.completions(stage, name)) for name in slices]
    samples = np.concatenate([samples for samples, _ in parts])
    train = HeadInputs.concatenate([inputs for _, inputs in parts])
    valid_samples, valid = _part(recipe, run.completions(stage, "valid"))
    targets = recipe.dataset.targets
    return HeadData(samples, train, targets(samples), valid, targets(valid_samples))


def history_data(recipe: StagedRecipe) -> HeadData:
    """The head slice and validation without any text."""
    dataset, train, valid = recipe.dataset, recipe.slices.head, recipe.evaluated("valid")
    train_inputs, valid_inputs = (HeadInputs.of(dataset, samples) for samples in (train, valid))
    return HeadData(train, train_inputs, dataset.targets(train), valid_inputs, dataset.targets(valid))


def _part(recipe: StagedRecipe, folder: Path) -> tuple[np.ndarray, HeadInputs]:
    samples, texts = read_completions(folder)
    return samples, HeadInputs.of(recipe.dataset, samples, texts)


class CountedExperts:
    """The experts of a recipe's heads, counted once for each set of samples: they read nothing that an LLM wrote."""

    def __init__(self, recipe: StagedRecipe) -> None:
        self.recipe = recipe
        self._counted: dict[bytes, Experts] = {}

    def on(self, samples: np.ndarray) -> Experts | None:
        """Counted on `samples`, int64 [S]; None where heads are to have none."""
        dataset, config = self.recipe.dataset, self.recipe.config
        key = samples.tobytes()
        if config.head.has_experts and key not in self._counted:
            rows, known = rows_of(dataset, samples), next(iter(self._counted.values()), None)
            counted = known.refitted(dataset, rows) if known else Experts.fit(dataset, rows)
            if config.head.reranker:
                counted = counted.stacked(dataset, samples, seed=_seed(config))
            self._counted[key] = counted
        return self._counted.get(key)


def _seed(config: Config) -> int:
    return config.head.seed if config.head.seed is not None else config.seed


@dataclass(frozen=True)
class HeadTraining:
    """How the heads of one name are trained: on what, with which experts, as which of the ranks that share the work."""

    name: str
    recipe: StagedRecipe
    data: HeadData
    experts: CountedExperts
    rank: int
    world: int
    progress: Callable[[dict[str, Any]], None]

    def choose(self, label: str, others: np.ndarray) -> tuple[RecHead, int]:
        """(a head on the data and the silent ones of `others`, its epochs); validation picks epochs and scalars.

        On rank 0 it has its scalars, and the experts that they were searched with. Its record says `label`.
        """
        data, config, head = self.data, self.recipe.config, self._fresh()
        learned = self._learned(others)
        result = train_head(head, *learned, data.valid, data.valid_targets, **self._shared)
        if self.rank == 0:
            refits = config.head.refit == "train+valid"
            head.experts = self.experts.on(tuning_samples(self.recipe.dataset, refit=refits))
            reached = fit_weights(head, data.valid, data.valid_targets, exclude_history=self._masks)
            record = {"head": label, "epoch": result.epochs, "epochs": config.head.epochs}
            self.progress({**record, "valid_ndcg@10": reached, "weights": head.weights})
        return head, result.epochs

    def refit(self, epochs: int, others: np.ndarray) -> RecHead:
        """The same on validation too, for as many epochs; without experts and scalars."""
        inputs, targets = self._learned(others)
        inputs = HeadInputs.concatenate([inputs, self.data.valid])
        head = self._fresh(epochs=max(1, epochs))
        train_head(head, inputs, np.concatenate([targets, self.data.valid_targets]), **self._shared)
        return head

    def _fresh(self, **changes: Any) -> RecHead:
        config, dataset = self.recipe.config, self.recipe.dataset
        shape = config.head.model_copy(update=changes)
        return RecHead(
            dataset.catalog, shape, window=dataset.window, seed=_seed(config), extra_texts=self.data.train.cot
        )

    def _learned(self, others: np.ndarray) -> tuple[HeadInputs, np.ndarray]:
        """Inputs and targets: the data, and with `before_rl` before them what of `others` has no completions."""
        dataset, data = self.recipe.dataset, self.data
        wanted = others if self.recipe.config.head.samples == "before_rl" else others[:0]
        silent = np.setdiff1d(wanted, data.samples)
        inputs = HeadInputs.concatenate([HeadInputs.of(dataset, silent), data.train])
        return inputs, np.concatenate([dataset.targets(silent), data.targets])

    @property
    def _masks(self) -> bool:
        return self.recipe.config.data.headline == "exclude_history"

    @property
    def _shared(self) -> dict[str, Any]:
        config = self.recipe.config

        def report(epoch: int, loss: float, ndcg: float) -> None:
            record = {"head": self.name, "epoch": epoch, "epochs": config.head.epochs}
            self.progress({**record, "loss": loss, "ndcg@10": ndcg})

        return {
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "exclude_history": self._masks,
            "seed": _seed(config),
            "rank": self.rank,
            "world": self.world,
            "progress": report,
        }


def train_and_save_head(
    name: str,
    recipe: StagedRecipe,
    data: HeadData,
    run: Run,
    experts: CountedExperts,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[dict[str, Any]], None],
) -> None:
    """Train one head on this rank's share, search its scalars, and save it as `RUN/name` (rank 0).

    With `head.samples: before_rl` its networks learn from the rest of the training samples too, which the
    LLM wrote nothing for: all but the RL slice, whose targets the head is to reward.
    With `head.refit: train+valid` test is ranked by heads that were trained for as many epochs on validation too.
    They reward nothing: with `before_rl` the RL slice is among their samples. So one stands beside the
    head that rewards, as `head_refit`, and in the place of any other that ranks test. The reranker
    learns from what the experts are counted on.
    """
    training = HeadTraining(name, recipe, data, experts, rank, world, progress)
    known, valid = recipe.dataset.split("train"), recipe.dataset.split("valid")
    wide = recipe.config.head.samples == "before_rl"
    refits = recipe.config.head.refit == "train+valid" and name != RECOMMENDER
    rewards = not refits or name == REWARDING
    if rewards or not wide:
        head, epochs = training.choose(name, recipe.slices.before_rl)
    if rewards and rank == 0:
        head.experts = experts.on(known)
        head.save(run.head(name))
    if refits:
        label = f"{name}_refit" if rewards else name
        if wide:  # as near to validation as the last fit to test
            head, epochs = training.choose(label, known)
        final = training.refit(epochs, known)
        if rank == 0:
            final.experts, final.weights = experts.on(np.concatenate([known, valid])), dict(head.weights)
            final.save(run.head(label))


def final_head(run: Run, recipe: StagedRecipe, name: str) -> RecHead:
    """The head that test is scored with: the refitted one where one stands beside it."""
    refit = run.head(f"{name}_refit")
    return RecHead.load(refit if refit.is_dir() else run.head(name), recipe.dataset.catalog)
