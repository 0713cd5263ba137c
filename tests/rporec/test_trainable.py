"""Checkpoints of the learner, by real DeepSpeed on gloo: one rank and two, each reads its own and the other's.

"Unbroken" is a run of `STEPS` steps that wrote a checkpoint before step `CUT`; a resumed one is a new
engine that read a checkpoint and made the steps from `CUT` on.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from rporec.config import ConfigError, parse_config
from rporec.models.trainable import Trainable, all_sum, learner_environment

STEPS, CUT = 6, 3
ROWS, LENGTH, WORDS = 8, 12, 64

KINDS: dict[str, dict[str, Any]] = {
    "zero 0": {"deepspeed": {"zero_stage": 0}},
    "zero 1": {"deepspeed": {"zero_stage": 1}},
    "zero 2": {"deepspeed": {"zero_stage": 2}},
    "zero 3": {"deepspeed": {"zero_stage": 3}},
    "bf16": {"deepspeed": {"bf16": True}},
    "lora": {"lora": {"rank": 2, "alpha": 4}},
    "dropout": {},
}
ROUNDED = ["zero 0", "zero 1", "zero 2", "zero 3", "lora"]  # in float32, and nothing is drawn
PARTITIONED = [kind for kind in KINDS if kind != "zero 0"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(kind, what was done, ranks) → what rank 0 saw; the last rank's random draw beside it."""
    folder = tmp_path_factory.mktemp("trainable")
    for name, dropout in (("model", 0.0), ("dropout", 0.2)):
        torch.manual_seed(1)
        shape = Qwen3Config(
            vocab_size=WORDS,
            hidden_size=16,
            head_dim=8,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
    everyone = torch.multiprocessing.get_context("spawn").Barrier(3)
    torch.multiprocessing.spawn(_rank, (folder, everyone), nprocs=3)  # type: ignore[no-untyped-call]
    seen = {}
    for path in folder.glob("*.result"):
        kind, done, ranks = path.stem.split("-")
        seen[kind, done, int(ranks)] = torch.load(path)
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_ranks_go_on_bit_for_bit(results, kind: str, ranks: int) -> None:
    unbroken, resumed = results[kind, "unbroken", ranks], results[kind, "own", ranks]
    assert resumed["losses"] == unbroken["losses"][CUT:]
    assert resumed["rates"] == unbroken["rates"][CUT:]
    assert resumed["weights"].keys() == unbroken["weights"].keys()
    for name, weight in unbroken["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ROUNDED)
def test_another_number_of_ranks_goes_on_to_rounding(results, kind: str, ranks: int) -> None:
    unbroken, resumed = results[kind, "unbroken", 3 - ranks], results[kind, "other", ranks]
    assert resumed["losses"] == pytest.approx(unbroken["losses"][CUT:], abs=2e-6)
    assert resumed["rates"] == unbroken["rates"][CUT:]
    for name, weight in unbroken["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=2e-6)
    assert abs(unbroken["losses"][CUT] - unbroken["losses"][-1]) > 1e-3, "hardly a step to compare"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", PARTITIONED)
def test_another_number_of_ranks_reads_float32_weights_and_moments_exactly(results, kind: str, ranks: int) -> None:
    written, read = results[kind, "unbroken", 3 - ranks]["state"], results[kind, "other", ranks]["state"]
    assert read.keys() == written.keys()
    assert {name.rpartition(" ")[2] for name in read} == {"weight", "exp_avg", "exp_avg_sq"}
    for name, value in written.items():
        assert value.dtype == torch.float32
        assert torch.equal(read[name], value), name


def test_other_ranks_draw_each_from_a_state_of_its_own(results) -> None:
    draws = results["dropout", "other", 2]["draws"]
    assert draws[0] != draws[1]
    assert results["zero 1", "other", 2]["draws"] == draws, "not the same in every run"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_is_saved_has_all_weights_whole(results, kind: str, ranks: int) -> None:
    seen = results[kind, "unbroken", ranks]
    assert seen["saved"].keys() == seen["weights"].keys()
    for name, weight in seen["weights"].items():
        assert torch.equal(seen["saved"][name], weight), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_another_precision_or_of_no_learner_is_refused(results, ranks: int) -> None:
    seen = results["bf16", "refused", ranks]
    assert "zero 1 of" in seen["precision"]
    assert "written in float32, and this device computes in bfloat16" in seen["precision"]
    assert "no learner state in this checkpoint; delete the folder" in seen["nothing"]


def test_reading_leaves_the_checkpoint_as_it_was(results) -> None:
    for (kind, done, ranks), seen in results.items():
        if done == "other":
            assert seen["holds"] == ["latest", "learner", "rng"], (kind, ranks)


# --- what the ranks do -----------------------------------------------------------------------
def _rank(process: int, folder: Path, everyone: threading.Barrier) -> None:
    """Process 0 is a learner of one rank, 1 and 2 are one of two."""
    world, rank = (1, 0) if process == 0 else (2, process - 1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update(learner_environment(cuda=False, threads=1) | {key: str(n) for key, n in numbers.items()})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group_of_{world}", rank=rank, world_size=world)
    for kind in KINDS:
        _train(folder, kind, "unbroken", save=folder / f"{kind} of {world}")
        _train(folder, kind, "own", load=folder / f"{kind} of {world}")
    everyone.wait(timeout=300)
    _refused(folder)
    for kind in KINDS:
        _train(folder, kind, "other", load=folder / f"{kind} of {3 - world}")
    dist.destroy_process_group()


def _policy(folder: Path, kind: str) -> Trainable:
    return Trainable(
        folder / ("dropout" if kind == "dropout" else "model"),
        parse_config(KINDS[kind]),
        lr=2e-3,
        accumulation=2,
        micro_batch=ROWS // dist.get_world_size() // 2,
        schedule=lambda step: min(1.0, (step + 1) / STEPS),
        grad_clip=0.5,
    )


def _refused(folder: Path) -> None:
    policy, said = _policy(folder, "bf16"), {}
    for what, checkpoint in (("precision", folder / f"zero 1 of {policy.world}"), ("nothing", folder / "model")):
        try:
            policy.load_checkpoint(checkpoint)
        except ConfigError as error:
            said[what] = str(error)
    if policy.rank == 0:
        torch.save(said, folder / f"bf16-refused-{policy.world}.result")


def _train(folder: Path, kind: str, done: str, *, save: Path | None = None, load: Path | None = None) -> None:
    world = dist.get_world_size()
    torch.manual_seed(0 if load is None else 5)
    policy = _policy(folder, kind)
    seen: dict[str, Any] = {"losses": [], "rates": []}
    if load is not None:
        policy.load_checkpoint(load)
        seen["holds"] = sorted(path.name for path in load.iterdir() if path.suffix != ".py")
        seen["draws"] = _of_all(torch.rand(1)) if done == "other" else None
    for step in range(0 if load is None else CUT, STEPS):
        if step == CUT and done != "own":  # DeepSpeed links the moments of what it has read itself at the next step
            seen["state"] = _state(policy)
        if step == CUT and save is not None:
            policy.save_checkpoint(save)
        seen["losses"].append(_step(policy, step))
        seen["rates"].append(policy.lr)
    seen["weights"] = {name: weight.clone() for name, weight in policy.named_weights()}
    policy.save_model(_tokenizer(), folder / f"{kind} {done} {world}")
    if policy.rank == 0:
        seen["saved"] = load_file(folder / f"{kind} {done} {world}" / "model.safetensors")
        torch.save(seen, folder / f"{kind}-{done}-{world}.result")


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0}, unk_token="word")))


def _step(policy: Trainable, number: int) -> float:
    """One step on rows that follow from its number; the loss of all ranks."""
    rows = torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    total = torch.zeros(1)
    for part in rows[policy.rank :: policy.world].chunk(policy.accumulation):
        logits = policy.engine(input_ids=part).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="sum")
        loss = loss / (ROWS * (LENGTH - 1))
        policy.backward(loss)
        total += loss.detach()
    return float(all_sum(total))


def _state(policy: Trainable) -> dict[str, torch.Tensor]:
    """Whole float32 weights and moments, put together from all ranks; nothing under ZeRO 0, which has no parts."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if policy.engine.zero_optimization_stage() == 0:
        return {}
    state = {}
    for name, parameter in policy.engine.module.named_parameters():
        if parameter.requires_grad:
            state[f"{name} weight"] = safe_get_full_fp32_param(parameter).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    return state


def _of_all(value: torch.Tensor) -> list[float]:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return [float(one) for one in values]
