"""Writing files that no crash can halve, a power loss included: a temporary sibling on the disk first, then a rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rporec.config import ConfigError

_TICK = 50_000_000  # nanoseconds, more than any file system's clock takes


@contextlib.contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path (file or folder) that takes `path`'s place when the block succeeds.

    On an exception the temporary is removed and `path` stays as it was. A folder that was there
    moves aside before it is deleted, so that a crash leaves no half of it under its own name. With `lasting`
    the rename waits until the bytes are on the disk, else a power loss could leave the name with nothing in it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)  # of a crashed process with the same number, as containers have them
    if path.exists():
        _remove(old)
    try:
        yield temporary
        if lasting:
            sync_tree(temporary)
        if path.is_dir():
            os.replace(path, old)
        os.replace(temporary, path)
        if lasting:
            sync(path.parent)
    finally:
        _remove(temporary)
        if old.exists() and not path.exists():
            os.replace(old, path)
        _remove(old)


def recover(path: Path) -> None:
    """After killed processes that replaced `path`: what was there before comes back if nothing took its place, halves go.

    Only for who alone writes it: a replacement under way would lose its half.
    """
    for old in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            _remove(old)
        else:
            os.replace(old, path)
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        _remove(half)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, lasting: bool = True) -> None:
    with replacing(path, lasting=lasting) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, default: Any = None) -> Any:
    """The file's value, or `default` when there is no such file. ConfigError when it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise ConfigError(f"{path}: damaged, not valid JSON ({error}); restore it or start a new run") from None


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of mounts that cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` for a file, or for a folder and all that is in it; not for what links lead to."""
    for one in [*path.rglob("*"), path]:
        if not one.is_symlink():
            sync(one)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line; after a line that a crash cut off, on a line of its own."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All JSON lines of a file; [] when there is none; a line that a crash cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            records.append(json.loads(line))
        except ValueError:  # torn, perhaps in the middle of a character; the last is empty
            continue
    return records


def cut_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Forget the JSON lines of `step` and later ones, which are undone; returns those that are left.

    So each step stands in the file once.
    """
    kept = [record for record in read_lines(path) if record["step"] < step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return kept


class FolderWatch:
    """Tells with one `stat` whether entries came into a folder, which need not exist yet, since it was last asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen = -1

    def changed(self) -> bool:
        try:
            now, modified = time.time_ns(), self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        same = modified == self._seen
        # The clock of a file system ticks in milliseconds: what comes within the same tick leaves no mark.
        self._seen = modified if now - modified > _TICK else -1
        return not same
