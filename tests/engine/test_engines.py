"""What every engine keeps to; each has a file of its own for the rest."""

import pytest

from rporec.config import EngineConfig
from rporec.engine.reference import ReferenceEngine
from rporec.engine.types import Engine, SamplingSpec

PROMPT = [5, 9, 40, 41]


@pytest.fixture(scope="module")
def reference_engine(tiny_model):
    engine = ReferenceEngine(tiny_model, EngineConfig(kind="transformers"), context=128, seed=0)
    yield engine
    engine.close()


@pytest.fixture(params=[pytest.param("vllm_engine", marks=pytest.mark.engine), "reference_engine"])
def engine(request):
    return request.getfixturevalue(request.param)


def test_it_is_an_engine(engine):
    assert isinstance(engine, Engine)


def test_nothing_ends_a_completion_before_its_time(engine):
    """Every letter would, so one of three ends at once otherwise."""
    letters = tuple(map(chr, range(33, 127)))
    free = SamplingSpec(n=3, max_tokens=16, seed=2, stop=letters)
    held = SamplingSpec(n=3, max_tokens=16, min_tokens=12, seed=2, stop=letters)
    assert min(len(one.token_ids) for one in engine.submit(PROMPT, free).result()) < 12
    for one in engine.submit(PROMPT, held).result():
        assert 12 <= len(one.token_ids) <= 16
        assert not set(one.token_ids[:12].tolist()) & set(engine.decoder.split_stops(letters)[0])
