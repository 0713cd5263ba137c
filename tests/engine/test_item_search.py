"""Items from the real vLLM against `transformers`: brute force, the same search on exact scores, and what goes between."""

import numpy as np
import pytest
import torch

from rporec.config import EngineConfig
from rporec.engine.reference import ReferenceEngine
from rporec.engine.trie import Trie, write_sequences
from rporec.engine.types import GenerationAborted, ItemSpec, SamplingSpec
from rporec.engine.vllm_search import VllmSearch
from rporec.engine.vllm_start import CPU_BLOCK_SIZE
from rporec.models.backbone import load_model, load_tokenizer

pytestmark = pytest.mark.engine

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(5, 250, size).tolist() for size in (3, 40, 64, 100)]


@pytest.fixture(scope="module")
def sequences(tiny_model):
    """300 items whose first tokens are more than one request can ask for, in groups that share beginnings."""
    eos = load_tokenizer(tiny_model).eos_token_id
    firsts = RNG.permutation(np.arange(5, 250))[:200]
    words = {tuple(RNG.choice(firsts[:40], 1).tolist() + RNG.integers(5, 12, 2).tolist()) for _ in range(140)}
    words |= {(int(first),) for first in firsts[40:]}
    return [[*word, eos] for word in sorted(words)]


@pytest.fixture(scope="module")
def trie(sequences, tmp_path_factory):
    path = tmp_path_factory.mktemp("trie") / "items.parquet"
    write_sequences(path, sequences)
    return str(path)


@pytest.fixture(scope="module")
def exact(tiny_model):
    engine = ReferenceEngine(tiny_model, EngineConfig(), context=256, seed=0)
    yield engine
    engine.close()


def logprobs_of(model, prompt, sequences):
    """float32 [T] of each sequence behind the prompt."""
    rows = []
    for sequence in sequences:
        ids = torch.tensor([prompt + sequence])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy())
    return rows


def found(engine, prompts, specs):
    return [future.result(120) for future in [engine.submit(*one) for one in zip(prompts, specs, strict=True)]]


def test_all_beams_are_the_whole_catalogue_in_the_order_of_brute_force(vllm_engine, tiny_model, sequences, trie):
    assert len(np.unique(Trie(sequences).tokens[:, 0])) > 128
    [items] = found(vllm_engine, PROMPTS[:1], [ItemSpec(trie, len(sequences))])
    expected = logprobs_of(load_model(tiny_model), PROMPTS[0], sequences)
    scores = np.array([logprobs.sum() for logprobs in expected])
    assert [one.item for one in items] == np.argsort(-scores, kind="stable").tolist()
    for one in items:
        assert one.token_ids.tolist() == sequences[one.item]
        assert one.logprobs == pytest.approx(expected[one.item], abs=1e-4)
        assert one.versions == ((vllm_engine.version, 0, len(one.token_ids)),)
        assert one.text == vllm_engine.decoder.text(sequences[one.item])


def test_few_beams_are_those_of_exact_scores_whatever_else_the_engine_writes(vllm_engine, exact, trie):
    specs = [ItemSpec(trie, n, exclude=gone) for n, gone in ((1, ()), (4, ()), (16, tuple(range(0, 200, 2))), (50, ()))]
    beside = vllm_engine.submit(PROMPTS[2], SamplingSpec(max_tokens=24, n=4, stop=()))
    ours, theirs = found(vllm_engine, PROMPTS, specs), found(exact, PROMPTS, specs)
    for spec, some, others in zip(specs, ours, theirs, strict=True):
        items = [one.item for one in some]
        assert items == [one.item for one in others]
        assert len(items) == len(set(items) - set(spec.exclude)) == spec.n
        for one, other in zip(some, others, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert len(beside.result(60)) == 4


def test_behind_the_first_question_a_prompt_comes_from_the_cache(vllm_engine, trie, monkeypatch):
    prompt = np.random.default_rng(1).integers(5, 250, 100).tolist()  # no other test's
    cached: list[int] = []

    def answered(self, answer, output, request, original=VllmSearch._answered):
        cached.append(output.num_cached_tokens)
        return original(self, answer, output, request)

    monkeypatch.setattr(VllmSearch, "_answered", answered)
    found(vllm_engine, [prompt], [ItemSpec(trie, 8)])
    assert cached[0] == 0
    assert len(cached) > 8
    assert set(cached[2:]) == {100 // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE}  # a wide root is asked in two parts


def test_drawn_items_are_those_of_exact_scores(vllm_engine, exact, trie):
    specs = [ItemSpec(trie, 24, kind="sampled", seed=seed) for seed in range(4)]
    ours, theirs = found(vllm_engine, PROMPTS, specs), found(exact, PROMPTS, specs)
    assert [[one.item for one in some] for some in ours] == [[one.item for one in some] for some in theirs]


def test_a_search_that_does_not_fit_is_refused_and_one_that_runs_can_be_dropped(vllm_engine, trie):
    with pytest.raises(ValueError, match="items of up to 4 in a context of 256"):
        vllm_engine.submit([7] * 253, ItemSpec(trie, 4)).result(60)
    vllm_engine.pause()
    future = vllm_engine.submit(PROMPTS[1], ItemSpec(trie, 4))
    dropped = vllm_engine.drop(future)
    vllm_engine.resume()
    assert dropped.result(60) == 2  # the first tokens are asked for in two parts
    with pytest.raises(GenerationAborted):
        future.result(60)
    assert len(found(vllm_engine, PROMPTS[:1], [ItemSpec(trie, 4)])[0]) == 4
