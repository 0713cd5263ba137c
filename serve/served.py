"""What every deployment is given, and how it follows the version in use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rporec.config import Config
from rporec.data import Dataset
from rporec.data.added_items import GrowingCatalog
from rporec.promotion import Promoted, promoted
from rporec.run import Run

LOOK_EVERY = 0.5  # seconds between two looks at promoted.json
AGAIN = 10.0  # seconds after a version could not be taken
LOGGER = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Served:
    """A run that is served; `config` may differ from the run's own in `device` and its sections `serve` and `engine`."""

    run: Run
    config: Config

    def dataset(self) -> Dataset:
        return Dataset.load(self.run.data)

    def growing(self, dataset: Dataset) -> GrowingCatalog:
        return GrowingCatalog(dataset.catalog, self.run.added_items)

    def promoted(self) -> Promoted:
        """The version in use; the launcher sees to it that there is one."""
        found = promoted(self.run)
        assert found is not None
        return found

    async def follow(self, version: Callable[[], str], take: Callable[[Promoted], Awaitable[None]]) -> None:
        """Call `take` whenever another version than `version()` is in use, for ever.

        A version that cannot be taken leaves the one that serves in place, with a line in the log, and is tried again.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                found = self.promoted()
                if found.version != version():
                    await take(found)
                    LOGGER.info("version %s took over", found.version)
            except Exception as error:
                LOGGER.error("version %s goes on, the one in use now cannot be taken: %s", version(), error)
                await asyncio.sleep(AGAIN)


def still(following: asyncio.Task) -> None:
    """Raises RuntimeError when a task of `follow` has ended."""
    if following.done():
        raise RuntimeError("this replica no longer looks for other versions")
