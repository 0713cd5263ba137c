"""What a reward costs: in batches against one completion at a time, and against writing what it judges.

    rporec bench reward [--json]

The real judge (RecHead with its experts, terms, measures of gaming) on the embedded data, and the real
vLLM engine with a model of about 1 M parameters on the same prompts. Neither is trained, since that does not
change what they cost; but a model that has not learnt to write would be judged on noise of full length. So the
completions are the template teacher's, which a warm model imitates, for random items, and the engine writes as
many tokens as they have. A batch is 32 groups, the most that a reward worker gets at a time; `…_at_N` is with
batches of N, as when fewer had piled up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.result import result
from benchmarks.rounds import Rounds, in_turns
from rporec.config import Config
from rporec.data import build, write_synthetic
from rporec.data.slices import rows_of
from rporec.engine.types import FIRST_VERSION, Generated
from rporec.engine.vllm import VllmEngine
from rporec.models.backbone import load_tokenizer, make_tiny
from rporec.models.experts import Experts
from rporec.models.rechead import RecHead
from rporec.recipes.rporec import RPORec
from rporec.rl.rollout_schema import Lease, rollout_batch
from rporec.run import Run
from rporec.text.prompt import ItemWriter
from rporec.text.teacher import TemplateTeacher, tokenizer_texts
from rporec.text.tokenizer import token_pieces


def untrained_run(folder: Path, config: Config) -> Run:
    """As much of a run directory as judge and engine read."""
    run = Run.create(folder, config, resume=False)
    write_synthetic(run.folder / "source", config.data.synthetic, config.seed)
    source = run.folder / "source"
    dataset = build(source / "interactions.parquet", source / "items.parquet", run.data, window=config.data.window)
    make_tiny(tokenizer_texts(ItemWriter(dataset, config.text)), config.tiny, config.seed, run.backbone)
    experts = Experts.fit(dataset, rows_of(dataset, dataset.split("train")))
    head = RecHead(dataset.catalog, config.head, window=dataset.window, experts=experts)
    head.weights = dict.fromkeys(experts.names, 1.0)
    head.text_scale.data.fill_(1.0)  # else what was written would not count
    head.save(run.head())
    return run


@dataclass(frozen=True)
class Written:
    """One group: what was leased, and its rows as they come to the judge."""

    lease: Lease
    rows: pa.RecordBatch
    tokens: int  # mean of a completion


class Writer:
    """Writes groups as a warm model would."""

    def __init__(self, recipe: RPORec) -> None:
        self.recipe, self.dataset = recipe, recipe.dataset
        self.teacher = TemplateTeacher(recipe.writer.items)
        self.tokenizer = load_tokenizer(recipe.model)
        self.rng = np.random.default_rng(0)

    def group(self, number: int) -> Written:
        sample, seed = self.recipe.draw(number)
        lease = Lease(number, sample, self.recipe.prompts([sample])[0], seed)
        history, items = self.dataset.history(sample), len(self.dataset.catalog)
        guesses = self.rng.integers(items, size=self.recipe.config.group_size)
        written = [self._completion(self.teacher.rationale(history, int(item))) for item in guesses]
        pieces = [token_pieces(self.tokenizer, one.token_ids.tolist()) for one in written]
        mean = round(np.mean([len(one.token_ids) for one in written]))
        return Written(lease, rollout_batch(lease, written, pieces), mean)

    def _completion(self, text: str) -> Generated:
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        spans = ((FIRST_VERSION, 0, len(ids)),)
        return Generated(ids, np.zeros(len(ids), np.float32), spans, "stop", text)


def measure(config: Config, *, sizes: Sequence[int], groups: int, rounds: int) -> tuple[Rounds, float]:
    """`groups` new groups each round: "batches_N" for N in `sizes`, "one_by_one", "generation".

    Second the largest difference that batching makes to a reward.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = untrained_run(Path(folder) / "run", config)
        recipe = RPORec(run, config)
        writer, judge = Writer(recipe), recipe.judge()
        judge.load()
        dealt = [[writer.group(number * groups + i) for i in range(groups)] for number in range(rounds + 1)]
        engine = VllmEngine(run.backbone, config.engine, context=recipe.context, seed=0)

        def score(number: int, size: int) -> None:
            rows = [one.rows for one in dealt[number]]
            for start in range(0, len(rows), size):
                judge.score(rows[start : start + size])

        def score_alone(number: int) -> None:
            for one in dealt[number]:
                for row in range(one.rows.num_rows):
                    judge.score([one.rows.slice(row, 1)])

        def generate(number: int) -> None:
            futures = [
                engine.submit(
                    one.lease.prompt_ids.tolist(), replace(recipe.rollout_spec(one.lease.seed), max_tokens=one.tokens)
                )
                for one in dealt[number]
            ]
            for future in futures:
                future.result()

        ways = {f"batches_{size}": lambda number, size=size: score(number, size) for size in sizes}
        try:
            found = in_turns("reward", {**ways, "one_by_one": score_alone, "generation": generate}, rounds)
        finally:
            engine.close()
        return found, _difference(judge, [one.rows for one in dealt[0]])


def _difference(judge: Any, rows: list[pa.RecordBatch]) -> float:
    batched, _ = judge.score(rows)
    alone = [judge.score([group.slice(row, 1)])[0][0] for group in rows for row in range(group.num_rows)]
    rewards = [
        np.concatenate([part.column("reward_without_entropy").to_numpy() for part in x]) for x in (batched, alone)
    ]
    return float(np.abs(rewards[0] - rewards[1]).max())


QUICK = {"rounds": 3}


def run(rounds: int = 9) -> dict[str, Any]:
    config, most = Config(), 32
    found, difference = measure(config, sizes=(most, 8, 1), groups=most, rounds=rounds)
    ratios: dict[str, float] = {}
    for size, suffix in ((most, ""), (8, "_at_8"), (1, "_at_1")):
        batches = f"batches_{size}"
        ratios[f"batched_over_one_by_one{suffix}"] = round(found.times("one_by_one", batches), 2)
        ratios[f"batched_over_one_by_one_wall{suffix}"] = round(found.times("one_by_one", batches, "wall"), 2)
        ratios[f"share_of_generation{suffix}"] = round(found.times(batches, "generation"), 4)
    ratios["max_reward_difference"] = difference
    seconds = found.median("wall"), found.median("cpu")
    return result("reward", ratios, *seconds, completions=most * config.group_size)
