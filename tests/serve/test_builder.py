"""A run's application as Ray Serve builds it from a config file."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as from_file

from rporec.config import ConfigError, parse_config
from rporec.promotion import promoted
from rporec.run import Run
from serve.builder import build


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", parse_config({}), resume=False)
    for folder in (run.warm_model, run.head()):
        folder.mkdir(parents=True)
        (folder / "weights").touch()
    return run


def test_arguments_of_a_file_become_a_guarded_application_of_what_is_promoted(run):
    with pytest.raises(ConfigError, match="serve needs stage stage1"):
        from_file(build, {"run": str(run.folder)})
    with run.stage("stage1"):
        pass
    made = from_file(build, {"run": str(run.folder), "overrides": ["serve.reasoners=2"], "cuda": True})
    assert promoted(run).version == "0.0"
    served, guarded, reasoner, retriever = made._bound_deployment.init_args
    assert guarded
    assert served.config.serve.reasoners.min == 2
    assert reasoner._bound_deployment.num_replicas == 2
    assert reasoner._bound_deployment.ray_actor_options["num_gpus"] == 1
    assert not sees_no_gpu(reasoner)
    assert sees_no_gpu(retriever)


def test_without_cuda_nothing_sees_a_gpu(run):
    with run.stage("stage1"):
        pass
    made = from_file(build, {"run": str(run.folder)})
    assert all(sees_no_gpu(one) for one in (made, *made._bound_deployment.init_args[2:]))


def sees_no_gpu(application):
    environment = application._bound_deployment.ray_actor_options["runtime_env"]["env_vars"]
    return environment.get("CUDA_VISIBLE_DEVICES") == ""


def test_arguments_that_are_wrong_are_refused(run):
    with pytest.raises(ConfigError, match="no such run"):
        from_file(build, {"run": str(run.folder / "none")})
    with pytest.raises(ValidationError, match="runn"):
        from_file(build, {"run": str(run.folder), "runn": 1})


def test_a_token_file_is_found_from_every_working_directory(run, monkeypatch):
    with run.stage("stage1"):
        pass
    monkeypatch.chdir(run.folder)
    made = from_file(build, {"run": str(run.folder), "overrides": ["serve.token_file=secret/token"]})
    served, _, reasoner, retriever = made._bound_deployment.init_args
    for one in (served, *(other._bound_deployment.init_args[0] for other in (reasoner, retriever))):
        assert one.config.serve.token_file == str(run.folder / "secret/token")


def test_a_reasoner_reserves_the_gpus_that_its_engine_spreads_over(run):
    with run.stage("stage1"):
        pass

    def reserved(*overrides, cuda=True):
        made = from_file(build, {"run": str(run.folder), "overrides": list(overrides), "cuda": cuda})
        others = made._bound_deployment.init_args[2:]
        return [one._bound_deployment.ray_actor_options["num_gpus"] for one in others]

    spread = "engine.args.tensor_parallel_size=2"
    assert reserved(spread) == [2, 0]
    assert reserved(spread, cuda=False) == [0, 0]
    assert reserved("engine.gpu_share=0.5") == [1, 0]
