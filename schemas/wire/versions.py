"""Which weights made which tokens of an answer that spans a weight update. Pure.

As text it is JSON, ``[[0, "run.0.3"], [17, "run.0.4"]]``: the tokens from index 0 are of ``run.0.3``, those from 17 to
the end of ``run.0.4``. So it is in the model server's answer, in the attributes of a span and in a triplet.
"""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

MIXED: Final = "mixed"  # stands for the version of an answer that several have made

Versions = tuple[tuple[int, str], ...]
"""(index of the first token, version), in the order of the tokens. The first index is 0."""


def to_text(versions: Versions) -> str:
    """In ASCII, without spaces."""
    return json.dumps(versions, separators=(",", ":"))


def from_text(text: str, tokens: int) -> Versions:
    """The versions of an answer of so many tokens. Raises ValueError if some of them would have no version, or two."""
    try:
        found = tuple([(first, version) for first, version in json.loads(text)])
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"versions of tokens must be JSON as [[0, VERSION], …], not {text[:100]!r}") from error
    if not all(type(first) is int and isinstance(version, str) for first, version in found) or not found:
        raise ValueError(f"versions of tokens must be JSON as [[0, VERSION], …], not {text[:100]!r}")
    firsts = [first for first, _ in found]
    if firsts[0] != 0 or firsts[-1] >= tokens or any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(
            f"versions of tokens must begin at 0, rise, and stay below {tokens} tokens, not {text[:100]!r}"
        )
    return found


def joined(noted: Iterable[tuple[int, str]]) -> Versions:
    """What was noted as tokens came. Of two versions at the same index the later one counts; a version that is noted
    again goes on."""
    found: list[tuple[int, str]] = []
    for first, version in noted:
        if found and found[-1][0] == first:
            found.pop()
        if not found or found[-1][1] != version:
            found.append((first, version))
    return tuple(found)
