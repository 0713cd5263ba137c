"""The embedded world's laws, and therefore the true distribution of the next item: the ceiling of every method.

A user reads series, volume by volume, in the genres of a private *cycle* of two or three genres:

1. With probability `noise`, any released item not read yet.
2. Else the user leaves the current genre with probability `leave_tired` when the last `fatigue` items or more were of
   it, with `leave_fresh` before that, and goes to the genre that follows it in the cycle. From a genre outside the
   cycle (a noisy item led there) the user leaves with `leave_outside`, back to the latest genre of the cycle.
3. Staying: the next volume of the current series if it is released, with probability `follow`; else like entering.
4. Entering a genre: with probability `resume` the next volume of the series of that genre read last among those that
   go on; else the first volume of a series not begun, drawn by `appeal`, `fresh` to the power of its rank by newness,
   and `studio` times as likely when its studio is that of the item before. Where there is nothing to go on with or
   nothing new, the other; where there is neither, any unread item of the genre; then any at all.

So facts from the last item alone do not suffice: how long the run in the genre is, which genre followed it before and
where the user stopped there all matter, and all of them stand in the history. Volumes come out over time: some of the
items to predict did not exist when training ended, but their titles follow from the history.

Only the cycle is hidden; its posterior given the history is exact (there are few cycles), and so is the ceiling.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rporec.data.errors import DataError
from rporec.data.samples import Dataset


@dataclass(frozen=True)
class Habits:
    """The probabilities of the laws above, the same for all users."""

    noise: float = 0.12
    fatigue: int = 3  # items of one genre in a row that tire
    leave_tired: float = 0.93
    leave_fresh: float = 0.08
    leave_outside: float = 0.9
    follow: float = 0.88
    resume: float = 0.7
    fresh: float = 0.5
    studio: float = 4.0


@dataclass(frozen=True, eq=False)
class World:
    """Series, volumes and habits. Items are numbered 0..N-1 here; `item_ids` names them in a data set."""

    habits: Habits
    item_ids: list[str]
    series: np.ndarray  # int64 [N] series of an item
    volume: np.ndarray  # int64 [N] from 1
    released: np.ndarray  # int64 [N] seconds
    genre: np.ndarray  # int64 [S] genre of a series
    studio: np.ndarray  # int64 [S]
    appeal: np.ndarray  # float64 [S]
    affinity: np.ndarray  # float64 [G, G] how likely one genre follows another in a cycle

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def volumes(self) -> list[np.ndarray]:
        """Items of each series by volume."""
        return [np.flatnonzero(self.series == s) for s in range(len(self.genre))]  # items are numbered in that order

    @cached_property
    def item_genre(self) -> np.ndarray:
        """int64 [N] genre of an item."""
        return self.genre[self.series]

    @cached_property
    def cycles(self) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """Every cycle of two or three genres (its smallest genre first) and its prior probability."""
        genres = range(len(self.affinity))
        cycles = [c for n in (2, 3) for c in itertools.permutations(genres, n) if c[0] == min(c)]
        weight = [np.prod([self.affinity[a, b] for a, b in _steps(c)]) ** (1 / len(c)) for c in cycles]
        prior = np.array(weight) ** 3  # users' cycles are mostly those of kindred genres
        return cycles, prior / prior.sum()

    @cached_property
    def successor(self) -> np.ndarray:
        """int64 [cycles, G]: the genre that follows, -1 for a genre outside the cycle."""
        successor = np.full((len(self.cycles[0]), len(self.affinity)), -1)
        for row, cycle in enumerate(self.cycles[0]):
            for a, b in _steps(cycle):
                successor[row, a] = b
        return successor

    def oracle_scores(self, dataset: Dataset, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [len(samples), len(dataset.catalog)]: `Walk.distribution` after all that each user took before."""
        try:
            here = np.array([self._index[item_id] for item_id in dataset.catalog.ids])
        except KeyError as error:
            raise DataError(
                f"item {error.args[0]!r} is not of this world; rebuild the data set from its source"
            ) from None
        scores = np.empty((len(samples), len(here)), np.float32)
        samples = np.asarray(samples)
        rows = dataset.sample_row[samples]
        walk, user, done = Walk(self), -1, 0
        for place in np.lexsort((rows, dataset.sample_user[samples])):  # each user's history is walked once
            row, owner = rows[place], dataset.sample_user[samples[place]]
            if owner != user:
                walk, user, done = Walk(self), owner, dataset.offsets[owner]
            for before in range(done, row):
                walk.observe(int(here[dataset.items[before]]), int(dataset.timestamps[before]))
            done = row
            scores[place] = walk.distribution(int(dataset.timestamps[row]))[here]
        return scores

    @cached_property
    def _index(self) -> dict[str, int]:
        return {item_id: item for item, item_id in enumerate(self.item_ids)}

    def save(self, path: Path | str) -> None:
        """Write one JSON file."""
        fields = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        fields["habits"] = asdict(self.habits)
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        Path(path).write_text(json.dumps(plain) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> World:
        """Read world.json, or the one in a folder (source or built data set). Raises DataError when there is none."""
        path = Path(path)
        path = path / "world.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"{path}: no such file; only synthetic data have a world")
        try:
            plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            arrays = {n: np.array(v) for n, v in plain.items() if n not in ("habits", "item_ids")}
            return cls(habits=Habits(**plain["habits"]), item_ids=plain["item_ids"], **arrays)
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not a world; write the synthetic data again") from None


class Walk:
    """One user's way so far: what was read, and what that tells about the cycle."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.read = np.zeros(len(world), bool)
        self.reached: dict[int, int] = {}  # series -> highest volume read, the one touched last at the end
        self.last = -1
        self.run = 0  # items in a row of the last one's genre
        self.latest = np.full(len(world.affinity), -1)  # step at which a genre was read last
        self.step = 0
        self.posterior = world.cycles[1].copy()

    def observe(self, item: int, time: int) -> None:
        """The user took `item` at `time`."""
        world = self.world
        genre = int(world.item_genre[item])
        stay, leave = self._stay_and_leave()
        within = self._stay(time)[item] if self.last >= 0 and genre == world.item_genre[self.last] else 0.0
        enter = self.enter(genre, time)[item]
        noise = world.habits.noise * self.anything(time)[item]
        self.posterior *= noise + (1 - world.habits.noise) * (stay * within + leave[:, genre] * enter)
        self.posterior /= self.posterior.sum()
        self.advance(item)

    def advance(self, item: int) -> None:
        """Like `observe`, without learning about the cycle."""
        series, genre = int(self.world.series[item]), int(self.world.item_genre[item])
        self.run = self.run + 1 if self.last >= 0 and self.world.item_genre[self.last] == genre else 1
        self.reached[series] = max(self.reached.pop(series, 0), int(self.world.volume[item]))
        self.read[item] = True
        self.latest[genre] = self.step
        self.step += 1
        self.last = item

    def distribution(self, time: int) -> np.ndarray:
        """float64 [N] over the next item, the cycle being uncertain."""
        world = self.world
        stay, leave = self._stay_and_leave()
        total = np.zeros(len(world))
        if (weight := float(self.posterior @ stay)) > 0:
            total += weight * self._stay(time)
        for genre, weight in enumerate(self.posterior @ leave):
            if weight > 1e-12:
                total += weight * self.enter(genre, time)
        return world.habits.noise * self.anything(time) + (1 - world.habits.noise) * total

    def draw(self, cycle: int, time: int, rng: np.random.Generator) -> int:
        """The next item of a user whose cycle is known."""
        habits = self.world.habits
        if rng.random() < habits.noise:
            return _pick(self.anything(time), rng)
        stay, leave = self._stay_and_leave(cycle)
        if rng.random() < stay[0]:
            return _pick(self._stay(time), rng)
        genre = _pick(leave[0] / leave[0].sum(), rng)
        return _pick(self.enter(genre, time), rng)

    def _stay_and_leave(self, cycle: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Per cycle: the probability to stay, [C], and to leave for each genre, [C, G]; noise apart."""
        world, habits = self.world, self.world.habits
        successor = world.successor if cycle is None else world.successor[cycle : cycle + 1]
        inside = successor >= 0
        if self.last < 0:
            return np.zeros(len(successor)), inside / inside.sum(1, keepdims=True)
        here = int(world.item_genre[self.last])
        tired = habits.leave_tired if self.run >= habits.fatigue else habits.leave_fresh
        away = np.where(inside[:, here], tired, habits.leave_outside)
        # Outside the cycle, back to its latest genre; argmax takes its smallest one if none was read yet.
        back = np.argmax(np.where(inside, self.latest, -2), axis=1)
        goal = np.where(inside[:, here], successor[:, here], back)
        leave = np.zeros(successor.shape)
        leave[np.arange(len(goal)), goal] = away
        return 1 - away, leave

    def anything(self, time: int) -> np.ndarray:
        """float64 [N] uniform over the released items not read yet."""
        open_items = (self.world.released <= time) & ~self.read
        if not open_items.any():
            open_items = ~self.read if not self.read.all() else np.ones(len(self.world), bool)
        return open_items / open_items.sum()

    def _stay(self, time: int) -> np.ndarray:
        series = int(self.world.series[self.last])
        following = self._next_volume(series, time)
        other = self.enter(int(self.world.genre[series]), time, besides=series)
        if following is None:
            return other
        chance = self.world.habits.follow * _one(following, len(self.world))
        return chance + (1 - self.world.habits.follow) * other

    def enter(self, genre: int, time: int, besides: int = -1) -> np.ndarray:
        """float64 [N] over what a user takes who turns to `genre`, `besides` being a series left out."""
        world, habits = self.world, self.world.habits
        resumed = None
        for series in reversed(self.reached):
            if world.genre[series] == genre and series != besides:
                resumed = self._next_volume(series, time)
                if resumed is not None:
                    break
        new = [
            (int(world.released[world.volumes[s][0]]), s)
            for s in np.flatnonzero(world.genre == genre).tolist()
            if s not in self.reached and world.released[world.volumes[s][0]] <= time
        ]
        begun = np.zeros(len(world))
        if new:
            new.sort(reverse=True)
            studio = world.studio[world.series[self.last]] if self.last >= 0 else -1
            for rank, (_, s) in enumerate(new):
                liked = habits.studio if world.studio[s] == studio else 1.0
                begun[world.volumes[s][0]] = world.appeal[s] * liked * habits.fresh**rank
            begun /= begun.sum()
        if resumed is not None:
            gone_on = _one(resumed, len(world))
            return habits.resume * gone_on + (1 - habits.resume) * begun if new else gone_on
        if new:
            return begun
        left = (world.item_genre == genre) & (world.released <= time) & ~self.read
        return left / left.sum() if left.any() else self.anything(time)

    def _next_volume(self, series: int, time: int) -> int | None:
        """The item after the highest volume read, if it is out."""
        reached, items = self.reached[series], self.world.volumes[series]
        if reached < len(items) and self.world.released[items[reached]] <= time:
            return int(items[reached])
        return None


def _steps(cycle: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(a, cycle[(place + 1) % len(cycle)]) for place, a in enumerate(cycle)]


def _one(item: int, count: int) -> np.ndarray:
    chance = np.zeros(count)
    chance[item] = 1.0
    return chance


def _pick(chance: np.ndarray, rng: np.random.Generator) -> int:
    return int(np.searchsorted(np.cumsum(chance), rng.random() * chance.sum(), side="right").clip(max=len(chance) - 1))
