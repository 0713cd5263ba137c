"""Whether one GPU trains, and how fast: a few steps with a random model of Qwen3-0.6B's shape.

    python -m benchmarks.gpu_smoke [--steps 12]

Rollout worker and learner share the GPU as in `configs/gpu_1x.yaml`, once on policy and once with a staleness of 1.
Prints one JSON object. Nothing is downloaded; about 10 GB of disk for a checkpoint.

rollout_tokens_per_second      on policy, when nothing else uses the GPU: the learner waits exactly meanwhile
learner_tokens_per_second      of prompts and completions, each once, in its forward and backward passes
learner_share_of_peak          of the GPU's dense bfloat16 peak, by what the passes need at least: 2 operations a
                               parameter and token of a forward pass, 4 of a backward, none for recomputing; the
                               output layer counts for completion tokens alone, attention not at all
weights_seconds                from a version's being there until the rollout worker has it
publish_seconds                of the learner, for the same version
async_over_sync, possible      as `rporec bench async` has them
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmarks.async_training import WARMING, Pace
from benchmarks.result import machine, result
from benchmarks.workload import SMALL, Workload, prepare
from rporec.config import override
from rporec.files import read_lines, write_json
from rporec.report.live import progress
from rporec.run import Run, RunError

QWEN3_600M = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
WORKLOAD = Workload(name="gpu", shape=SMALL, prompt=256, lengths=(32, 256), groups=64, size=8, kl=0.01, context=1024)
SHARED = [
    "device=cuda",
    "engine.gpu_share=0.5",
    "engine.max_num_seqs=512",
    "engine.args={kv_cache_memory_bytes: 21474836480}",
    "deepspeed.gpu_share=0.5",
]
KINDS = {"sync": 0, "async": 1}  # staleness
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # bfloat16, dense, a second; data sheets


def run(
    steps: int = 12,
    *,
    workload: Workload = WORKLOAD,
    shape: dict[str, int] = QWEN3_600M,
    settings: Sequence[str] = SHARED,
    kinds: Sequence[str] = ("sync", "async"),
) -> dict[str, Any]:
    """`settings` as on the command line of `rporec train`. The figures that need both kinds are there with both."""
    before = machine()
    taken: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="rporec-bench-") as scratch:
        made = prepare(Path(scratch) / "run", workload)
        parameters, output = _reshape(made, shape)
        for kind in kinds:
            copy = Path(scratch) / kind
            shutil.copytree(made.folder, copy)
            chosen = [*settings, f"max_staleness={KINDS[kind]}", f"steps={steps}"]
            taken[kind] = _train(Run(copy), workload, chosen, f"{kind}, {steps} steps")
            shutil.rmtree(copy)
    ratios: dict[str, Any] = {}
    for kind, lines in taken.items():
        found = _speeds(lines[WARMING:-1], workload, parameters, output)
        ratios |= {f"{key}_{kind}": value for key, value in found.items()}
    if len(taken) == len(KINDS):
        ratios |= _overlap({kind: Pace.of(lines) for kind, lines in taken.items()})
    wall = {kind: Pace.of(lines).total for kind, lines in taken.items()}
    return result("gpu-smoke", ratios, wall, {}, machine=before | _gpu(), parameters=parameters + output)


def _speeds(steps: Sequence[dict[str, Any]], workload: Workload, parameters: int, output: int) -> dict[str, Any]:
    """`parameters`: those of all layers but the output's, which has `output`."""
    written = sum(step["tokens"] for step in steps)
    read = written + len(steps) * workload.groups * workload.prompt  # a prompt is read once for its group
    parts = {part: sum(step["seconds"][part] for step in steps) for part in ("wait", "forward", "backward")}
    proximal = 1 - workload.micro / workload.groups  # the first micro-batch's serves its backward
    passes = 2 * proximal + (2 if workload.kl else 0) + 2 + 4  # proximal, reference, forward, backward
    flops = passes * (parameters * read + output * written)
    learning = parts["forward"] + parts["backward"]
    peak = _peak()
    brought = [step["weights_seconds"] for step in steps if step["weights_seconds"] is not None]
    return {
        "rollout_tokens_per_second": round(written / max(parts["wait"], 1e-9), 1),
        "tokens_per_second": round(written / sum(step["seconds"]["total"] for step in steps), 1),
        "learner_tokens_per_second": round(read / learning, 1),
        "learner_tflops": round(flops / learning / 1e12, 3),
        "learner_share_of_peak": round(flops / learning / peak, 4) if peak else None,
        "weights_seconds": round(fmean(brought), 4) if brought else None,
        "publish_seconds": round(fmean(step["seconds"]["publish"] for step in steps), 4),
    }


def _overlap(pace: dict[str, Pace]) -> dict[str, float]:
    sync, overlapped = pace["sync"], pace["async"]
    faster = sync.total / overlapped.total
    possible = sync.total / max(sync.waiting, sync.learning)
    return {
        "async_over_sync": round(faster, 3),
        "possible": round(possible, 3),
        "share_of_possible": round(faster / possible, 3),
    }


def _reshape(run: Run, shape: dict[str, int]) -> tuple[int, int]:
    """A random Qwen3 of this shape in the place of the run's; parameters without the output layer, and of that.

    Tokens beyond the tokenizer's are written as nothing, which harms no figure.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from rporec.models.backbone import load_model, load_tokenizer, save_model

    tokenizer, small = load_tokenizer(run.backbone), load_model(run.backbone)
    ends = {key: getattr(small.config, key) for key in ("eos_token_id", "pad_token_id", "max_position_embeddings")}
    torch.manual_seed(0)
    config = Qwen3Config(**shape, **ends, bos_token_id=None, tie_word_embeddings=True, dtype="float32")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = small.generation_config
    save_model(model, tokenizer, run.backbone)
    output = shape["vocab_size"] * shape["hidden_size"]
    return model.num_parameters() - output, output


def _train(run: Run, workload: Workload, settings: Sequence[str], title: str) -> list[dict[str, Any]]:
    """The lines of steps.jsonl."""
    write_json(run.config_path, override(run.config(), list(settings)).model_dump(mode="json"))
    spec, log = run.folder / "workload.json", run.folder / "log"
    spec.write_text(workload.model_dump_json())
    command = [sys.executable, "-m", "benchmarks.our_side", str(run.folder), str(spec)]
    steps = run.config().steps
    with log.open("w") as out, progress(title, total=steps, console=Console(stderr=True)) as bar:
        process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=out, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    process.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(len(read_lines(run.steps)))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    lines = read_lines(run.steps)
    if process.returncode or len(lines) < steps:
        raise RunError(f"gpu_smoke: {title}: {' '.join(log.read_text(errors='replace')[-1500:].split())}")
    return lines


def _gpu() -> dict[str, Any]:
    import torch

    return {"gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


def _peak() -> float | None:
    name = _gpu()["gpu"] or ""
    return next((peak for key, peak in PEAK.items() if key in name), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each kind; the first three and the last do not count")
    print(json.dumps(run(parser.parse_args().steps)))
