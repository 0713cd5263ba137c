"""A real rollout worker and weight store under a real Ray."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer

from actors.cluster import Cluster
from actors.generation import RolloutPool
from actors.rollout import RolloutWorker, StaleWeights, rollout_options
from actors.weight_store import WeightStore
from rporec.config import EngineConfig, parse_config
from rporec.engine.types import EngineError, GenerationAborted, SamplingSpec, Version
from rporec.engine.weights import WeightsError, flatten
from rporec.models.backbone import load_model
from rporec.rl.rollout_schema import ROLLOUT_SCHEMA, GroupMeta, Lease, ragged, token_versions
from rporec.text.completion_store import SHARD, Part, read_completions

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

CONFIG = EngineConfig(kv_cache_mb=64, max_num_seqs=32)
PROMPT = np.arange(20, 70, dtype=np.int32)
SPEC = SamplingSpec(max_tokens=16, n=3, stop=())


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, resources={"rollout": 2}, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def worker(cluster, tiny_model):
    return RolloutWorker.options(**rollout_options(CONFIG)).remote(
        name="rollout-0", model=str(tiny_model), engine=CONFIG, context=256, seed=0, cpu_core=0
    )


@pytest.fixture
def store(cluster):
    store = WeightStore.remote()
    yield store
    ray.kill(store)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def scaled(model, factor):
    return flatten(((name, tensor * factor) for name, tensor in model.named_parameters()), drop_tied_head=True)


def test_bulk_generation_goes_on_when_its_worker_is_lost(cluster, worker, tiny_model, tmp_path):
    part = Part(tmp_path / "part", np.arange(3 * SHARD), replace(SPEC, n=1, max_tokens=8, seed=5))

    def prompts(samples):
        return [PROMPT[: 20 + sample % 20].tolist() for sample in samples]

    local = Cluster(address="", namespace="", local=True, cuda=False)
    with RolloutPool(tiny_model, parse_config({"engine": CONFIG.model_dump()}), local, 256, 1) as pool:

        def lose(done, total, tokens):
            if done == SHARD:
                ray.kill(pool.workers[0])

        pool.write(part, prompts, lose)
    samples, texts = read_completions(part.folder)
    assert samples.tolist() == list(range(3 * SHARD))
    again = [
        completions[0]["text"]
        for number in range(3)
        for completions in ray.get(worker.generate_many.remote(prompts(part.shard(number)), part.specs(number)))
    ]
    assert texts == again


def test_a_model_that_a_node_does_not_see_is_named(cluster, worker):
    local = Cluster(address="", namespace="", local=True, cuda=False)
    part = Part(Path("/nowhere/part"), np.arange(1), SPEC)
    with (
        RolloutPool("/nowhere/model", parse_config({}), local, 256, 1) as pool,
        pytest.raises(EngineError, match="/nowhere/model is not on this node; put --run on storage"),
    ):
        pool.write(part, lambda samples: [PROMPT.tolist()], lambda *_: None)


def test_a_lease_becomes_a_group_in_the_rollout_schema(worker, tiny_model):
    payload, meta = worker.generate.remote(Lease(7, 42, PROMPT, seed=3), SPEC)
    batch, meta = ray.get([payload, meta])
    assert batch.schema == ROLLOUT_SCHEMA
    assert batch.column("group").to_pylist() == [7, 7, 7]
    assert batch.column("sample").to_pylist() == [42, 42, 42]
    tokens, offsets = ragged(batch, "completion_ids")
    assert ragged(batch, "prompt_ids")[0][:50].tolist() == PROMPT.tolist()
    assert offsets[-1] == meta.tokens
    assert isinstance(meta, GroupMeta)
    assert meta.versions == (Version(0, 0),)
    assert not np.any(token_versions(batch))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert batch.column("text")[0].as_py() == tokenizer.decode(tokens[: offsets[1]])


def test_a_seed_in_the_lease_reproduces_the_group(worker):
    def tokens(seed):
        return (
            ray.get(worker.generate.remote(Lease(0, 0, PROMPT, seed=seed), SPEC)[0])
            .column("completion_ids")
            .to_pylist()
        )

    assert tokens(3) == tokens(3) != tokens(4)


def test_bulk_generation_gives_each_prompt_what_its_spec_asks_for(worker):
    prompts = [PROMPT.tolist(), PROMPT.tolist(), PROMPT[:9].tolist()]
    specs = [SamplingSpec(max_tokens=8, n=n, seed=seed, stop=()) for n, seed in ((2, 5), (2, 6), (3, 7))]
    rows = ray.get(worker.generate_many.remote(prompts, specs))
    assert [len(row) for row in rows] == [2, 2, 3]
    assert all(1 <= len(one["token_ids"]) <= 8 for row in rows for one in row)  # eos may come early
    assert rows[0][0]["text"] != rows[1][0]["text"]
    [again] = ray.get(worker.generate_many.remote(prompts[:1], specs[1:2]))
    assert [one["text"] for one in again] == [one["text"] for one in rows[1]]


def test_weights_reach_the_engine_through_the_store_and_those_of_undone_attempts_are_refused(worker, store, model):
    refs = {}
    for version, factor in ((Version(0, 2), 1.5), (Version(1, 1), 1.0), (Version(1, 2), 0.7)):
        ray.get(store.put.remote(version, scaled(model, factor)))
        refs[version] = ray.get(store.get.remote(version))
    # Back by one version too: a validation is of the version that is due, whatever came meanwhile.
    for version in (Version(0, 2), Version(1, 2), Version(1, 1)):
        assert ray.get(worker.update_weights.remote(version, refs[version])) > 0
        assert ray.get(worker.status.remote())["version"] == version
    with torch.no_grad():
        expected = model(torch.tensor(PROMPT[None].astype(np.int64))).logits[0, :-1].log_softmax(-1)
    [scores] = ray.get(worker.score_prompts.remote([PROMPT.tolist()]))
    assert scores == pytest.approx(
        expected.gather(1, torch.tensor(PROMPT[1:, None].astype(np.int64)))[:, 0].numpy(), abs=1e-4
    )
    with pytest.raises(StaleWeights, match=r"rollout-0 has weights 1\.1; 0\.9 was undone"):
        ray.get(worker.update_weights.remote(Version(0, 9), scaled(model, 1.0)))
    ray.get(worker.update_weights.remote(Version(1, 1), scaled(model, 1.0)))


def test_damaged_weights_never_reach_the_engine(worker, model):
    flat = scaled(model, 2.0)
    flat.buffer[1000] ^= 1
    before = ray.get(worker.status.remote())["version"]
    with pytest.raises(WeightsError, match="damaged"):
        ray.get(worker.update_weights.remote(Version(5, 0), flat))
    assert ray.get(worker.status.remote())["version"] == before


def test_aborted_groups_raise_and_the_worker_goes_on(worker):
    long = replace(SPEC, max_tokens=200)
    refs = [worker.generate.remote(Lease(group, 0, PROMPT, seed=group), long)[1] for group in range(4)]
    while ray.get(worker.status.remote())["running"] < 4 * SPEC.n:
        pass
    assert ray.get(worker.abort_all.remote()) == 4
    for ref in refs:
        with pytest.raises(GenerationAborted):
            ray.get(ref)
    assert ray.get(worker.generate.remote(Lease(0, 0, PROMPT, seed=0), SPEC)[1]).tokens > 0


def test_status_says_where_the_worker_is_and_what_it_does(worker):
    status = ray.get(worker.status.remote())
    assert status["name"] == "rollout-0"
    assert status["node"] == ray.nodes()[0]["NodeID"]
    assert status["pid"] > 0
    assert status["tokens"] > 0
    assert status["running"] == status["waiting"] == 0


def test_the_store_keeps_the_newest_two_and_what_is_pinned(store):
    def put(attempt, number):
        ray.get(store.put.remote(Version(attempt, number), flatten([("a", torch.full((4,), float(number)))])))

    put(0, 1)
    ray.get(store.pin.remote(Version(0, 1)))
    for number in (2, 3, 4):
        put(0, number)
    assert ray.get(store.versions.remote()) == [Version(0, 1), Version(0, 3), Version(0, 4)]
    put(1, 2)
    assert ray.get(store.newest.remote()) == Version(1, 2)
    ray.get(store.unpin.remote(Version(0, 1)))
    assert ray.get(store.versions.remote()) == [Version(0, 4), Version(1, 2)]
    with pytest.raises(ValueError, match="undone attempt"):
        put(0, 5)
    with pytest.raises(KeyError, match=r"0\.1 are not held"):
        ray.get(store.get.remote(Version(0, 1)))


def test_weights_outlive_the_process_that_published_them(store):
    @ray.remote(num_cpus=0)
    class Publisher:
        def publish(self, store):
            ray.get(store.put.remote(Version(0, 1), flatten([("a", torch.arange(500_000.0))])))

    publisher = Publisher.remote()
    ray.get(publisher.publish.remote(store))
    ray.kill(publisher)
    flat = ray.get(ray.get(store.get.remote(Version(0, 1))))
    flat.verify()
    assert flat.nbytes >= 2_000_000


def test_a_saved_version_is_a_model_folder_that_replaces_the_old_one(store, model, tiny_model, tmp_path):
    folder = tmp_path / "best"
    for number, factor in ((1, 0.5), (2, 2.0)):
        ray.get(store.put.remote(Version(0, number), scaled(model, factor)))
        ray.get(store.save.remote(Version(0, number), str(folder), str(tiny_model)))
        saved = load_model(folder)
        assert torch.equal(saved.model.norm.weight, model.model.norm.weight * factor)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
