"""One small training through the command line: real vLLM, DeepSpeed, Ray Train and Ray actors."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from trained_run import CONFIG, Watched, rporec

from actors.debug import saved_groups
from rporec.data import Dataset
from rporec.evaluation.ranking import ndcg
from rporec.evaluation.ranking import ranks as all_ranks
from rporec.files import read_json, read_lines
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.recipes import load_recipe
from rporec.recipes.evaluation import baseline_store
from rporec.recipes.head_stage import head_data
from rporec.recipes.methods import methods
from rporec.run import Run
from rporec.text.completion_store import read_completions

pytestmark = [pytest.mark.engine, pytest.mark.cluster]


def test_a_training_leaves_what_the_contract_names(trained: Watched) -> None:
    for name in ("metrics.json", "ranks.parquet", "steps.jsonl", "validation.jsonl", "report.html", "rollouts.json"):
        assert (trained.folder / name).stat().st_size > 0
    summary = read_json(trained.folder / "metrics.json")
    methods = summary["conventions"][summary["headline"]]["methods"]
    expected = {"popularity", "recent_popularity", "itemknn", "ease", "rules", "text_knn", "text_rules"}
    expected |= {"rechead_history", "oracle", "teacher"}
    kinds = ("", "_sampled", "_vote2", "_blank", "_shuffled")
    kinds += ("_refreshed", "_refreshed_sampled", "_refreshed_blank")
    expected |= {"rechead_history_refreshed"}
    expected |= {f"rporec_{stage}{kind}" for stage in ("stage1", "stage2") for kind in kinds}
    assert expected == set(methods)
    for entry in methods.values():
        low, high = entry["ndcg@10_ci"]
        assert low <= entry["ndcg@10"] <= high
    assert "rporec_stage2_sampled-rporec_stage1_sampled" in summary["conventions"][summary["headline"]]["paired"]
    assert "rechead_history" in trained.output
    stages = read_json(trained.folder / "stages.json")
    assert stages["stage1"]["validation"].keys() == stages["stage1"]["weights"].keys() == {"head", "head_history"}
    assert stages["stage2"]["validation"].keys() == {
        str(one["version"]) for one in read_lines(trained.folder / "validation.jsonl")
    }
    steps = read_lines(trained.folder / "steps.jsonl")
    assert stages["stage2"]["reward"] == [one["reward_mean"] for one in steps]
    assert stages["stage2"]["advantage_share"] == [one["advantage_share"] for one in steps]
    assert stages["stage2"]["reward_parts"]["ndcg"] == [one["reward_parts"]["ndcg"] for one in steps]
    assert stages["stage2"]["reward_parts"].keys() >= {"ndcg", "entropy"}


def test_refreshed_heads_have_the_rl_slice_too_and_differ_in_what_their_llm_wrote(trained: Watched) -> None:
    run = Run.open(trained.folder)
    recipe = load_recipe(run, run.config())
    dataset, wanted = recipe.dataset, np.concatenate([recipe.slices.head, recipe.slices.rl])
    before, after = (head_data(recipe, run, stage, ("head", "rl")) for stage in ("stage1", "stage2"))
    for data in (before, after):
        np.testing.assert_array_equal(data.targets, dataset.targets(wanted))
        np.testing.assert_array_equal(data.valid_targets, dataset.targets(recipe.evaluated("valid")))
    learned = read_json(run.folder / "best.json")["version"] > 0  # else validation kept the LLM before RL
    assert any(map(str.__ne__, before.train.cot, after.train.cot)) == learned

    ranks = pq.read_table(run.folder / "ranks.parquet").to_pandas()
    for stage in ("stage1", "stage2"):
        assert {line["head"] for line in read_lines(run.folder / f"refreshed_{stage}.jsonl")} >= {f"refreshed/{stage}"}
        head = RecHead.load(run.head(f"refreshed/{stage}"), dataset.catalog)
        samples, texts = read_completions(run.completions(stage, "test"))
        scores = head.scores(HeadInputs.of(dataset, samples, texts)).numpy()
        rows = ranks[(ranks.method == f"rporec_{stage}_refreshed") & (ranks.convention == "all")]
        expected = dict(zip(samples.tolist(), all_ranks(scores, dataset.targets(samples), None), strict=True))
        assert dict(zip(rows["sample"], rows["rank"], strict=True)) == expected


def test_ablations_rank_by_the_text_that_their_names_say(trained: Watched) -> None:
    run = Run.open(trained.folder)
    config, dataset = run.config(), load_recipe(run, run.config()).dataset
    head = RecHead.load(run.head("head"), dataset.catalog)
    for stage in ("stage1", "stage2"):
        samples, texts = read_completions(run.completions(stage, "test"))
        written = HeadInputs.of(dataset, samples, texts)
        another = written.shuffled(dataset.sample_user[samples], np.random.default_rng(config.seed))
        drawn, thoughts = read_completions(run.completions(stage, "test_sampled"))
        expected = {
            "": ranks_of(head, dataset, samples, written),
            "_blank": ranks_of(head, dataset, samples, HeadInputs.of(dataset, samples)),
            "_shuffled": ranks_of(head, dataset, samples, another),
            "_sampled": ranks_of(head, dataset, drawn, HeadInputs.of(dataset, drawn, thoughts)),
        }
        for kind, ranks in expected.items():
            assert table_of(trained, f"rporec_{stage}{kind}") == ranks
        assert len({str(sorted(ranks.items())) for ranks in expected.values()}) == 4, (
            "the texts make no difference here"
        )


def test_the_control_of_more_warmup_is_ranked_by_its_own_head_and_by_the_one_rl_had(
    trained: Watched, tmp_path: Path
) -> None:
    """On a copy, with another head and the text after RL in the places of the control's."""
    shutil.copytree(trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("ray", "checkpoints"))
    run = Run.open(tmp_path / "run")
    recipe = load_recipe(run, run.config())
    shutil.copytree(run.head("refreshed/history"), run.head("more_warmup/head"))
    shutil.copytree(run.completions("stage2", "test"), run.completions("more_warmup", "test"))
    frozen, own = (RecHead.load(run.head(name), recipe.dataset.catalog) for name in ("head", "more_warmup/head"))
    samples, texts = read_completions(run.completions("stage2", "test"))
    inputs = HeadInputs.of(recipe.dataset, samples, texts)
    rows = {one.name: one for one in methods(recipe, run, baseline_store(run, run.config(), lambda note: None), True)}
    of = {"rporec_stage1_moresft": own, "rporec_stage1_moresft_frozen": frozen}
    assert of.keys() == {name for name in rows if "moresft" in name}
    for name, head in of.items():
        np.testing.assert_array_equal(rows[name].samples, samples)
        everything = np.arange(len(samples))
        np.testing.assert_array_equal(rows[name].scores(everything), head.scores(inputs).numpy())


def ranks_of(head: RecHead, dataset: Dataset, samples: np.ndarray, inputs: HeadInputs) -> dict[int, list[float]]:
    """By sample, of the convention `all`; several where it comes several times."""
    found: dict[int, list[float]] = {}
    places = all_ranks(head.scores(inputs).numpy(), dataset.targets(samples), None)
    for sample, rank in zip(samples.tolist(), places.tolist(), strict=True):
        found[sample] = sorted([*found.get(sample, []), rank])
    return found


def table_of(trained: Watched, method: str) -> dict[int, list[float]]:
    """The same, as `ranks.parquet` has it."""
    ranks = pq.read_table(trained.folder / "ranks.parquet").to_pandas()
    rows = ranks[(ranks.method == method) & (ranks.convention == "all")]
    return {sample: sorted(found) for sample, found in rows.groupby("sample")["rank"].apply(list).items()}


def test_tensorboard_finds_the_steps(trained: Watched) -> None:
    assert any((trained.folder / "tensorboard").glob("events.out.tfevents.*"))


def test_version_0_is_validated_so_that_the_best_may_be_no_rl(trained: Watched) -> None:
    assert [record["version"] for record in read_lines(trained.folder / "validation.jsonl")] == [0, 3, 6]


def test_the_table_can_be_computed_again_from_the_ranks(trained: Watched) -> None:
    summary = read_json(trained.folder / "metrics.json")
    ranks = pq.read_table(trained.folder / "ranks.parquet").to_pandas()
    for convention, part in summary["conventions"].items():
        for method, entry in part["methods"].items():
            rows = ranks[(ranks.method == method) & (ranks.convention == convention)]
            of_samples = rows.assign(value=ndcg(rows["rank"].to_numpy(), 10)).groupby("sample").value.mean()
            assert of_samples.mean() == pytest.approx(entry["ndcg@10"], abs=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there may be nothing to fall back from")
def test_nccl_without_cuda_falls_back_to_the_store_with_one_line(trained: Watched) -> None:
    said = [line for line in trained.output.splitlines() if "NCCL" in line or "nccl" in line]
    assert said == [
        "weight_transfer: nccl is not possible, for this cluster has no CUDA; weights go by the object store"
    ]
    assert len(read_lines(trained.folder / "steps.jsonl")) == 6


def test_learner_steps_are_asynchronous_and_within_the_staleness_bound(trained: Watched) -> None:
    steps = read_lines(trained.folder / "steps.jsonl")
    assert [record["step"] for record in steps] == list(range(6))
    assert [record["version"] for record in steps] == list(range(6))
    staleness = [record["staleness_max"] for record in steps]
    assert max(staleness) == 1, "no learner step used data of an older version: the loop is not asynchronous"
    assert min(staleness) >= 0


def test_engine_and_learner_agree_on_the_current_version(trained: Watched) -> None:
    worst = [record["engine_mismatch"]["max"] for record in read_lines(trained.folder / "steps.jsonl")]
    assert 0 < max(worst) <= 1e-4


def test_engine_and_learner_agree_on_the_probes_of_each_publication(trained: Watched) -> None:
    probes = [record["probe_mismatch"] for record in read_lines(trained.folder / "steps.jsonl")]
    seen = [probe["max"] for probe in probes if probe is not None]
    assert len(seen) >= 3
    assert 0 < max(seen) <= 1e-4


def test_the_parts_of_a_step_add_up_to_its_wall_clock(trained: Watched) -> None:
    for record in read_lines(trained.folder / "steps.jsonl"):
        seconds = dict(record["seconds"])
        total = seconds.pop("total")
        assert set(seconds) == {"wait", "forward", "backward", "publish", "reward", "other"}
        assert sum(seconds.values()) == pytest.approx(total, abs=1e-3)
        assert {"format", "outside", "ndcg", "entropy"} <= set(record["reward_parts"])


def test_every_role_has_a_process_of_its_own(trained: Watched) -> None:
    fullest = max(trained.seen, key=lambda status: len(status["actors"]))
    assert {actor["role"] for actor in fullest["actors"]} == {"controller", "rollout", "reward", "learner"}
    pids = [actor["pid"] for actor in fullest["actors"]]
    assert len(set(pids)) == len(pids)


def test_every_admitted_group_ends_consumed_or_dropped(trained: Watched) -> None:
    groups = read_json(trained.folder / "status.json")["groups"]
    assert groups["CONSUMED"] == 6 * 8
    assert all(groups[state] == 0 for state in ("PENDING", "RUNNING", "GENERATED", "SCORED", "READY"))


def test_a_finished_run_is_refused_without_resume_and_has_nothing_left_with_it(trained: Watched) -> None:
    config = str(trained.folder.parent / "small.yaml")
    refused = rporec("train", config, "--run", str(trained.folder))
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    again = rporec("train", config, "--run", str(trained.folder), "--resume")
    assert again.returncode == 0
    assert "nothing left to do" in again.stdout


def test_status_tells_of_a_finished_run(trained: Watched) -> None:
    status = json.loads(rporec("status", str(trained.folder), "--json").stdout)
    assert status["state"] == "FINISHED"
    assert status["step"] == status["version"] == 6


def _debug(trained: Watched, role: str, out: Path, *words: object) -> str:
    result = rporec("debug", role, str(trained.folder), "--out", str(out), *map(str, words))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_one_role_after_the_other_does_what_stage_2_did(trained: Watched, tmp_path: Path) -> None:
    """The groups that stage 2 drew first, from the same seeds; the same rewards for them; a learner that takes them."""
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    said = _debug(trained, "rollouts", tmp_path / "written", "--groups", 20)
    assert "20 groups, 80 completions" in said
    assert "tokens/s" in said
    said = _debug(trained, "rewards", tmp_path / "scored", "--replay", tmp_path / "written")
    assert "groups/s; reward" in said
    _debug(trained, "learner", tmp_path / "learned", "--replay", tmp_path / "scored")
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before

    written, scored = saved_groups(tmp_path / "written"), saved_groups(tmp_path / "scored")
    columns = ["group", "sample", "prompt_ids", "completion_ids", "logprobs", "text"]
    assert [group.select(columns) for group in scored] == [group.select(columns) for group in written]
    assert [record["step"] for record in read_lines(tmp_path / "learned" / "steps.jsonl")] == [0, 1]  # 4 are left over
    of_step_0 = saved_groups(trained.folder / "rollouts")[:8]  # written by version 0 too
    pairs = [(scored[group.column("group")[0].as_py()], group) for group in of_step_0]
    same = [pair for pair in pairs if pair[0].column("completion_ids") == pair[1].column("completion_ids")]
    assert len(same) >= 6  # other neighbours in the batch may round a token away
    for ours, theirs in pairs:
        assert ours.select(["group", "sample", "prompt_ids"]) == theirs.select(["group", "sample", "prompt_ids"])
    for ours, theirs in same:
        reward = [group.column("reward_without_entropy").to_numpy() for group in (ours, theirs)]
        np.testing.assert_allclose(*reward, atol=1e-6)
    assert any(group.column("reward_without_entropy").to_numpy().any() for group in scored)


def test_the_learner_alone_repeats_the_run_bit_for_bit(trained: Watched, tmp_path: Path) -> None:
    _debug(trained, "learner", tmp_path / "again", "--replay", trained.folder / "rollouts")
    records, again = (read_lines(folder / "steps.jsonl") for folder in (trained.folder, tmp_path / "again"))
    measured = ("step", "version", "loss", "kl", "reward_mean", "grad_norm", "ratio_stats", "engine_mismatch")
    assert [[one[key] for key in measured] for one in again] == [[one[key] for key in measured] for one in records]
    assert min(record["grad_norm"] for record in records) > 0, "no weights moved: there is nothing to repeat"


def test_stage_2_resumes_from_its_newest_checkpoint_with_another_number_of_learners(trained: Watched) -> None:
    """Three more steps on top of the six: the learner, the version and the step go on where they were."""
    config, run = trained.folder.parent / "small.yaml", trained.folder
    stages = read_json(run / "stages.json")
    for stage in ("stage2", "evaluate"):
        stages.pop(stage)
    (run / "stages.json").write_text(json.dumps(stages))
    before = read_lines(run / "steps.jsonl")
    began = time.time()
    more = ("steps=9", "learners=2", "--run", str(run), "--resume", "--stages", "stage2")
    result = rporec("train", str(config), *more)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    steps = read_lines(run / "steps.jsonl")
    assert steps[:6] == before
    assert [record["step"] for record in steps] == list(range(9))
    assert {record["attempt"] for record in steps[6:]} == {1}
    assert max(record["engine_mismatch"]["max"] for record in steps[6:]) <= 1e-4
    assert np.isfinite([record["loss"] for record in steps]).all()
    assert read_json(run / "status.json")["time"] > began


def test_an_engine_that_does_not_start_ends_with_one_line(trained: Watched, tmp_path: Path) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text(CONFIG + "engine: {args: {quantization: no-such-method}}\n")
    shutil.copytree(
        trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("completions", "checkpoints", "ray")
    )
    raw = read_json(trained.folder / "config.json")
    raw["engine"]["args"] = {"quantization": "no-such-method"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(raw))
    stages = read_json(trained.folder / "stages.json")
    (tmp_path / "run" / "stages.json").write_text(json.dumps({name: stages[name] for name in ("data", "warmup")}))
    result = rporec("train", str(config), "--run", str(tmp_path / "run"), "--resume", "--stages", "stage1")
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stderr.count("\n") == 1
    assert "no-such-method" in result.stderr
