"""Where published weights live until no engine or checkpoint needs them.

The store puts the weights into Ray's object store itself and so owns them: a learner that dies takes
no version along, and an engine that joins late finds the newest.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import ray

from rporec.engine.types import Version
from rporec.engine.weights import FlatWeights, save_safetensors
from rporec.files import replacing

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt)(\.index\.json)?$")
KEPT = 2  # versions: the newest, and the one that an engine may still be reading


@ray.remote(num_cpus=0)
class WeightStore:
    """Holds references to the newest versions and to pinned ones; the rest are released."""

    def __init__(self) -> None:
        self._held: dict[Version, ray.ObjectRef] = {}
        self._pins: dict[Version, int] = {}

    async def put(self, version: Version, flat: FlatWeights) -> None:
        """Take a version.

        Raises WeightsError for damaged weights, ValueError for a version that is older than the
        newest: it comes from an undone attempt.
        """
        newest = await self.newest()
        if newest is not None and version < newest:
            raise ValueError(f"weights {version} come after {newest}: a late publication of an undone attempt")
        flat.verify()
        self._held[version] = ray.put(flat)
        self._release()

    async def newest(self) -> Version | None:
        return max(self._held, default=None)

    async def versions(self) -> list[Version]:
        return sorted(self._held)

    async def get(self, version: Version) -> ray.ObjectRef:
        """The reference of a version, to be passed on as an argument; KeyError if it is not held."""
        if version not in self._held:
            raise KeyError(
                f"weights {version} are not held; held are {', '.join(map(str, sorted(self._held))) or 'none'}"
            )
        return self._held[version]

    async def pin(self, version: Version) -> None:
        """Keep a version until as many `unpin` calls; KeyError if it is not held."""
        await self.get(version)
        self._pins[version] = self._pins.get(version, 0) + 1

    async def unpin(self, version: Version) -> None:
        self._pins[version] = self._pins.get(version, 0) - 1
        if self._pins[version] <= 0:
            del self._pins[version]
        self._release()

    async def save(self, version: Version, folder: str, like: str) -> None:
        """Write a version as a model folder that replaces `folder`, whole or not at all.

        Config and tokenizer are copied from the model folder `like`.
        """
        flat = await (await self.get(version))
        await asyncio.to_thread(_save, flat, Path(folder), Path(like))

    def _release(self) -> None:
        kept = set(sorted(self._held)[-KEPT:]) | set(self._pins)
        self._held = {version: ref for version, ref in self._held.items() if version in kept}


def _save(flat: FlatWeights, folder: Path, like: Path) -> None:
    with replacing(folder) as temporary:
        temporary.mkdir()
        for path in like.iterdir():
            if path.is_file() and not _WEIGHTS.search(path.name):
                shutil.copy(path, temporary)
        save_safetensors(flat, temporary / "model.safetensors")
