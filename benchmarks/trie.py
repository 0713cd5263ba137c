"""Items by beams over a trie: vLLM's one-token requests against `generate` of transformers, with the same model.

    rporec bench trie [--json]

Both get the same prompts, 32 at once, of 96 tokens each, and return 16 beams from 1,000 items of five tokens;
`generate` is kept to the trie by `prefix_allowed_tokens_fn`. Every round has new prompts, so nothing of the
last one is cached. `…_long` is either behind prompts of 448 tokens, `trie_shared` the search behind prompts of 448
tokens that begin with the same 384, as instructions and the histories of one user do. `generate` reads each prompt
anew, whatever it shares.
`same_items` is the share of beams that both find; items are of one length, so that none ends before another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import result
from benchmarks.rounds import Rounds, in_turns
from rporec.config import EngineConfig, TinyConfig
from rporec.engine.trie import write_sequences
from rporec.engine.types import ItemSpec
from rporec.engine.vllm import VllmEngine
from rporec.models.backbone import load_model, load_tokenizer, make_tiny, save_model

ITEMS, PROMPTS, BEAMS, DEPTH = 1000, 32, 16, 5
SHORT, LONG, SHARED = 96, 448, 384  # tokens of a prompt; of them those that all share
ROUNDS = 5


class Search:
    """One model in both engines, and a catalogue of random items."""

    def __init__(self, folder: Path, shape: TinyConfig, items: int, beams: int) -> None:
        self.beams = beams
        make_tiny(["one two three"], shape, seed=0, out=folder / "model")
        self.model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "proj" in name or "embed" in name:  # sharper, as a trained model is
                    parameter *= 8
        save_model(self.model, tokenizer, folder / "model")
        rng, eos = np.random.default_rng(0), tokenizer.eos_token_id
        self.words = np.arange(10, len(tokenizer))
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < items:
            drawn.add((*rng.choice(self.words[:40], 2).tolist(), *rng.choice(self.words, DEPTH - 3).tolist()))
        self.sequences = [[*item, eos] for item in sorted(drawn)]
        self.trie = str(folder / "items.parquet")
        write_sequences(Path(self.trie), self.sequences)
        self.children: dict[tuple[int, ...], list[int]] = {}
        for sequence in self.sequences:
            for at, token in enumerate(sequence):
                self.children.setdefault(tuple(sequence[:at]), []).append(token)
        self.pad = tokenizer.pad_token_id
        self.engine = VllmEngine(folder / "model", EngineConfig(max_num_seqs=128), context=shape.context, seed=0)

    def prompts(self, number: int, count: int, length: int, shared: int = 0) -> list[list[int]]:
        """New ones for each number."""
        rng = np.random.default_rng([number, length, shared])
        rows = rng.choice(self.words, (count, length))
        rows[:, :shared] = rows[0, :shared]
        return rows.tolist()

    def by_engine(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        spec = ItemSpec(self.trie, self.beams)
        futures = [self.engine.submit(prompt, spec) for prompt in prompts]
        return [[one.item for one in future.result() if one.item is not None] for future in futures]

    def by_generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        width = len(prompts[0])
        item_of = {tuple(sequence): item for item, sequence in enumerate(self.sequences)}

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            return self.children.get(tuple(ids[width:].tolist()), [self.pad])

        ids = torch.tensor(prompts)
        with torch.no_grad():
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=self.beams,
                num_return_sequences=self.beams,
                max_new_tokens=DEPTH,
                do_sample=False,
                length_penalty=0.0,
                prefix_allowed_tokens_fn=allowed,
                pad_token_id=self.pad,
            )
        rows = written[:, width:].tolist()
        found = [item_of[tuple(row)] for row in rows]
        return [found[at : at + self.beams] for at in range(0, len(found), self.beams)]


def measure(
    shape: TinyConfig, *, items: int, prompts: int, beams: int, lengths: tuple[int, int, int], rounds: int
) -> tuple[Rounds, float]:
    """Ways "trie", "generate", "trie_long", "generate_long" and "trie_shared"; the share of equal beams."""
    short, long, shared = lengths
    with tempfile.TemporaryDirectory() as folder:
        search = Search(Path(folder), shape, items, beams)
        ways = {
            "trie": lambda number: search.by_engine(search.prompts(number, prompts, short)),
            "generate": lambda number: search.by_generate(search.prompts(number, prompts, short)),
            "trie_long": lambda number: search.by_engine(search.prompts(number, prompts, long)),
            "generate_long": lambda number: search.by_generate(search.prompts(number, prompts, long)),
            "trie_shared": lambda number: search.by_engine(search.prompts(number, prompts, long, shared)),
        }
        try:
            found = in_turns("trie", ways, rounds)
            pairs = zip(ways["trie"](0), ways["generate"](0), strict=True)
            same = np.mean([len(set(ours) & set(theirs)) / beams for ours, theirs in pairs])
        finally:
            search.engine.close()
    return found, float(same)


QUICK = {"rounds": 2}  # `generate` behind long prompts takes 17 s a round


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    timed, same = measure(
        TinyConfig(), items=ITEMS, prompts=PROMPTS, beams=BEAMS, lengths=(SHORT, LONG, SHARED), rounds=rounds
    )
    wall, cpu = timed.median("wall"), timed.median("cpu")
    count = PROMPTS * BEAMS
    ratios = {
        "trie_over_generate": round(timed.times("generate", "trie"), 3),
        "trie_over_generate_pairs": [round(float(pair), 3) for pair in timed.cpu["generate"] / timed.cpu["trie"]],
        "trie_over_generate_long": round(timed.times("generate_long", "trie_long"), 3),
        "trie_over_generate_shared": round(timed.times("generate_long", "trie_shared"), 3),
        "long_over_short": round(timed.times("trie_long", "trie"), 3),
        "shared_over_short": round(timed.times("trie_shared", "trie"), 3),
        "same_items": round(same, 4),
    }
    items = {way: round(count / seconds, 1) for way, seconds in wall.items()}
    return result("trie", ratios, wall, cpu, items_per_second=items)
