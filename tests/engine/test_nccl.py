"""Weights from the learner's device into a real vLLM, over vLLM's own NCCL back end.

Without CUDA the group alone is another one (`host_group`); with two GPUs nothing is.
"""

from __future__ import annotations

import socket

import pytest
import torch
from host_group import engine_end, learner_end
from vllm.distributed.weight_transfer import nccl_common, nccl_engine

from rporec.config import EngineConfig
from rporec.engine.nccl import Channel, Snapshot
from rporec.engine.types import SamplingSpec, Version
from rporec.engine.vllm import VllmEngine
from rporec.engine.weights import WeightsError, flatten, unflatten
from rporec.models.backbone import load_model

pytestmark = pytest.mark.engine

PROMPT = list(range(20, 60))
GREEDY = SamplingSpec(temperature=0, max_tokens=16, stop=())


@pytest.fixture
def on_host(monkeypatch):
    monkeypatch.setattr(nccl_common, "trainer_init", learner_end)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", engine_end)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@pytest.fixture
def engine(vllm_engine, tiny_model):
    yield vllm_engine
    vllm_engine.update_weights(
        Version(0, 0), list(unflatten(flatten(load_model(tiny_model).named_parameters())))
    ).result()


def opened(engine, device="cpu"):
    """Both ends of a new group."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    joining = engine.join("127.0.0.1", port, 2)
    channel = Channel("127.0.0.1", port, 2, torch.device(device))
    joining.result(60)
    return channel


def scaled(tiny_model, factor, version, device="cpu"):
    model = load_model(tiny_model).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    return model, Snapshot.of(version, model.named_parameters())


def bring(engine, channel, snapshot):
    receiving = engine.receive_weights(snapshot.version, snapshot.described)
    channel.send(snapshot)
    return receiving.result(60)


def assert_it_has(engine, model):
    ids = torch.tensor([PROMPT])
    model = model.to("cpu")
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    [written] = engine.submit(PROMPT, GREEDY).result(60)
    assert written.token_ids.tolist() == expected[0, len(PROMPT) :].tolist()
    [scores] = engine.score([PROMPT]).result(60)
    assert scores == pytest.approx(logits.gather(1, ids[0, 1:, None])[:, 0].numpy(), abs=1e-4)


def test_broadcast_weights_are_the_learners_and_later_ones_use_the_same_group(engine, tiny_model, on_host):
    channel = opened(engine)
    for version, factor in ((Version(0, 1), 1.1), (Version(0, 2), 0.8)):
        model, snapshot = scaled(tiny_model, factor, version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0  # the next step must not change what is sent
        bring(engine, channel, snapshot)
        assert engine.version == version
        assert_it_has(engine, scaled(tiny_model, factor, version)[0])


def test_an_engine_in_a_group_still_takes_weights_from_the_store(engine, tiny_model, on_host):
    channel = opened(engine)
    pinned, older = scaled(tiny_model, 0.9, Version(0, 1))
    bring(engine, channel, scaled(tiny_model, 1.2, Version(0, 2))[1])
    engine.update_weights(Version(0, 1), zip(older.names, older.tensors, strict=True)).result(60)
    assert_it_has(engine, pinned)
    newest, snapshot = scaled(tiny_model, 1.3, Version(0, 3))
    bring(engine, channel, snapshot)
    assert_it_has(engine, newest)


def test_a_new_group_takes_the_place_of_one_whose_learner_is_gone(engine, tiny_model, on_host):
    opened(engine).close()
    model, snapshot = scaled(tiny_model, 1.1, Version(1, 1))
    bring(engine, opened(engine), snapshot)
    assert_it_has(engine, model)


def test_weights_that_do_not_fit_are_refused_before_the_broadcast(engine, tiny_model, on_host):
    opened(engine)
    before, (name, dtype, shape) = (
        engine.version,
        Snapshot.of(Version(0, 9), [("x.weight", torch.zeros(3))]).described[0],
    )
    with pytest.raises(WeightsError, match="missing from the new weights"):
        engine.receive_weights(Version(0, 9), [(name, dtype, shape)]).result(60)
    assert engine.version == before
    assert engine.submit(PROMPT, GREEDY).result(60)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes two GPUs, and this machine has fewer")
def test_between_two_gpus(tiny_model):
    engine = VllmEngine(tiny_model, EngineConfig(dtype="float32", max_num_seqs=8), context=256, seed=0)
    try:
        model, snapshot = scaled(tiny_model, 1.1, Version(0, 1), "cuda:1")
        bring(engine, opened(engine, "cuda:1"), snapshot)
        [written] = engine.submit(PROMPT, GREEDY).result(60)
        ids = torch.tensor([PROMPT], device="cuda:1")
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert written.token_ids.tolist() == expected[0, len(PROMPT) :].tolist()
    finally:
        engine.close()
