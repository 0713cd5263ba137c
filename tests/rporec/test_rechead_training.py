"""Training uses text where it helps, is repeatable, and several ranks make one head."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp

from rporec.config import HeadConfig
from rporec.data import Catalog
from rporec.evaluation.ranking import ndcg, ranks
from rporec.models.head_inputs import HeadInputs
from rporec.models.head_training import fit_weights, train_head
from rporec.models.rechead import RecHead

ITEMS, COLD = 60, 12  # the last COLD items occur in no training sample
KINDS = [("paper", "text"), ("residual", "sequence")]


def catalog() -> Catalog:
    titles = [f"title{n} series{n // 4} genre{n % 5}" for n in range(ITEMS)]
    return Catalog(pa.table({"item_id": [f"i{n}" for n in range(ITEMS)], "title": titles}))


def world(samples: int, items: int, seed: int, truth: float = 0.6) -> tuple[HeadInputs, np.ndarray]:
    """Random histories; the answer names the target with chance `truth`, else any item."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, items, samples)
    said = np.where(rng.random(samples) < truth, targets, rng.integers(0, items, samples))
    seen = [rng.integers(0, ITEMS - COLD, rng.integers(1, 6)).astype(np.int32) for _ in range(samples)]
    answers = [f"title{n} series{n // 4}" for n in said]
    return HeadInputs(
        seen, np.zeros(samples, np.int64), ["last"] * samples, answers, np.ones(samples, np.float32)
    ), targets


def config(fusion: str, history: str, **more: object) -> HeadConfig:
    settings = {"dim": 32, "layers": 1, "heads": 2, "lr": 2e-3, "epochs": 3, "batch_size": 64} | more
    return HeadConfig(fusion=fusion, history=history, **settings)


def quality(head: RecHead, inputs: HeadInputs, targets: np.ndarray) -> float:
    return float(ndcg(ranks(head.scores(inputs).numpy(), targets), 10).mean())


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_text_is_used_for_warm_and_cold_items(fusion: str, history: str) -> None:
    train, targets = world(1500, ITEMS - COLD, 0)
    valid, valid_targets = world(300, ITEMS, 1)
    head = RecHead(catalog(), config(fusion, history, epochs=5), window=5, seed=0)
    report = train_head(head, train, targets, valid, valid_targets, exclude_history=False, seed=0)
    cold = np.flatnonzero(valid_targets >= ITEMS - COLD)
    warm = np.flatnonzero(valid_targets < ITEMS - COLD)
    assert quality(head, valid.take(warm), valid_targets[warm]) > 0.5
    assert quality(head, valid.take(cold), valid_targets[cold]) > 0.25
    assert quality(head, valid.blank(), valid_targets) < 0.2
    assert report.ndcg == pytest.approx(quality(head, valid, valid_targets)) == max(report.history)


def test_a_head_trained_without_text_ignores_it() -> None:
    train, targets = world(200, ITEMS, 0)
    head = RecHead(catalog(), config("residual", "sequence", epochs=1), window=5)
    train_head(head, train.blank(), targets)
    assert torch.equal(head.scores(train), head.scores(train.blank()))


def test_same_seed_same_head_and_the_global_generator_is_left_alone() -> None:
    train, targets = world(200, ITEMS, 0)
    results = []
    for noise in range(2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        head = RecHead(catalog(), config("residual", "sequence"), window=5, seed=4)
        train_head(head, train, targets, train, targets, seed=4)
        assert torch.equal(before, torch.get_rng_state())
        results.append(head.scores(train))
    assert torch.equal(*results)
    other = RecHead(catalog(), config("residual", "sequence"), window=5, seed=5)
    train_head(other, train, targets, train, targets, seed=5)
    assert not torch.equal(other.scores(train), results[0])


def test_stops_early_and_keeps_the_best_state() -> None:
    train, targets = world(300, ITEMS, 0, truth=0)
    valid, valid_targets = world(200, ITEMS, 1, truth=0)  # nothing to learn
    head = RecHead(catalog(), config("residual", "sequence", epochs=30, patience=2), window=5)
    seen: list[int] = []
    report = train_head(
        head, train, targets, valid, valid_targets, progress=lambda epoch, loss, value: seen.append(epoch)
    )
    assert len(report.history) == report.epochs + 2 < 30
    assert seen == list(range(1, len(report.history) + 1))


def test_without_validation_all_epochs_run() -> None:
    train, targets = world(100, ITEMS, 0)
    report = train_head(RecHead(catalog(), config("paper", "text"), window=5), train, targets)
    assert report.epochs == 3
    assert np.isnan(report.ndcg)


def test_items_that_training_never_showed_keep_no_id_row() -> None:
    train, targets = world(200, ITEMS - COLD, 0)
    head = RecHead(catalog(), config("residual", "sequence"), window=5)
    train_head(head, train, targets)
    assert head.known[: ITEMS - COLD].all()
    assert not head.known[ITEMS - COLD :].any()
    with torch.no_grad():
        vectors = head.item_vectors()
        assert torch.equal(vectors.full[-COLD:], head.text_projection(vectors.text)[-COLD:])


def test_scales_stay_at_one_without_experts() -> None:
    train, targets = world(100, ITEMS, 0)
    head = RecHead(catalog(), config("paper", "text", epochs=1), window=5)
    train_head(head, train, targets)
    reached = fit_weights(head, train, targets, exclude_history=False)
    assert head.weights == {}
    assert reached == pytest.approx(quality(head, train, targets))


def _rank(rank: int, world_size: int, port_file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world_size)
    train, targets = world(256, ITEMS, 0)
    head = RecHead(catalog(), config("paper", "text", epochs=2, dropout=0.0), window=5, seed=0)
    train_head(head, train, targets, train, targets, seed=0, rank=rank, world=world_size)
    torch.save({name: value.clone() for name, value in head.state_dict().items()}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_the_head_that_one_would(tmp_path) -> None:
    mp.start_processes(
        _rank, (2, str(tmp_path / "meet"), str(tmp_path / "state")), nprocs=2, start_method="spawn"
    )  # a forked child would inherit an engine's process group
    first, second = (torch.load(tmp_path / f"state.{rank}") for rank in range(2))
    train, targets = world(256, ITEMS, 0)
    head = RecHead(catalog(), config("paper", "text", epochs=2, dropout=0.0), window=5, seed=0)
    train_head(head, train, targets, train, targets, seed=0)
    for name, value in head.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].float(), value.float(), atol=1e-3), name
