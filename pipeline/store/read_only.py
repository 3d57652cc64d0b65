"""Which statements a reader of the store may send."""

import re
from collections.abc import Callable
from typing import Final

from millstream.schemas.errors import StoreError

READING: Final = ("SELECT", "WITH", "EXPLAIN", "SHOW", "DESCRIBE", "EXISTS")
# Marks of heredocs ($tag$ … $tag$). The engine's parser searches the rest of the statement for the end of each: 30,000
# of them take it half a minute.
HEREDOC: Final = re.compile(r"\$\w*\$")
HEREDOCS: Final = 100
FORMAT_QUERY: Final = "SELECT formatQuery({query:String})"


def reading_statement(query: str, format_query: Callable[[str], str]) -> str:
    """The statement without its semicolon. Raises `StoreError` unless it is a single one that reads.

    ``readonly`` alone does not prevent writing files (``INTO OUTFILE``, ``INSERT INTO FUNCTION file(…)``), ``KILL
    QUERY``, or changing the connection's database (``USE``). ``format_query`` is the engine's own parser
    (`FORMAT_QUERY`), which takes one statement and puts each clause on a line of its own.
    """
    if len(HEREDOC.findall(query)) > HEREDOCS:
        raise StoreError(f"a query must not have more than {HEREDOCS} marks of heredocs ($tag$): use quotes")
    lines = format_query(query).split("\n")
    verb = lines[0].split(maxsplit=1)[0]
    if verb not in READING:
        raise StoreError(f"the store is readonly: it takes {', '.join(READING)}, not {verb}")
    if any(line.startswith(("INTO OUTFILE", "FORMAT ")) for line in lines):
        raise StoreError("a query must not have INTO OUTFILE or FORMAT: use `millstream export`")
    return query.strip().removesuffix(";")
