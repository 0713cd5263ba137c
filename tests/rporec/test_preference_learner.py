"""The learner of offline preferences, by real DeepSpeed, against whole sequences one by one and torch's own optimiser."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rporec.config import Config, SyntheticConfig, override, parse_config
from rporec.data import build
from rporec.data.synthetic import write_synthetic
from rporec.files import write_json
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.models.trainable import learner_environment
from rporec.recipes.head_stage import CountedExperts, history_data, train_and_save_head
from rporec.recipes.preference import Preference
from rporec.rl.packing import by_length
from rporec.rl.preference import boundary, dual_margin_beta
from rporec.run import Run

CONFIG = {
    "recipe": "preference",
    "tiny": {
        "hidden": 64,
        "heads": 2,
        "kv_heads": 1,
        "layers": 1,
        "intermediate": 128,
        "vocabulary": 420,
        "context": 96,
    },
    "head": {"epochs": 2, "dim": 32},
    "groups_per_step": 6,
    "group_size": 5,
    "steps": 4,
    "rl": {"lr": 1e-3, "schedule": "cosine", "grad_clip": 0.3},
}
# Steps cut into micro-batches, but where negatives are shared within one.
LOSSES = {
    "s_dpo": ["rl.micro_batch_groups=4"],
    "dynamicpo": ["rl.micro_batch_groups=2"],
    "napo": ["preference.beta=0.5", "preference.similarity=0.3"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a random LLM, and the recommender that NAPO asks."""
    folder = tmp_path_factory.mktemp("preference")
    world = SyntheticConfig(users=160, series=20, volumes=4, genres=4, studios=6, length=8)
    run = Run.create(folder / "run", parse_config(CONFIG), resume=False)
    write_synthetic(folder / "raw", world, 0)
    build(folder / "raw/interactions.parquet", folder / "raw/items.parquet", run.data, split="time", window=6)
    recipe = Preference(run, override(run.config(), ["preference.loss=napo"]))
    recipe.make_backbone()
    train_and_save_head(
        "recommender", recipe, history_data(recipe), run, CountedExperts(recipe), progress=lambda record: None
    )
    return run


@pytest.fixture(scope="module")
def records(run: Run) -> dict[str, list[dict[str, Any]]]:
    """What the learner says of its steps, by loss; all in one process of its own, for DeepSpeed starts slowly."""
    out = run.folder / "records.json"
    torch.multiprocessing.spawn(_train, (run, out), nprocs=1)  # type: ignore[no-untyped-call]
    return json.loads(out.read_text())


def configured(run: Run, loss: str) -> Config:
    return override(run.config(), [f"preference.loss={loss}", *LOSSES[loss]])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_a_hand_written_update(run: Run, records: dict[str, list[dict[str, Any]]], loss: str) -> None:
    compare(run, configured(run, loss), records[loss])


def test_sampled_negatives_are_repeatable_and_nothing_that_the_user_had(run: Run) -> None:
    recipe = Preference(run, run.config())
    groups, again = recipe.groups(range(40)), recipe.groups(range(40))
    for group, same in zip(groups, again, strict=True):
        [target] = recipe.dataset.targets([group.sample]).tolist()
        assert group.items.tolist() == same.items.tolist()
        assert group.items[0] == target
        assert len(set(group.items.tolist())) == 5
        assert not {*recipe.dataset.seen(group.sample).tolist(), target} & set(group.items[1:].tolist())
        assert [row.tolist() for row in group.tokens.completions] == [recipe.tokens[item] for item in group.items]
    assert len({tuple(group.items[1:].tolist()) for group in groups}) == 40


def _train(rank: int, run: Run, out: Path) -> None:
    os.environ.update(learner_environment(False, 1))
    from rporec.rl.preference_learner import PreferenceLearner

    records = {}
    for loss in LOSSES:
        config = configured(run, loss)
        recipe, size = Preference(run, config), config.groups_per_step
        learner = PreferenceLearner(run.warm_model, config, auxiliary=recipe.auxiliary())
        steps = [recipe.groups(range(step * size, step * size + size)) for step in range(config.steps)]
        records[loss] = [learner.step(groups) for groups in steps]
    write_json(out, records)


def compare(run: Run, config: Config, records: list[dict[str, Any]]) -> None:
    """The losses of all steps, from whole sequences one by one and torch's own optimiser."""
    recipe = Preference(run, config)
    policy = AutoModelForCausalLM.from_pretrained(str(run.warm_model), dtype=torch.float32).eval()
    frozen = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.rl.lr, betas=(0.9, 0.95), weight_decay=0.0)
    assert len(records) == config.steps
    for step, record in enumerate(records):
        groups = recipe.groups(range(step * config.groups_per_step, (step + 1) * config.groups_per_step))
        live, ratios = [], []
        for group in groups:
            rows = [(group.tokens.prompt_ids, completion) for completion in group.tokens.completions]
            live.append(torch.stack([total(policy, *row) for row in rows]))
            ratios.append(live[-1] - torch.stack([total(frozen, *row) for row in rows]))
        shared = neighbours(run, recipe, groups) if config.preference.loss == "napo" else None
        losses = [plain_loss(config, number, live, ratios, shared) for number in range(len(groups))]
        loss = torch.stack(losses).mean()
        assert record["loss"] == pytest.approx(loss.item(), abs=2e-5), f"step {step}"
        right = [bool((ratio[0] > ratio[1:]).all()) for ratio in ratios]
        assert record["accuracy"] == pytest.approx(np.mean(right)) or step == 0  # equal ratios but for rounding
        optimizer.param_groups[0]["lr"] = config.rl.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.rl.grad_clip)
        optimizer.step()
    assert abs(record["margin"]) > 0.01, "the policy hardly moved"


def plain_loss(
    config: Config, number: int, live: list[torch.Tensor], ratios: list[torch.Tensor], shared: Any
) -> torch.Tensor:
    beta, (chosen, *rejected) = config.preference.beta, ratios[number]
    if config.preference.loss == "napo":
        terms = [torch.exp(beta * (ratios[p][d] - chosen) + margin) for p, d, margin in shared[number]]
        return torch.log1p(torch.stack(terms).sum())
    betas = torch.full((len(rejected),), beta)
    near = torch.ones(len(rejected), dtype=torch.bool)
    if config.preference.loss == "dynamicpo":
        owner, logp = torch.zeros(len(rejected), dtype=torch.int64), live[number].detach()
        near = boundary(logp[:1], logp[1:], owner)
        betas = dual_margin_beta(logp[:1], logp[1:], owner, near, beta)
    return torch.log1p((torch.exp(betas * (torch.stack(rejected) - chosen)) * near).sum())


def neighbours(run: Run, recipe: Preference, groups: list[Any]) -> list[list[tuple[int, int, float]]]:
    """Per prompt (prompt, completion, margin) of every negative that counts for it."""
    head = RecHead.load(run.head("recommender"), recipe.dataset.catalog).freeze()
    encoded = head.encode(HeadInputs.of(recipe.dataset, [group.sample for group in groups]))
    scores = head.network_components(encoded)["history"]
    with torch.no_grad():
        items = head.item_vectors()
        users = head._read(encoded, items)["history"].numpy()
    users = users / np.linalg.norm(users, axis=1, keepdims=True)
    [order] = by_length([group.tokens for group in groups], len(groups))  # as they stand in the micro-batch
    result = []
    for mine, group in enumerate(groups):
        used: dict[int, tuple[int, int]] = {int(item): (mine, d) for d, item in enumerate(group.items) if d}
        for other in order.tolist():
            theirs = groups[other]
            if other != mine and users[mine] @ users[other] >= recipe.config.preference.similarity:
                for d, item in enumerate(theirs.items.tolist()):
                    if d and item not in group.taken:
                        used.setdefault(item, (other, d))
        target = scores[mine, group.items[0]]
        margin = {item: recipe.config.preference.margin / (1 + math.exp(scores[mine, item] - target)) for item in used}
        result.append([(other, d, margin[item]) for item, (other, d) in used.items()])
    assert sum(map(len, result)) > sum(len(group.items) - 1 for group in groups), "nobody shares"
    return result


def total(model: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    everything = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return everything.gather(1, ids[0, len(prompt) :, None]).sum()
