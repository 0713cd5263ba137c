"""From raw files to samples: the catalogue of items, the interactions, the split, and an embedded world to try it on.

`build` makes a data set, `Dataset.load` opens it. Nothing here imports torch, vLLM or Ray.
"""

from rporec.data.catalog import Catalog
from rporec.data.download import download
from rporec.data.errors import DataError
from rporec.data.interactions import build
from rporec.data.samples import SPLITS, Dataset, is_built
from rporec.data.sources import find_sources
from rporec.data.synthetic import generate, write_synthetic
from rporec.data.world import World

__all__ = [
    "SPLITS",
    "Catalog",
    "DataError",
    "Dataset",
    "World",
    "build",
    "download",
    "find_sources",
    "generate",
    "is_built",
    "write_synthetic",
]
