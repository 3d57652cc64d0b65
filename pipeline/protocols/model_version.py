"""How a model server says which weights made an answer.

The header `HEADER` of an answer names the version, or `MIXED` if the weights changed meanwhile; then the header
`RANGES` says which version made which tokens (`schemas.wire.versions`), if the server knows. In a stream the header is
the version at the beginning. A comment ``: x-model-version=VERSION`` stands where it changes, and before ``[DONE]``;
a comment with `RANGES` before ``[DONE]`` counts more than the others.
"""

from typing import Final

from millstream.schemas.wire.versions import MIXED, Versions, to_text

HEADER: Final = "x-model-version"
RANGES: Final = "x-model-versions"


def comment(version: str | None, versions: Versions = ()) -> bytes:
    """What a stream says at its end, each as an event of its own. ``versions``: of an answer with several."""
    ranges = f": {RANGES}={to_text(versions)}\n\n" if len(versions) > 1 else ""
    return f"{ranges}: {HEADER}={version}\n\n".encode()


def headers(version: str | None, versions: Versions = ()) -> dict[str, str]:
    """Of a whole answer."""
    found = {HEADER: version} if version is not None else {}
    return found | ({RANGES: to_text(versions)} if len(versions) > 1 else {})


def in_comment(comment: bytes) -> tuple[str, str] | None:
    """`HEADER` or `RANGES`, and what the text of a comment says of it; None if it says something else."""
    name, _, value = comment.decode("utf-8", "replace").partition("=")
    return (name, value) if name in (HEADER, RANGES) else None


def of_answer(start: str | None, end: str | None) -> str | None:
    """The version of an answer whose server named the one at its start, at its end, or both."""
    if start and end and start != end:
        return MIXED
    return start or end or None


def of_tokens(versions: Versions) -> str | None:
    """The version of an answer whose tokens these have made."""
    names = {version for _, version in versions}
    return names.pop() if len(names) == 1 else MIXED if names else None
