"""The tiny model's tokenizer, and the text of single tokens of any tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rporec.text.completion import TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def fit_tokenizer(texts: Iterable[str], vocabulary: int, tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` tokens (at least 262: bytes, tags, pad and eos; more with `tokens`).

    Words keep their leading blank and numbers stay whole; merges go by frequency in `texts`, so a
    word that is frequent there becomes one token, and with room left every word does. Any text
    encodes and decodes to itself. The four tags are single tokens, not special ones, because
    special tokens vanish when completions are decoded; so are further `tokens`. The same texts, in any order, give the same
    tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    whole = [*TAGS, *tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(whole),
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


# tokenizer -> text of each token by itself, as far as it was asked for: decoding one costs as much as many.
_ALONE: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]] = WeakKeyDictionary()


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Text of every token; the pieces rejoin to the decoded text.

    Tokens that hold only the first bytes of a character give "", the one that completes it gives it.
    """
    ids = [int(token) for token in ids]
    if not ids:
        return []
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    known = _ALONE.setdefault(tokenizer, {})
    if new := {token for token in ids if token not in known}:
        known.update(
            zip(new, tokenizer.batch_decode([[token] for token in new], skip_special_tokens=True), strict=True)
        )
    pieces = [known[token] for token in ids]
    if "".join(pieces) == whole:
        return pieces
    # Characters cut by tokens, or a decoder that looks at neighbours: let growing prefixes decide.
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        prefix = whole if end == len(ids) else tokenizer.decode(ids[:end], skip_special_tokens=True)
        if len(prefix) < len(done) or not whole.startswith(prefix):
            prefix = done
        pieces.append(prefix[len(done) :])
        done = prefix
    return pieces
