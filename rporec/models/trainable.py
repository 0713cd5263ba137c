"""The LLM under DeepSpeed: what warm-up and reinforcement learning both train.

Nothing here knows about Ray: inside a Ray Train worker DeepSpeed takes over the process group that is
there, in a plain process it makes one of size one.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rporec.config import Config, ConfigError
from rporec.models.backbone import load_model, merged_named_tensors, save_model, switch_off_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART = "learner"  # DeepSpeed's folder in a checkpoint


def learner_environment(cuda: bool, threads: int) -> dict[str, str]:
    """Environment of a learner process; it must stand before DeepSpeed is imported.

    On CPU this keeps DeepSpeed from compiling C++ at start, which takes minutes.
    """
    common = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if cuda:
        return common
    return common | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "1",
        "OMP_NUM_THREADS": str(threads),
        "DEEPSPEED_LOG_LEVEL": "error",
    }


class Trainable:
    """A causal LM, its optimiser and its learning-rate schedule in one DeepSpeed engine.

    Every optimiser step takes `accumulation` micro-batches on every rank. Losses given to `backward`
    are parts of one global sum: all micro-batches of all ranks together make the full-batch loss.
    """

    def __init__(
        self,
        model: Path | str,
        config: Config,
        *,
        lr: float,
        accumulation: int,
        micro_batch: int,
        schedule: Callable[[int], float] | None = None,
        grad_clip: float = 1.0,
        dropout: bool = True,
    ) -> None:
        cuda = torch.cuda.is_available()
        if not cuda:
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        import deepspeed

        if not dist.is_initialized():
            _single_process_group(cuda)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.seed = config.seed
        self.accumulation = accumulation
        bf16 = config.deepspeed.bf16 if config.deepspeed.bf16 is not None else cuda
        module = load_model(model, torch.bfloat16 if bf16 else torch.float32, config.lora)
        if not dropout:
            switch_off_dropout(module)
        module.train()  # gradient checkpointing works in no other mode
        if cuda:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * self.world,
            "zero_optimization": {"stage": config.deepspeed.zero_stage},
            "bf16": {"enabled": bf16},
            "gradient_clipping": grad_clip,
            "optimizer": {
                "type": "AdamW",
                # torch's own AdamW: DeepSpeed's CPU and fused ones are compiled at start.
                "params": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.0, "torch_adam": True},
            },
            "steps_per_print": 10**9,
            **config.deepspeed.args,
        }
        scheduler = (lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)) if schedule else None
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=settings, lr_scheduler=scheduler
        )

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's part of the global loss; the last of a step updates the weights."""
        # DeepSpeed averages over ranks and micro-batches; the losses here are summands already.
        self.engine.backward(loss * (self.world * self.accumulation))
        self.engine.step()

    @property
    def lr(self) -> float:
        return float(self.engine.get_lr()[0])

    @property
    def grad_norm(self) -> float | None:
        """Global norm before clipping; None where the ZeRO stage does not keep it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of the merged weights; under ZeRO-3 every rank must iterate."""
        if self.engine.zero_optimization_stage() < 3:
            yield from merged_named_tensors(self.engine.module)
            return
        with self._gathered():
            yield from ((name, tensor.clone()) for name, tensor in merged_named_tensors(self.engine.module))

    def save_model(self, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
        """Write the model folder of `backbone.save_model`; all ranks must call together."""
        with self._gathered():
            if self.rank == 0:
                save_model(self.engine.module, tokenizer, out)

    def _gathered(self) -> AbstractContextManager[Any]:
        """Under ZeRO-3 every rank holds all parameters meanwhile, elsewhere it does anyway."""
        if self.engine.zero_optimization_stage() < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.engine.module.parameters()))

    # --- checkpoints -------------------------------------------------------------------------
    def save_checkpoint(self, folder: Path) -> None:
        """Every rank writes its part of optimiser, schedule and weights, and its random state, into `folder`."""
        self.engine.save_checkpoint(str(folder), tag=_PART)
        (folder / "rng").mkdir(exist_ok=True)
        save_file(_random_state(), _rng_file(folder, self.rank))

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from what any number of ranks wrote; all ranks must call together.

        As many ranks as wrote it go on bit for bit. Others have the same weights and optimiser state,
        but sum gradients in another order and draw from fresh random states.

        Raises ConfigError for a folder that holds no such part, or one written in another precision.
        """
        self._check(folder)
        if len(list((folder / "rng").iterdir())) == self.world:
            self.engine.load_checkpoint(str(folder), tag=_PART)
            _set_random_state(load_file(_rng_file(folder, self.rank)))
            return
        if self.engine.zero_optimization_stage() == 0:  # every rank holds everything
            self.engine.load_checkpoint(str(folder), tag=_PART)
        else:
            with self._by_parameter(folder) as whole:
                self.engine.load_checkpoint(str(whole), tag=_PART)
        fresh = np.random.default_rng([self.seed, self.engine.global_steps, self.rank])
        torch.manual_seed(int(fresh.integers(2**63)))

    def _check(self, folder: Path) -> None:
        if not ((folder / _PART).is_dir() and (folder / "rng").is_dir()):
            raise ConfigError(
                f"{folder}: no learner state in this checkpoint; delete the folder to resume from an older one"
            )
        wrote, reads = any((folder / _PART).glob("bf16_zero_*")), self.engine.bfloat16_enabled()
        if self.engine.zero_optimization_stage() and wrote != reads:
            names = {True: "bfloat16", False: "float32"}
            raise ConfigError(
                f"{folder}: written in {names[wrote]}, and this device computes in {names[reads]}; "
                "resume on the kind of device that wrote it"
            )

    @contextmanager
    def _by_parameter(self, folder: Path) -> Iterator[Path]:
        """The ranks' parts as DeepSpeed's universal checkpoint, and an engine that reads such a one meanwhile."""
        whole = folder / "universal"
        if self.rank == 0:
            from deepspeed.checkpoint import ds_to_universal

            shutil.rmtree(whole, ignore_errors=True)  # of a process that was killed here
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=str(folder / _PART),
                    output_folder=str(whole / _PART),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,  # what only models cut by tensor parallelism have
                )
            )
        dist.barrier()
        # The key "checkpoint.load_universal" of its config, which must be known before there is an engine.
        self.engine._config.load_universal_checkpoint = True
        try:
            yield whole
        finally:
            self.engine._config.load_universal_checkpoint = False
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(whole)


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"rank_{rank}.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from, in backbones that have it."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, on the device of `values`."""
    if dist.get_world_size() == 1:
        return values
    shared = values.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(shared)
    return shared.to(values.device)


def from_rank_0(value: Any) -> Any:
    """What rank 0 passed, on every rank; the others' values do not matter."""
    held = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def all_concatenate(values: torch.Tensor) -> torch.Tensor:
    """The 1-D tensors of all ranks, of any lengths, one behind the other in rank order."""
    world = dist.get_world_size()
    if world == 1:
        return values
    lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(values)], device=values.device))
    longest = int(max(lengths))
    padded = torch.nn.functional.pad(values, (0, longest - len(values)))
    rows = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(rows, padded)
    return torch.cat([row[: int(length)] for row, length in zip(rows, lengths, strict=True)])


def _single_process_group(cuda: bool) -> None:
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
