"""The same workload under TRL's GRPOTrainer and `transformers.generate`, until it is ended.

    OMP_NUM_THREADS=N python -m benchmarks.trl_side RUN WORKLOAD.json STEPS.jsonl

Started by `rporec bench peer-trl` with the Python of TRL's environment; a line for every step. With
`workload.thoughts` it is the authors' stage 2: each completion is summarised, embedded and ranked by itself, and
the entropies take a forward pass of their own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Rows
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.workload import Dealt, Workload
from rporec.files import append_line
from rporec.models.backbone import load_model, load_tokenizer
from rporec.run import Run
from rporec.text.completion import parse


class Lengths(LogitsProcessor):
    """No end before its time, and the end at its time."""

    def __init__(self, lengths: list[int], prompt: int, end: int) -> None:
        self.last, self.prompt, self.end = torch.tensor(lengths) - 1, prompt, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        due = self.last <= input_ids.shape[1] - self.prompt
        scores = scores.masked_fill(due[:, None], -torch.inf)
        scores[:, self.end] = torch.where(due, 0.0, -torch.inf)
        return scores


class Steps(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        append_line(self.path, {"step": state.global_step, "time": time.time()})


def main(folder: Path, workload: Workload, steps: Path) -> None:
    run, config = Run(folder), Run(folder).config()
    recipe = Dealt(run, config, workload)
    judge = recipe.judge()
    judge.load()
    model, tokenizer = load_model(recipe.model), load_tokenizer(recipe.model)
    drawn = [recipe.draw(number) for number in range(recipe.passes)]
    ids = recipe.prompts([sample for sample, _ in drawn])
    length_of = {tuple(prompt.tolist()): recipe.length(seed) for (_, seed), prompt in zip(drawn, ids, strict=True)}
    plain_generate = model.generate

    def generate(input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        lengths = Lengths(
            [length_of[tuple(row)] for row in input_ids.tolist()], workload.prompt, tokenizer.eos_token_id
        )
        return plain_generate(input_ids=input_ids, logits_processor=LogitsProcessorList([lengths]), **more)

    def reward(completions: list[str], sample: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        written, by = [parse(text) for text in completions], 1 if workload.thoughts else len(completions)
        if workload.thoughts:
            entropies(completion_ids)
        scored = [
            judge.score_completions(judge.reward_head, np.array(sample[at : at + by]), written[at : at + by])
            for at in range(0, len(written), by)
        ]
        return np.concatenate([one.reward_without_entropy for one in scored]).tolist()

    @torch.no_grad()
    def entropies(completion_ids: list[list[int]]) -> torch.Tensor:
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in completion_ids], batch_first=True)
        logprobs = model(padded).logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    model.generate = generate
    settings = GRPOConfig(
        output_dir=str(steps.parent / "trl"),
        per_device_train_batch_size=workload.completions,
        num_generations=workload.size,
        max_completion_length=workload.lengths[1],
        temperature=1.0,
        beta=workload.kl,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=1_000_000,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_steps=1_000_000,
        disable_tqdm=True,
    )
    rows = Rows.from_dict({"prompt": tokenizer.batch_decode(ids), "sample": [sample for sample, _ in drawn]})
    trainer = GRPOTrainer(model, reward, settings, rows, processing_class=tokenizer, callbacks=[Steps(steps)])
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Workload.read(Path(sys.argv[2])), Path(sys.argv[3]))
