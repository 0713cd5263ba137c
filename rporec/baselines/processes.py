"""Networks trained side by side, each by one thread of a process of its own: small ones gain little from a second.

Tuning has as much to do at once as there are paths of candidates, fitting as there are seeds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rporec.baselines.family import Baseline, Family, Parameters, Tuned, Validation, climb
from rporec.data import Dataset


@dataclass(frozen=True)
class Work:
    """What every process is given once."""

    dataset: Dataset
    tuning: np.ndarray  # samples that candidates are fitted on
    samples: np.ndarray  # those of the final fits
    validation: Validation


@contextmanager
def processes(count: int, work: Work) -> Iterator[Executor]:
    """Processes for `climb_path` and `fit`; on an error or an interrupt they end at once."""
    context = multiprocessing.get_context("spawn")  # a fork would take over torch's locked threads
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(work,))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():  # else they would finish what they have begun
            process.terminate()
        raise
    finally:
        # The pool's thread joins them; were they joined here too, one of both would find them gone and not know it.
        pool.shutdown(cancel_futures=True)


_work: Work


def _begin(work: Work) -> None:
    import torch

    global _work
    _work = work
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed, it cannot end its children


def climb_path(family: Family, number: int) -> tuple[Tuned, float, float]:
    """The best of one of the family's paths, wall and CPU seconds."""
    began, cpu = time.perf_counter(), time.process_time()
    path = next(itertools.islice(family.paths(_work.dataset, _work.tuning, _work.validation, 0), number, None))
    return climb(path, _work.validation), time.perf_counter() - began, time.process_time() - cpu


def fit(family: Family, parameters: Parameters, seed: int) -> Baseline:
    return family.fit(_work.dataset, _work.samples, parameters, seed)
