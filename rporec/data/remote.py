"""Data that lies on shared storage: a folder under a URL of any file system that fsspec knows (s3://, gs://, …)."""

from __future__ import annotations

import re
from pathlib import Path

from rporec.data.errors import DataError
from rporec.data.folder import Progress, new_folder

PIECE = 1 << 22  # bytes


def is_url(path: str) -> bool:
    return "://" in path


def fetch(url: str, out: Path, progress: Progress) -> None:
    """Copy every file under `url` into the new folder `out`, which appears whole or not at all.

    Credentials are those of the environment, as the file system's own client finds them. progress: in bytes.
    Raises DataError when nothing is there or it may not be read.
    """
    import fsspec

    shown = _without_query(url)
    try:
        system, root = fsspec.url_to_fs(url)
        root = root.rstrip("/")
        files = {name: info["size"] or 0 for name, info in system.find(root, detail=True).items()}
        if not files:
            raise DataError(f"{shown}: nothing there; it should be a folder with interactions.* and items.*")
        if root in files:
            raise DataError(f"{shown}: a file; give the folder that holds interactions.* and items.*")
        done, total = 0, sum(files.values())
        with new_folder(out) as folder:
            for name in files:
                target = folder / name.removeprefix(root).lstrip("/")
                if not target.resolve().is_relative_to(folder.resolve()):  # names are what a server lists
                    raise DataError(
                        f"{shown}: lists {_without_query(name)!r}, which is outside of it; nothing was kept"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                with system.open(name, "rb") as source, target.open("wb") as sink:
                    while piece := source.read(PIECE):
                        sink.write(piece)
                        done += len(piece)
                        progress("fetch", done, total)
    except DataError:
        raise
    except Exception as error:  # each storage has exceptions of its own for credentials, networks and names
        raise DataError(f"{shown}: cannot be read ({_without_query(str(error)) or type(error).__name__})") from None


def _without_query(text: str) -> str:
    """A URL, or a message that tells of some, without what may sign it."""
    return re.sub(r"\?[^\s'\")]+", "", text)
