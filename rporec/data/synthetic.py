"""The embedded data set: a world of series drawn from a seed, and users who walk through it by `rporec.data.world`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rporec.config import SyntheticConfig
from rporec.data.errors import DataError
from rporec.data.folder import check_free, new_folder
from rporec.data.world import Habits, Walk, World

START = 1_577_836_800  # 2020-01-01 UTC, seconds
SPAN = 2 * 365 * 86_400  # seconds from the first interaction to the last
BEGIN = (-0.3, 0.3)  # of the span: first volumes come out, some before the first interaction
LATEST = 0.97  # of the span; no volume comes out later, so that every item has readers
STEP = 0.035  # of the span: mean time between two items of a user
MAX_LENGTH = 4  # times the mean length
GENRES = [
    "mystery",
    "romance",
    "fantasy",
    "horror",
    "comedy",
    "history",
    "adventure",
    "western",
    "thriller",
    "satire",
    "travel",
    "sports",
    "music",
    "crime",
    "war",
    "science",
    "espionage",
    "folklore",
    "cooking",
    "nature",
]
ONSETS = [*"bdfghjklmnprstvwz", "br", "dr", "gr", "kr", "pl", "st", "tr"]
VOWELS = [*"aeiou", "ai", "ou"]
CODAS = [*"klmnrstx", "nd", "rk"]


def generate(config: SyntheticConfig, seed: int) -> tuple[pa.Table, pa.Table, World]:
    """Items, interactions and the world they come from; the same for the same config and seed.

    Items: item_id, title ("Zarnak 3"), genre, studio, released (seconds). Interactions: user_id, item_id, timestamp.
    """
    if config.genres > len(GENRES):
        raise DataError(f"synthetic.genres {config.genres}: there are {len(GENRES)} genres; use fewer")
    rng = np.random.default_rng(seed)
    names = _names(config.series + config.studios, rng)
    world = _world(config, rng)
    order = rng.permutation(len(world))  # the catalogue's order and ids tell nothing
    for place, item in enumerate(order):
        world.item_ids[item] = f"i{place:05d}"
    series = world.series[order]
    items = pa.table(
        {
            "item_id": [world.item_ids[i] for i in order],
            "title": [f"{names[s]} {v}" for s, v in zip(series, world.volume[order], strict=True)],
            "genre": [GENRES[g] for g in world.genre[series]],
            "studio": [names[config.series + s] for s in world.studio[series]],
            "released": world.released[order],
        }
    )
    return items, _interactions(config, world, rng), world


def write_synthetic(out: Path | str, config: SyntheticConfig, seed: int) -> None:
    """Write items.parquet, interactions.parquet and world.json into the folder `out`, for `build` to read.

    Raises DataError when `out` exists and is not empty.
    """
    out = Path(out)
    check_free(out)
    items, interactions, world = generate(config, seed)
    with new_folder(out) as partial:
        pq.write_table(items, partial / "items.parquet")
        pq.write_table(interactions, partial / "interactions.parquet")
        world.save(partial / "world.json")


def _world(config: SyntheticConfig, rng: np.random.Generator) -> World:
    count, volumes = config.series, config.volumes
    genre = rng.permutation(np.arange(count) % config.genres)
    # Every series has begun while a model still warms up; its later volumes come out until the end. So the
    # items that training lacks are new volumes of known series, and their text follows from the history.
    first = rng.uniform(*BEGIN, count)
    gap = rng.uniform(0.3, 1.0, (count, volumes - 1))
    gap *= (rng.uniform(0.5, LATEST - BEGIN[1], count) / gap.sum(axis=1))[:, None]
    passed = np.concatenate([np.zeros((count, 1)), np.cumsum(gap, axis=1)], axis=1)
    released = START + (SPAN * (first[:, None] + passed)).astype(np.int64)
    affinity = rng.dirichlet(np.full(config.genres, 0.3), config.genres) + 1e-3
    return World(
        habits=Habits(),
        item_ids=[""] * (count * volumes),
        series=np.repeat(np.arange(count), volumes),
        volume=np.tile(np.arange(1, volumes + 1), count),
        released=released.ravel(),
        genre=genre,
        studio=rng.integers(config.studios, size=count),
        appeal=rng.lognormal(0.0, 1.2, count),
        affinity=affinity,
    )


def _interactions(config: SyntheticConfig, world: World, rng: np.random.Generator) -> pa.Table:
    prior = world.cycles[1]
    limit = min(MAX_LENGTH * config.length, len(world) - 1)
    users, items, times = [], [], []
    for user in range(config.users):
        length = min(2 + int(rng.geometric(1 / max(1, config.length - 2))), limit)
        steps = rng.exponential(STEP * SPAN, length) + 60
        start = START + rng.uniform(0, 1) * max(0.0, SPAN - steps.sum())
        cycle = int(rng.choice(len(prior), p=prior))
        walk = Walk(world)
        moments = np.cumsum(steps * min(1.0, SPAN / steps.sum())) + start - steps[0]
        for moment in np.maximum(moments, START).astype(np.int64).tolist():
            item = walk.draw(cycle, moment, rng)
            walk.advance(item)
            users.append(f"u{user:05d}")
            items.append(world.item_ids[item])
            times.append(moment)
    return pa.table({"user_id": users, "item_id": items, "timestamp": times})


def _names(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct pronounceable words of two syllables, three where two do not suffice."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = 2 if len(names) < 2000 else 3
        parts = [f"{rng.choice(ONSETS)}{rng.choice(VOWELS)}" for _ in range(syllables)]
        names[("".join(parts) + str(rng.choice(CODAS))).capitalize()] = None
    return list(names)
