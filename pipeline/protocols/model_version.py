"""How a model server says which weights made an answer.

The header of an answer names the version, or `MIXED` if the weights changed meanwhile. In a stream the header is the
version at the beginning, and a comment ``: x-model-version=VERSION`` before ``[DONE]`` that at the end.
"""

from typing import Final

HEADER: Final = "x-model-version"
MIXED: Final = "mixed"


def comment(version: str | None) -> bytes:
    """The comment as an event of its own."""
    return f": {HEADER}={version}\n\n".encode()


def in_comment(comment: bytes) -> str | None:
    """The version in the text of a comment; None if it says something else."""
    name, _, version = comment.decode("utf-8", "replace").partition("=")
    return version if name == HEADER else None


def of_answer(start: str | None, end: str | None) -> str | None:
    """The version of an answer whose server named the one at its start, at its end, or both."""
    if start and end and start != end:
        return MIXED
    return start or end or None
