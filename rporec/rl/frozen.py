"""Frozen models that reward terms ask: a copy of the starting LLM that summarises, and a text encoder.

Never a rollout engine: its weights move, and with them what a summary of the same text would be.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rporec.models.backbone import load_model, load_tokenizer
from rporec.rl.rewards import parse_summary, summary_prompt

SUMMARY_TOKENS = 128


class Summarizer:
    """Greedy summaries of chains of thought, a batch at a time."""

    def __init__(self, model: Path | str, batch_size: int = 32) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = load_model(model, dtype).to(self.device)
        self.tokenizer = load_tokenizer(model)
        self.tokenizer.padding_side = "left"
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, thoughts: list[str]) -> list[str | None]:
        """One summary a text; "" for a blank text, which needs none."""
        summaries: list[str | None] = ["" for _ in thoughts]
        rows = sorted((i for i, text in enumerate(thoughts) if text.strip()), key=lambda i: len(thoughts[i]))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            prompts = [summary_prompt(thoughts[i]) for i in batch]
            longest = self.model.config.get_text_config().max_position_embeddings - SUMMARY_TOKENS
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=longest)
            output = self.model.generate(
                **inputs.to(self.device),
                max_new_tokens=SUMMARY_TOKENS,
                do_sample=False,
                stop_strings=["</answer>"],
                tokenizer=self.tokenizer,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            written = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, self.tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                summaries[i] = parse_summary(text)
        return summaries


class TextEmbedder:
    """Mean-pooled last hidden states of a frozen encoder: n texts to float32 [n, D]."""

    def __init__(self, model: str, batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(model).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=512,
            ).to(self.device)
            hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None].float()
            rows.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy())
        return np.concatenate(rows)
