"""What is told of a death."""

from __future__ import annotations

import pytest

from actors.cluster import probable_cause


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("Worker exit type: SYSTEM_ERROR … connection error code 2. End of file.", "killed from outside"),
        ("The actor died because its node has died. Node Id: 12ab", "its node is gone"),
        ("no answer within 5 s (reward.timeout)", "it hangs"),
        ("rollout worker died: OutOfMemoryError; probable cause: no memory left; lower …", ""),
        ("ValueError: no such thing", "a fault in its code"),
    ],
)
def test_last_words_tell_the_cause(words: str, cause: str) -> None:
    assert probable_cause(words).startswith(cause)
    assert bool(probable_cause(words)) == bool(cause)
