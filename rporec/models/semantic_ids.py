"""Semantic IDs: items as short codes that similar items share from the left (residual k-means over text).

After the residual quantisation of TIGER (arXiv 2305.05065), with k-means for its auto-encoder, as
LETTER and OneRec do: each level clusters what the levels before left over. Codes are tokens of their
own, `<a_7>` for code 7 of the first level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rporec.models.text_neighbours import TextVectors

DIMENSIONS = 64  # of item vectors
ROUNDS = 30  # of k-means


def item_vectors(texts: Sequence[str], seed: int) -> np.ndarray:
    """float32 [N, D]: TF-IDF of the items' texts in their D main directions (latent semantic analysis).

    D is `DIMENSIONS`, or one less than there are items or words where those are fewer; where that leaves none, the
    TF-IDF as it is.
    """
    from scipy.sparse.linalg import svds

    vectors = TextVectors.fit(texts).vectors
    size = min(DIMENSIONS, min(vectors.shape) - 1)
    if size < 1:
        return vectors.toarray().astype(np.float32)
    start = np.random.default_rng(seed).normal(size=min(vectors.shape))
    left, strength, _ = svds(vectors.astype(np.float64), size, v0=start)
    return (left * strength)[:, ::-1].astype(np.float32)  # the strongest direction first


def residual_codes(vectors: np.ndarray, levels: int, codes: int, seed: int) -> np.ndarray:
    """int64 [N, levels]: at each level the nearest of at most `codes` means of what is left of the vectors."""
    from scipy.cluster.vq import kmeans2

    residual = np.array(vectors, np.float32)
    chosen = np.empty((len(residual), levels), np.int64)
    for level in range(levels):
        distinct = len(np.unique(residual, axis=0))
        rng = np.random.default_rng(seed + level)
        means, nearest = kmeans2(residual, min(codes, distinct), iter=ROUNDS, minit="++", rng=rng)
        chosen[:, level] = nearest
        residual = residual - means[nearest]
    return chosen


def semantic_ids(codes: np.ndarray) -> list[str]:
    """`<a_7><b_0><c_31>` for each row of codes; where rows are equal one more code counts them."""
    names = ["".join(f"<{_letter(level)}_{code}>" for level, code in enumerate(row)) for row in codes.tolist()]
    shared = {name for name, count in Counter(names).items() if count > 1}
    seen = Counter[str]()
    for item, name in enumerate(names):
        if name in shared:
            names[item] = f"{name}<{_letter(codes.shape[1])}_{seen[name]}>"
            seen[name] += 1
    return names


def code_tokens(identities: Sequence[str]) -> list[str]:
    """Every code that occurs, in order of level and number."""
    codes = {code for identity in identities for code in identity.strip("<>").split("><")}
    return [f"<{code}>" for code in sorted(codes, key=lambda code: (code[0], int(code[2:])))]


def _letter(level: int) -> str:
    return chr(ord("a") + level)
