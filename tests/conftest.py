"""What several test files share: a tiny model folder, and one real vLLM engine for the whole session."""

from __future__ import annotations

import os

import pytest
from served_run import served  # noqa: F401 - fixtures
from trained_run import trained  # noqa: F401

# Before anything imports torch: see `rporec.engine.vllm_start.engine_environment`.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture
def disk(monkeypatch) -> list[str]:
    """What is brought to the disk from here on, in order: `sync PATH` and `rename PATH`, which is the new name."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        fsync(descriptor)
        done.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")

    def renamed(old, new):
        replace(old, new)
        done.append(f"rename {new}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return done


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a Qwen3 with 0.4 M parameters, random but far from uniform in what it says next."""
    import torch

    from rporec.config import TinyConfig
    from rporec.models.backbone import load_model, load_tokenizer, make_tiny, save_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny(["alpha beta gamma delta 1 2 3"] * 4, TinyConfig(context=256), seed=0, out=folder)
    model = load_model(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "embed" in name:  # sharper, and not an echo of the last token
                parameter *= 8
    save_model(model, load_tokenizer(folder), folder)
    return folder


@pytest.fixture(scope="session")
def vllm_engine(tiny_model):
    """A running VllmEngine on `tiny_model`; a test that changes its weights puts them back."""
    from rporec.config import EngineConfig
    from rporec.engine.vllm import VllmEngine

    engine = VllmEngine(tiny_model, EngineConfig(kv_cache_mb=64, max_num_seqs=32), context=256, seed=0)
    yield engine
    engine.close()


def pytest_collection_modifyitems(items):
    """A service of the whole session starts as late as it can, so that it takes no core from other tests."""
    items.sort(key=lambda item: "served" in getattr(item, "fixturenames", ()))
