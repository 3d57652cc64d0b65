"""Which statements a reader of the store may send."""

from collections.abc import Callable
from typing import Final

from millstream.schemas.errors import StoreError

READING: Final = ("SELECT", "WITH", "EXPLAIN", "SHOW", "DESCRIBE", "EXISTS")
FORMAT_QUERY: Final = "SELECT formatQuery({query:String})"


def reading_statement(query: str, format_query: Callable[[str], str]) -> str:
    """The statement without its semicolon. Raises `StoreError` unless it is a single one that reads.

    ``readonly`` alone does not prevent writing files (``INTO OUTFILE``, ``INSERT INTO FUNCTION file(…)``), ``KILL
    QUERY``, or changing the connection's database (``USE``). ``format_query`` is the engine's own parser
    (`FORMAT_QUERY`), which takes one statement and puts each clause on a line of its own.
    """
    lines = format_query(query).split("\n")
    verb = lines[0].split(maxsplit=1)[0]
    if verb not in READING:
        raise StoreError(f"the store is readonly: it takes {', '.join(READING)}, not {verb}")
    if any(line.startswith(("INTO OUTFILE", "FORMAT ")) for line in lines):
        raise StoreError("a query must not have INTO OUTFILE or FORMAT: use `millstream export`")
    return query.strip().removesuffix(";")
