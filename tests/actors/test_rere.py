"""One small training of ReRe through the command line: real vLLM beams, the same learners, against plain references."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from trained_run import rporec
from transformers import AutoModelForCausalLM

from rporec.data import Dataset
from rporec.engine.reference import ReferenceEngine
from rporec.engine.types import ItemSpec, Version
from rporec.files import read_json, read_lines
from rporec.recipes.rere import ReRe
from rporec.rl.rollout_schema import read_groups
from rporec.run import Run
from rporec.text.completion_store import read_items

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

CONFIG = """
name: small-rere
recipe: rere
data: {window: 6, synthetic: {users: 160, series: 20, volumes: 4, genres: 4, studios: 6, length: 8}}
tiny: {hidden: 64, heads: 2, kv_heads: 1, layers: 1, intermediate: 128, vocabulary: 420, context: 96}
warmup: {steps: 120, batch_size: 16, lr: 6e-3}
rere: {eval_beams: 12}
max_staleness: 0
groups_per_step: 6
group_size: 8
steps: 4
max_eval_samples: 40
save_rollouts: true
rl: {lr: 1e-3, top_entropy: 1.0, kl: 0.05, schedule: cosine, grad_clip: 0.3, validate_every: 2, validate_samples: 24}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    work = tmp_path_factory.mktemp("rere")
    (work / "config.yaml").write_text(CONFIG)
    train = ("train", str(work / "config.yaml"), "--run", str(work / "run"))
    # More beams may be asked for once all is over.
    for command in (train, ("evaluate", str(work / "run"), "rere.more_beams=[16]")):
        result = rporec(*command)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Run.open(work / "run")


def test_its_methods_stand_in_the_table_with_the_ranks_of_their_beams(run: Run) -> None:
    summary, dataset = read_json(run.folder / "metrics.json"), Dataset.load(run.data)
    methods = list(summary["conventions"]["exclude_history"]["methods"])
    assert {"popularity", "recent_popularity", "oracle"} < set(methods)
    assert methods[-5:-1] == ["rere_sft", "rere_sft_beams16", "rere", "rere_beams16"]
    assert {"rere-rere_sft", "rere_beams16-rere_sft_beams16"} <= summary["conventions"]["all"]["paired"].keys()
    table = pq.read_table(run.folder / "ranks.parquet").to_pandas()
    searches = itertools.product(
        (("rere_sft", "stage1"), ("rere", "stage2")), ("exclude_history", "all"), ((12, ""), (16, "_beams16"))
    )
    for (method, stage), convention, (count, suffix) in searches:
        samples, beams = read_items(run.completions(stage, f"test_{convention}{suffix}"))
        assert len(samples) == 40
        rows = table[(table.method == f"{method}{suffix}") & (table.convention == convention)]
        written = dict(zip(rows["sample"], rows["rank"], strict=True))
        for sample, found in zip(samples.tolist(), beams, strict=True):
            [target] = dataset.targets([sample]).tolist()
            gone = set(dataset.seen(sample).tolist()) - {target} if convention == "exclude_history" else set()
            assert len(found) == len(set(found.tolist()) - gone) == count
            places = np.flatnonzero(found == target)
            assert written[sample] == places[0] + 1 if len(places) else written[sample] > count


def test_training_is_plain_sequential_grpo_on_the_beams_of_each_version(run: Run) -> None:
    """Same beams, rewards and losses, step by step, from exact scores and a hand-written update."""
    config, recipe = run.config(), ReRe(run, run.config())
    policy = AutoModelForCausalLM.from_pretrained(str(run.warm_model), dtype=torch.float32).eval()
    frozen = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.rl.lr, betas=(0.9, 0.95), weight_decay=0.0)
    engine = ReferenceEngine(run.warm_model, config.engine, context=recipe.context, seed=0)
    hits = 0
    for step, record in enumerate(read_lines(run.steps)):
        engine.update_weights(Version(0, step), policy.named_parameters()).result()
        losses, distances, rewards = [], [], []
        for number, group in enumerate(read_groups(run.rollouts(step)), step * config.groups_per_step):
            sample, _ = recipe.draw(number)
            [prompt], [target] = recipe.prompts([sample]), recipe.dataset.targets([sample]).tolist()
            beams = engine.submit(prompt.tolist(), ItemSpec(recipe.rollout_spec(0).trie, 8)).result()
            items = [one.item for one in beams]
            assert (group.column("group")[0].as_py(), group.column("sample")[0].as_py()) == (number, sample)
            assert group.column("item").to_pylist() == items
            assert group.column("completion_ids").to_pylist() == [recipe.tokens[item] for item in items]
            reward = np.zeros(8)
            if target in items:
                hits += 1
                cost = [1 / math.log2(place + 2) for place in range(8)]
                reward = np.array([1.0 if items[i] == target else -cost[i] / sum(cost) for i in range(8)])
            assert group.column("reward_without_entropy").to_pylist() == pytest.approx(reward.tolist(), abs=1e-6)
            rewards += reward.tolist()
            advantages = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6) if reward.any() else reward
            for one, advantage in zip(beams, advantages.tolist(), strict=True):
                ours, theirs = (logprobs(model, prompt, one.token_ids) for model in (policy, frozen))
                losses.append(-((ours - ours.detach()).exp() * advantage).mean())
                distances.append(((theirs - ours).exp() - (theirs - ours) - 1).mean())
        kl = torch.stack(distances).mean()
        loss = torch.stack(losses).mean() + config.rl.kl * kl
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5), f"step {step}"
        assert record["kl"] == pytest.approx(kl.item(), abs=1e-5), f"step {step}"
        assert record["reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-6)
        assert record["engine_mismatch"]["max"] < 1e-4
        assert record["staleness_max"] == 0
        optimizer.param_groups[0]["lr"] = config.rl.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.rl.grad_clip)
        optimizer.step()
    engine.close()
    assert hits > 4, "hardly a gradient to compare"
    assert record["kl"] > 1e-4, "the policy hardly moved"


def logprobs(model: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    everything = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return everything.gather(1, ids[0, len(prompt) :, None])[:, 0]


def test_versions_are_validated_by_their_beams(run: Run) -> None:
    records = read_lines(run.validation)
    assert [record["version"] for record in records] == [0, 2, 4]
    recipe = ReRe(run, run.config())
    samples, prompts, specs = recipe.validation
    engine = ReferenceEngine(run.warm_model, run.config().engine, context=recipe.context, seed=0)
    ranks = []
    for sample, prompt, spec in zip(samples.tolist(), prompts, specs, strict=True):
        items = [one.item for one in engine.submit(prompt.tolist(), spec).result()]
        [target] = recipe.dataset.targets([sample]).tolist()
        ranks.append(items.index(target) + 1 if target in items[:10] else math.inf)
    engine.close()
    assert records[0]["hr@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]))
    assert records[0]["ndcg@10"] == pytest.approx(np.mean([1 / math.log2(rank + 1) for rank in ranks]))


@pytest.mark.parametrize("command", ["serve", "promote", "export"])
def test_commands_that_need_a_head_say_so_in_one_line(run: Run, command: str, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "out")] if command == "export" else []
    refused = rporec(command, str(run.folder), *words)
    assert refused.returncode == 2
    assert "answers by a RecHead, and recipe rere has none" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
