"""From an environment's arguments to its task: a run, a data set, or a small world made on the spot."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from rporec.config import Config, ConfigError, HeadConfig, SyntheticConfig
from rporec.data import SPLITS, Dataset, build, write_synthetic
from rporec.envs.task import Judge, Task
from rporec.text.prompt import ItemWriter, PromptWriter

Action = Literal["tokens", "scores"]

SMALL = SyntheticConfig(users=200, series=20, volumes=3, genres=6, studios=8, length=8)  # 60 items
UNTRAINED = Config(head=HeadConfig(fusion="paper", history="text"))


def open_task(
    data: Path | str | None = None,
    run: Path | str | None = None,
    action: Action = "tokens",
    *,
    split: Literal["train", "valid", "test"] = "train",
    exclude_history: bool | None = None,
) -> Task:
    """The task of an environment.

    data: a built data set; its tokenizer is fitted on the catalogue, its RecHead is seeded and
        untrained (it still knows an item by the words that name it).
    run: a run directory, with its data, the tokenizer of its LLM before RL and its RecHead. In "train" the
        reward is the one that RL pays, from a head that knows nothing of the RL slice's future; in
        "valid" and "test" the head itself judges.
    Neither: a small synthetic world, the same in every process. Both: ConfigError.
    action: "tokens" pays `rporec.rl.rewards` without the entropy term, which only a learner can add;
        conciseness and faithfulness need a run whose LLM can summarise. "scores" pays the NDCG of
        the ranking, without a cut.
    split: whose samples are asked.
    exclude_history: whether the user's earlier items leave the ranking (the target never does). None:
        True for scores, as in the first convention of `rporec evaluate`; for tokens `reward.mask_history`.

    Raises ConfigError or DataError for arguments that name nothing.
    """
    if action not in ("tokens", "scores"):
        raise ConfigError(f"action: {action!r} is neither 'tokens' nor 'scores'")
    if split not in SPLITS[1:]:
        raise ConfigError(f"split: {split!r} is none of {', '.join(SPLITS[1:])}")
    if data is not None and run is not None:
        raise ConfigError("data and run: give one of them; a run brings its own data")
    if run is not None:
        dataset, writer, judge = _of_run(Path(run).absolute(), action, split, exclude_history)
    else:
        dataset, writer = small_world() if data is None else _written(Dataset.load(data))
        judge = _untrained(dataset, exclude_history) if action == "tokens" else None
    return Task(dataset, split, writer, judge, exclude_history is not False)


@cache
def small_world() -> tuple[Dataset, PromptWriter]:
    """The world without arguments; it lives in memory, its folder is gone."""
    with TemporaryDirectory(prefix="rporec-") as folder:
        raw = Path(folder) / "raw"
        write_synthetic(raw, SMALL, UNTRAINED.seed)
        dataset = build(raw / "interactions.parquet", raw / "items.parquet", Path(folder) / "data")
    return _written(replace(dataset, root=None))


def _written(dataset: Dataset) -> tuple[Dataset, PromptWriter]:
    from rporec.text.teacher import tokenizer_texts
    from rporec.text.tokenizer import fit_tokenizer

    config = UNTRAINED
    tokenizer = fit_tokenizer(tokenizer_texts(ItemWriter(dataset, config.text)), config.tiny.vocabulary)
    return dataset, PromptWriter(dataset, config.text, tokenizer, True, config.tiny.context, config.reserve)


def _untrained(dataset: Dataset, exclude_history: bool | None) -> Judge:
    from rporec.models.rechead import RecHead
    from rporec.rl.judge import score_completions

    head = RecHead(dataset.catalog, UNTRAINED.head, window=dataset.window, seed=UNTRAINED.seed)
    return partial(score_completions, head, dataset, _masking(UNTRAINED, exclude_history))


def _of_run(
    folder: Path, action: Action, split: str, exclude_history: bool | None
) -> tuple[Dataset, PromptWriter, Judge | None]:
    from rporec.recipes.rporec import RPORec
    from rporec.run import Run

    run = Run.open(folder)
    run.require_head("an environment")
    recipe = RPORec(run, _masking(run.config(), exclude_history))
    if action == "scores":
        return recipe.dataset, recipe.writer, None
    judge = recipe.judge()
    head = judge.reward_head if split == "train" else judge.head
    return recipe.dataset, recipe.writer, partial(judge.score_completions, head)


def _masking(config: Config, exclude_history: bool | None) -> Config:
    if exclude_history is None:
        return config
    return config.model_copy(update={"reward": config.reward.model_copy(update={"mask_history": exclude_history})})
