"""The training of RecHeads: the learner group alone, one head after the other."""

from __future__ import annotations

from typing import Any

from rporec.files import append_line
from rporec.run import Run


def head_loop(spec: dict[str, Any]) -> None:
    """On what the LLM of `stage` wrote for `slices`, with its text or on history alone, data-parallel."""
    import torch.distributed as dist

    from rporec.recipes import load_recipe
    from rporec.recipes.head_stage import CountedExperts, head_data, history_data, train_and_save_head

    run: Run = spec["run"]
    run.require_here()
    recipe: Any = load_recipe(run, spec["config"])
    rank, world = dist.get_rank(), dist.get_world_size()
    texts = "text" in spec["heads"].values()
    data = head_data(recipe, run, spec["stage"], spec["slices"]) if texts else history_data(recipe)

    def progress(record: dict[str, Any]) -> None:
        if rank == 0:
            append_line(spec["log"], record)

    experts = CountedExperts(recipe)
    for name, reads in spec["heads"].items():
        inputs = data if reads == "text" else data.blank()
        train_and_save_head(name, recipe, inputs, run, experts, rank=rank, world=world, progress=progress)
