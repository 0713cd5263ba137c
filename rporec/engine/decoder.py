"""From token ids back to text, once per completion, and the stop tokens that engines watch for."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path


class Decoder:
    """A model folder's tokenizer, as far as generation needs it. Tags are kept, end-of-sequence is not."""

    def __init__(self, model_dir: Path | str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
        self.eos_ids = _eos_ids(Path(model_dir), self.tokenizer.eos_token_id)
        # Every request asks for the same few stops, and encoding them costs more than the rest of taking it in.
        self._encoded = functools.cache(functools.partial(self.tokenizer.encode, add_special_tokens=False))

    def text(self, token_ids: Sequence[int]) -> str:
        ids = [int(token) for token in token_ids]
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def split_stops(self, stop: Sequence[str]) -> tuple[list[int], list[str]]:
        """(token ids that end a completion, stop strings that are more than one token).

        A stop that is one token of the vocabulary is watched for by its id, which spares the
        engine detokenising every step; the same letters spelt with other tokens then do not stop.
        """
        ids, strings = sorted(self.eos_ids), []
        for text in stop:
            encoded = self._encoded(text)
            if len(encoded) == 1:
                ids.append(encoded[0])
            else:
                strings.append(text)
        return ids, strings


def _eos_ids(model_dir: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Chat models end on more tokens than the tokenizer's one; the generation config lists them."""
    found: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
