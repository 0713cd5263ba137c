"""Fitted baselines in the run directory: tuned and fitted once, read back ever after.

RUN/baselines/NAME/tuned.json holds parameters, validation NDCG@10, candidates tried and seconds;
beside it one `seed_N.safetensors` for each seed. An interruption loses the part it fell into.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rporec.baselines.family import Baseline, Family, Parameters, Tuned, Validation, best_of, tune
from rporec.baselines.item_to_item import EASE_ITEMS
from rporec.baselines.processes import Work, climb_path, fit, processes
from rporec.config import BASELINES
from rporec.data.slices import tuning_samples
from rporec.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from rporec.data import Dataset

Progress = Callable[[str], None]


def families() -> dict[str, Family]:
    """By name, in the order of `BASELINES`."""
    from rporec.baselines.gru4rec import GRU4Rec
    from rporec.baselines.item_to_item import EASE, ItemKNN, Rules, TextKNN
    from rporec.baselines.popularity import AllTime, Recent
    from rporec.baselines.sasrec import SASRec
    from rporec.baselines.text_rules import Blend, RerankedBlend

    every: tuple[Family, ...] = (
        *(AllTime(), Recent()),
        *(ItemKNN(), EASE(), Rules(), TextKNN(), Blend()),
        *(RerankedBlend(), GRU4Rec(), SASRec()),
    )
    known = {family.name: family for family in every}
    return {name: known[name] for name in BASELINES}


class BaselineStore:
    """The baselines of one run."""

    def __init__(
        self, folder: Path, dataset: Dataset, *, exclude_history: bool, refit: bool, progress: Progress = lambda _: None
    ) -> None:
        """refit: whether the chosen candidate is fitted on validation too. exclude_history: see `Validation`."""
        self.folder, self.dataset, self.progress = folder, dataset, progress
        self.validation = Validation.of(dataset, exclude_history=exclude_history)
        train, valid = dataset.split("train"), dataset.split("valid")
        self.tuning = tuning_samples(dataset, refit=refit)
        self.samples = np.sort(np.concatenate([train, valid])) if refit else train

    def fitted(self, family: Family, seeds: Sequence[int]) -> list[Baseline]:
        """One for each seed, a single one where the seed does not matter, none where the catalogue is too large."""
        if family.name == "ease" and len(self.dataset.catalog) > EASE_ITEMS:
            reason = f"inverts a matrix over all items, and there are more than {EASE_ITEMS:,}"
            write_json(self._tuned_file(family), {"left_out": reason})
            self.progress(f"{family.name} is left out: it {reason}")
            return []
        parameters = (
            self.record(family.name)["parameters"] if self._tuned_file(family).is_file() else self._tuned(family)
        )
        return [self._one(family, parameters, seed) for seed in (seeds if family.random else seeds[:1])]

    def prepare(self, wanted: Sequence[Family], seeds: Sequence[int], count: int) -> None:
        """Tune and fit the networks among `wanted` in so many processes, for `fitted` to read back.

        With fewer than two it does nothing; `fitted` then trains one after another.
        """
        networks = [family for family in wanted if family.random]
        if count < 2 or all(self._seed_file(family, seed).is_file() for family in networks for seed in seeds):
            return
        work = Work(self.dataset, self.tuning, self.samples, self.validation)
        self.progress("networks: tuning")
        with processes(count, work) as pool:
            climbing = {
                family.name: [pool.submit(climb_path, family, number) for number in range(self._paths(family))]
                for family in networks
                if not self._tuned_file(family).is_file()
            }
            fitting = []
            for family in networks:
                if family.name in climbing:
                    found, seconds, cpu = zip(*(one.result() for one in climbing[family.name]), strict=True)
                    self._record(family, best_of(found), sum(seconds), sum(cpu))
                parameters = self.record(family.name)["parameters"]
                missing = [seed for seed in seeds if not self._seed_file(family, seed).is_file()]
                fitting += [(family, seed, pool.submit(fit, family, parameters, seed)) for seed in missing]
            for family, seed, fitted in fitting:
                self._save(fitted.result(), family, seed)
                self.progress(f"{family.name}: fitted, seed {seed}")

    def _paths(self, family: Family) -> int:
        return sum(1 for _ in family.paths(self.dataset, self.tuning, self.validation, 0))

    def record(self, name: str) -> dict[str, Any]:
        """What tuning found and what it cost, or why the baseline is left out."""
        return read_json(self.folder / name / "tuned.json", {})

    def _tuned_file(self, family: Family) -> Path:
        return self.folder / family.name / "tuned.json"

    def _seed_file(self, family: Family, seed: int) -> Path:
        return self.folder / family.name / f"seed_{seed}.safetensors"

    def _tuned(self, family: Family) -> Parameters:
        began, cpu, tried = time.perf_counter(), time.process_time(), 0

        def report(parameters: Parameters, value: float) -> None:
            nonlocal tried
            tried += 1
            self.progress(f"{family.name}: candidate {tried}, validation NDCG@10 {value:.4f}")

        self.progress(f"{family.name}: tuning")
        found = tune(family, self.dataset, self.tuning, self.validation, progress=report)
        self._record(family, found, time.perf_counter() - began, time.process_time() - cpu)
        return found.parameters

    def _record(self, family: Family, found: Tuned, seconds: float, cpu_seconds: float) -> None:
        record = {
            "parameters": found.parameters,
            "valid_ndcg@10": found.ndcg,
            "tried": found.tried,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
        }
        write_json(self._tuned_file(family), record)
        self.progress(f"{family.name}: {found.tried} candidates, validation NDCG@10 {found.ndcg:.4f}")

    def _one(self, family: Family, parameters: Parameters, seed: int) -> Baseline:
        from safetensors.numpy import load_file

        path = self._seed_file(family, seed)
        if path.is_file():
            return family.restore(self.dataset, load_file(path), parameters)
        self.progress(f"{family.name}: fitting" + (f", seed {seed}" if family.random else ""))
        baseline = family.fit(self.dataset, self.samples, parameters, seed)
        self._save(baseline, family, seed)
        return baseline

    def _save(self, baseline: Baseline, family: Family, seed: int) -> None:
        from safetensors.numpy import save_file

        with replacing(self._seed_file(family, seed)) as temporary:
            save_file({name: np.ascontiguousarray(value) for name, value in baseline.arrays().items()}, temporary)
