"""Weights on the way from a learner to its engines: one flat buffer that Ray moves without copying.

bfloat16 has no numpy type and raw torch tensors are copied by every reader, so the buffer is bytes
and each tensor is a typed view of it.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rporec.files import replacing

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element size
_FIRST_BUFFER = 1 << 24
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_TIED_HEAD = "lm_head.weight"

Described = tuple[str, str, tuple[int, ...]]  # (name, dtype, shape) of a tensor


class WeightsError(ValueError):
    """Weights that are damaged or belong to another model; the message names the tensor."""


@dataclass(frozen=True, eq=False)
class FlatWeights:
    """`buffer` holds every tensor contiguously at a 64-byte offset, in the order of `entries`."""

    buffer: np.ndarray  # uint8 [bytes]
    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]  # (name, dtype, shape, offset in bytes)
    checksum: int

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def verify(self) -> None:
        """Raises WeightsError if the buffer is not what `flatten` wrote."""
        last = max((offset + _nbytes(dtype, shape) for _, dtype, shape, offset in self.entries), default=0)
        if last > self.nbytes:
            raise WeightsError(f"weights cut short: {self.nbytes} bytes where {last} are described; publish them again")
        if checksum(self.buffer) != self.checksum:
            raise WeightsError(f"weights damaged: checksum of {self.nbytes} bytes differs; publish them again")


def flatten(named: Iterable[tuple[str, Any]], *, dtype: str | None = None, drop_tied_head: bool = False) -> FlatWeights:
    """Copy named tensors (torch on any device, or numpy) into one buffer.

    Tensors are consumed one at a time, so a generator may gather and free a partitioned model as
    it goes. `dtype` converts floating-point tensors on the way. `drop_tied_head` leaves out
    `lm_head.weight`, which a model with tied embeddings has under its other name already.
    """
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    buffer, end = np.empty(_FIRST_BUFFER, np.uint8), 0
    for name, tensor in named:
        if drop_tied_head and name == _TIED_HEAD:
            continue
        raw, kind, shape = _as_bytes(name, tensor, dtype)
        start, end = end, end + _padded(raw.size)
        if end > buffer.size:
            # Untouched pages of np.empty cost no memory, so doubling is cheap.
            grown = np.empty(max(end, 2 * buffer.size), np.uint8)
            grown[:start] = buffer[:start]
            buffer = grown
        buffer[start : start + raw.size] = raw
        buffer[start + raw.size : end] = 0
        entries.append((name, kind, shape, start))
    buffer = buffer[:end]
    return FlatWeights(buffer, tuple(entries), checksum(buffer))


def unflatten(flat: FlatWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs that are views of the buffer: read them, never write them.

    The buffer is verified before the first pair is made (WeightsError).
    """
    import torch

    flat.verify()
    with warnings.catch_warnings():
        # Buffers from an object store are read-only, which torch cannot express.
        warnings.filterwarnings("ignore", message=".*not writable")
        whole = torch.from_numpy(flat.buffer)
    return (
        (name, whole[offset : offset + _nbytes(dtype, shape)].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, offset in flat.entries
    )


def check_fit(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises WeightsError that names the first tensor which is missing, unknown or of another shape.

    A `lm_head.weight` that is not expected is let through: tied models may publish it or not.
    """
    for name, shape in expected.items():
        if name not in shapes:
            raise WeightsError(f"{name}: missing from the new weights; publish every tensor of the model")
        if tuple(shapes[name]) != tuple(shape):
            raise WeightsError(f"{name}: shape {tuple(shapes[name])} where the model has {tuple(shape)}")
    unknown = next((name for name in shapes if name not in expected and name != _TIED_HEAD), None)
    if unknown is not None:
        raise WeightsError(f"{unknown}: the model has no such tensor")


def save_safetensors(flat: FlatWeights, path: Path) -> None:
    """Write a model file that transformers and vLLM read; atomic."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(unflatten(flat)), temporary, metadata={"format": "pt"})


def load_safetensors(folder: Path | str) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a model folder, as `VllmEngine.update_weights` takes them."""
    from safetensors.torch import load_file

    return [pair for path in sorted(Path(folder).glob("*.safetensors")) for pair in load_file(path).items()]


def expected_shapes(folder: Path | str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a model of this folder is published as; {} for a folder without safetensors files.

    A file may hold the `lm_head.weight` of a model that ties it to its embeddings; no learner publishes that.
    """
    from transformers import AutoConfig

    shapes = checkpoint_shapes(folder)
    if _TIED_HEAD in shapes and AutoConfig.from_pretrained(str(folder)).tie_word_embeddings:
        del shapes[_TIED_HEAD]
    return shapes


def checkpoint_shapes(folder: Path | str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a folder's safetensors files, read from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def checksum(buffer: np.ndarray) -> int:
    """CRC-32 of the row and column sums of the bytes, seen as rows of 4096 64-bit words.

    Any changed word changes both its sums, and a moved one at least one of them; several times
    faster than a CRC of the bytes themselves.
    """
    width = 4096
    words = buffer[: buffer.size // 8 * 8].view(np.uint64)
    rows = words[: words.size // width * width].reshape(-1, width)
    crc = zlib.crc32(rows.sum(0))
    crc = zlib.crc32(rows.sum(1), crc)
    return zlib.crc32(buffer[rows.nbytes :].data, crc)


def _as_bytes(name: str, tensor: Any, dtype: str | None) -> tuple[np.ndarray, str, tuple[int, ...]]:
    if isinstance(tensor, np.ndarray):
        array = tensor if dtype is None else _cast_numpy(name, tensor, dtype)
        kind, shape = array.dtype.name, array.shape
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    else:
        import torch

        tensor = tensor.detach()
        if dtype is not None:
            tensor = tensor.to(getattr(torch, dtype))
        kind, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        raw = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    if kind not in _ITEM_SIZE:
        raise WeightsError(f"{name}: dtype {kind}; weights travel as {', '.join(_ITEM_SIZE)}")
    return raw, kind, shape


def _cast_numpy(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        raise WeightsError(f"{name}: numpy has no bfloat16; pass a torch tensor")
    return array.astype(dtype, copy=False)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _ITEM_SIZE[dtype] * int(np.prod(shape, dtype=np.int64))
