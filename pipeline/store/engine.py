"""Statements as ClickHouse's HTTP interface takes them, over the embedded engine: one connection for each."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

import chdb

from millstream.pipeline.store.clickhouse import open_embedded

DEFAULT_FORMAT: Final = "TabSeparated"
QUOTE: Final = "'"
# The engine writes header and footer around each piece of a streamed answer; these formats have none.
STREAMED: Final = {"Native", "RowBinary", "TabSeparated", "TSV", "CSV", "JSONEachRow"}
BUFFER: Final = 1 << 20  # bytes of an answer before its status is sent, as ClickHouse does: until then it can fail
HEAD: Final = 64 << 10  # bytes in which an insert has to name the format of its rows

# ClickHouse's numbers of errors
NOT_IMPLEMENTED: Final = 48
SYNTAX_ERROR: Final = 62
UNKNOWN_SETTING: Final = 115
STD_EXCEPTION: Final = 1001

QUOTED = re.compile(
    rb"""'[^'\\]*(?:\\.[^'\\]*)*'?|"[^"\\]*(?:\\.[^"\\]*)*"?|`[^`\\]*(?:\\.[^`\\]*)*`?"""
    rb"""|\$(\w*)\$.*?\$\1\$|--[^\n]*|\#[ !][^\n]*|/\*.*?(?:\*/|\Z)""",
    re.DOTALL,
)
# Table and columns; settings and format; the rows begin behind that.
ROWS_FOLLOW = re.compile(
    rb"(\s*INSERT\s.*?)(\s(?:SETTINGS\s.*?\s)?FORMAT\s+\w+)[^\S\n]*(?:\n|\Z)", re.IGNORECASE | re.DOTALL
)
STREAMABLE = re.compile(rb"\s*(SELECT|WITH)\b", re.IGNORECASE)
ANSWERS = re.compile(rb"\s*(SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK)\b|\s*\(", re.IGNORECASE)
FORMAT = re.compile(rb"\sFORMAT\s+(\w+)\s*(?:\sSETTINGS\b[^;]*)?(?:;\s*)?\Z", re.IGNORECASE)
FILES = re.compile(rb"\b(INTO\s+OUTFILE|FROM\s+INFILE)\b", re.IGNORECASE)
SESSION = re.compile(rb"\s*(SET|USE)\s|\s*CREATE\s+(OR\s+REPLACE\s+)?TEMPORARY\s", re.IGNORECASE)
CODE = re.compile(r"Code: (\d+)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


class Refused(Exception):
    """By the engine, or before it is asked. ``code`` is ClickHouse's number for the error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message if CODE.match(message) else f"Code: {code}. DB::Exception: {message}")
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> "Refused":
        """What chdb raises, without what it puts in front of ClickHouse's own message."""
        message = str(error)
        found = CODE.search(message)
        return cls(int(found[1]), message[message.index("Code: ") :]) if found else cls(STD_EXCEPTION, message)


@dataclass(frozen=True, slots=True)
class Request:
    """``statement`` has an insert's rows behind it; ``parameters`` fill ``{name:Type}``."""

    statement: bytes
    settings: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    database: str = ""
    default_format: str = DEFAULT_FORMAT
    stream: bool = False  # as far as the format allows


@dataclass(frozen=True, slots=True)
class Answer:
    """``format`` is None where nothing was asked for; ``rest`` comes after ``body`` and may raise `Refused`."""

    body: bytes = b""
    rest: Iterator[bytes] | None = None
    format: str | None = None
    summary: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """Owns a folder until it is closed. Raises `StoreError` if another process has it.

    Nothing outlasts a request: there are no sessions.
    """

    def __init__(self, folder: Path) -> None:
        self._path = os.path.realpath(folder)
        self._owner = open_embedded(folder)

    def close(self) -> None:
        """Cancels what still runs: the process could not end before that."""
        self._owner.command("KILL QUERY WHERE query NOT LIKE 'KILL QUERY%' ASYNC")
        self._owner.close()

    def run(self, request: Request) -> Answer:
        """Blocks. Raises `Refused`."""
        connect: Any = chdb.connect  # its types depend on which of chdb's two packages was unpacked last
        connection = connect(self._path)
        streaming = False
        try:
            connection.query(";".join(_preparations(request)))
            head = _bare(request.statement[:HEAD])
            if rows := ROWS_FOLLOW.match(head):
                return _insert(connection, request, rows)
            bare = head if len(request.statement) <= HEAD else _bare(request.statement)
            _check(bare)
            named = FORMAT.search(bare)
            chosen = named[1].decode() if named else request.default_format
            if request.stream and chosen in STREAMED and STREAMABLE.match(bare):
                chunks = (
                    chunk.bytes() for chunk in connection.send_query(request.statement, chosen, request.parameters)
                )
                first = bytearray()
                for chunk in chunks:
                    first += chunk
                    if len(first) >= BUFFER:
                        streaming = True
                        return Answer(bytes(first), _rest(connection, chunks), chosen)
                return Answer(bytes(first), None, chosen)
            result = connection.query(request.statement, chosen, request.parameters)
            read = {"read_rows": result.rows_read(), "read_bytes": result.bytes_read()}
            summary = {name: str(value) for name, value in read.items()}
            return Answer(result.bytes(), None, chosen if ANSWERS.match(bare) else None, summary)
        except (chdb.ChdbError, RuntimeError) as error:
            raise Refused.of(error) from error
        finally:
            if not streaming:
                connection.close()


def _insert(connection: Any, request: Request, rows: re.Match[bytes]) -> Answer:
    """By way of a file: chdb's `send_insert` says that rows are stored which a constraint or a view has refused."""
    _check(rows[1])
    statement = request.statement
    into, how = statement[: rows.end(1)], statement[rows.end(1) : rows.end(2)]
    with NamedTemporaryFile() as file:
        file.write(memoryview(statement)[rows.end() :])
        file.flush()
        source = f" FROM INFILE '{_escaped(file.name, QUOTE)}'".encode()
        done = connection.query(into + source + how, DEFAULT_FORMAT, request.parameters)
    # It reads what it writes.
    return Answer(summary={"written_rows": str(done.rows_read()), "written_bytes": str(done.bytes_read())})


def _rest(connection: Any, chunks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    except (chdb.ChdbError, RuntimeError) as error:
        raise Refused.of(error) from error
    finally:
        connection.close()


def _preparations(request: Request) -> Iterator[str]:
    if request.database:
        yield f"USE `{_escaped(request.database, '`')}`"
    for name in request.settings:
        if not IDENTIFIER.fullmatch(name):
            raise Refused(UNKNOWN_SETTING, f"{name!r} is no setting's name")
    # At once: the engine takes no setting after `readonly`.
    if request.settings:
        yield "SET " + ", ".join(f"{name} = '{_escaped(value, QUOTE)}'" for name, value in request.settings.items())


def _check(bare: bytes) -> None:
    """Raises `Refused` for what a server would do for a session only, or never."""
    if not bare.strip():
        raise Refused(SYNTAX_ERROR, "Empty query")
    if FILES.search(bare):
        raise Refused(NOT_IMPLEMENTED, "INTO OUTFILE and FROM INFILE are for clients: send and receive the rows")
    if SESSION.match(bare):
        raise Refused(
            NOT_IMPLEMENTED,
            "this server keeps no sessions: send settings and the database with the request that they are for",
        )


def _bare(statement: bytes) -> bytes:
    """The statement with blanks for comments and for what is quoted; everything else stays where it is."""
    return QUOTED.sub(lambda quoted: b" " * len(quoted[0]), statement)


def _escaped(value: str, quote: str) -> str:
    return value.replace("\\", "\\\\").replace(quote, f"\\{quote}")
