"""The exact engine against plain `transformers`, which it must equal."""

import numpy as np
import pytest
import torch

from rporec.config import EngineConfig
from rporec.engine.reference import ReferenceEngine
from rporec.engine.types import EngineError, SamplingSpec, Version
from rporec.engine.weights import WeightsError
from rporec.models.backbone import load_model

PROMPTS = [[5, 9, 40, 41], list(range(10, 60)), [100] * 17]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


@pytest.fixture
def engine(tiny_model):
    engine = ReferenceEngine(tiny_model, EngineConfig(kind="transformers"), context=128, seed=0)
    yield engine
    engine.close()


def greedy(**changes):
    return SamplingSpec(**{"temperature": 0, "max_tokens": 12, "stop": ()} | changes)


def test_greedy_tokens_are_those_of_transformers_whatever_else_is_in_the_batch(engine, model):
    futures = [engine.submit(prompt, greedy()) for prompt in PROMPTS]
    for prompt, future in zip(PROMPTS, futures, strict=True):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
            )
        assert future.result()[0].token_ids.tolist() == expected[0, len(prompt) :].tolist()


def test_a_seed_gives_the_same_samples_alone_and_in_a_batch(engine):
    spec = SamplingSpec(n=3, max_tokens=12, seed=11, stop=())
    alone = engine.submit(PROMPTS[0], spec).result()
    others = [engine.submit(prompt, SamplingSpec(n=2, max_tokens=20, seed=i)) for i, prompt in enumerate(PROMPTS)]
    together = engine.submit(PROMPTS[0], spec).result()
    for future in others:
        future.result()
    assert [one.token_ids.tolist() for one in alone] == [one.token_ids.tolist() for one in together]
    assert len({tuple(one.token_ids.tolist()) for one in alone}) == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5)])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(engine, model, temperature, top_p):
    spec = SamplingSpec(temperature=temperature, top_p=top_p, max_tokens=10, seed=3, stop=())
    [one] = engine.submit(PROMPTS[1], spec).result()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1] + one.token_ids.tolist()])).logits[0, len(PROMPTS[1]) - 1 : -1]
    probabilities = (logits / temperature).softmax(-1)
    for row, token, logprob in zip(probabilities, one.token_ids, one.logprobs, strict=True):
        ordered = row.sort(descending=True).values
        kept = ordered[: int((ordered.cumsum(0) < top_p).sum()) + 1].sum()
        assert logprob == pytest.approx(float((row[token] / kept).log()), abs=1e-4)


def test_frequencies_follow_the_distribution(engine, model):
    counts = np.zeros(model.config.vocab_size)
    for seed in range(16):
        for one in engine.submit(PROMPTS[0], SamplingSpec(n=128, max_tokens=1, seed=seed, stop=())).result():
            counts[one.token_ids[0]] += 1
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).numpy()
    error = np.abs(counts / counts.sum() - probabilities)
    assert (error <= 5 * np.sqrt(probabilities / counts.sum()) + 2 / counts.sum()).all()


def test_scores_are_the_teacher_forced_logprobs_of_its_own_samples(engine):
    [one] = engine.submit(PROMPTS[0], SamplingSpec(max_tokens=10, seed=1, stop=())).result()
    scores, nothing = engine.score([PROMPTS[0] + one.token_ids.tolist(), [7]]).result()
    assert scores[len(PROMPTS[0]) - 1 :] == pytest.approx(one.logprobs, abs=1e-4)
    assert len(nothing) == 0


def test_new_weights_apply_to_the_next_batch_and_are_named_in_its_tokens(engine, model):
    changed = {name: tensor * 1.5 for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    before = engine.score([PROMPTS[1]]).result()[0]
    engine.update_weights(Version(0, 1), changed.items()).result()
    [one] = engine.submit(PROMPTS[1], greedy()).result()
    assert one.versions == ((Version(0, 1), 0, len(one.token_ids)),)
    assert not np.allclose(engine.score([PROMPTS[1]]).result()[0], before, atol=1e-2)


def test_weights_of_another_model_change_nothing(engine):
    before = engine.score([PROMPTS[1]]).result()[0]
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight"):
        engine.update_weights(Version(0, 1), [("model.embed_tokens.weight", torch.ones(3, 3))]).result()
    assert engine.version == Version(0, 0)
    assert np.array_equal(engine.score([PROMPTS[1]]).result()[0], before)


def test_a_completion_stops_at_a_stop_string_of_one_or_more_tokens_and_keeps_it(engine):
    [free] = engine.submit(PROMPTS[0], SamplingSpec(max_tokens=30, seed=2, stop=())).result()
    stop = engine.decoder.text(free.token_ids[5:8])
    [one] = engine.submit(PROMPTS[0], SamplingSpec(max_tokens=30, seed=2, stop=(stop,))).result()
    assert one.finish_reason == "stop"
    assert one.text.endswith(stop)
    assert one.token_ids.tolist() == free.token_ids[: len(one.token_ids)].tolist()


def test_a_closed_engine_and_a_prompt_without_room_are_refused(engine):
    with pytest.raises(ValueError, match="128"):
        engine.submit([1] * 128, greedy()).result()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit([1], greedy()).result()
