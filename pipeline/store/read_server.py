"""ClickHouse's HTTP interface in front of an embedded store, for reading: the process that holds the folder serves it.

    GET, POST /    one statement that reads, in `query`, in the body, or in both (joined by a line break), with
                   `param_NAME`, `database` and `default_format`; settings and compression are ignored
    GET /ping      "Ok.", without a password

There are no sessions and no users. A client can read what the process can read: not only the store, but also files.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from millstream.consumers.sink.clickhouse_connection import EMBEDDED, IN_MEMORY, QUERY_ADDRESS, address, embedded_path
from millstream.pipeline.addresses import is_loopback
from millstream.pipeline.services.serve_asgi import for_this_machine, limited, listen, served_in_thread
from millstream.pipeline.store.read_only import FORMAT_QUERY, reading_statement
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, StoreError

DEFAULT_FORMAT: Final = "TabSeparated"
FORMAT: Final = re.compile(r"\sFORMAT\s+(\w+)\s*;?\s*\Z", re.IGNORECASE)  # the driver appends it to the statement

# ClickHouse's error codes
READONLY: Final = 164
AUTHENTICATION_FAILED: Final = 516
STD_EXCEPTION: Final = 1001


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """What one request may cost the process that serves it."""

    request_bytes: int = 32 << 20  # the ids of some 800,000 rollouts
    result_bytes: int = 256 << 20  # a result is held in memory; `millstream export` on the folder itself has no limit
    seconds: int = 300  # clickhouse-connect's own time-out


class QueryRefused(Exception):
    """With ClickHouse's ``code`` for the error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message if message.startswith("Code: ") else f"Code: {code}. DB::Exception: {message}")
        self.code = code


@contextmanager
def serving_queries(settings: Settings, host: str, port: int) -> Iterator[int]:
    """Serves the embedded store, which this process has opened, from a thread; yields the port (0: any free one).
    Cancels the queries that still run at the end. Raises `ConfigError` if the store or the address can't be served."""
    if not settings.clickhouse_dsn.startswith(EMBEDDED):
        raise ConfigError(
            f"--query-port serves an embedded store ({EMBEDDED}…), but clickhouse_dsn is {address(settings)}"
        )
    path, password = embedded_path(settings.clickhouse_dsn), settings.clickhouse_password.get_secret_value()
    if not is_loopback(host) and not password:
        raise ConfigError(
            f"--query-host {host} is open to others: set clickhouse_password (MILLSTREAM_CLICKHOUSE_PASSWORD), or use "
            "127.0.0.1"
        )
    listener = listen(host, port)
    with served_in_thread(read_app(path, password), listener, "millstream-queries") as server:
        bound = listener.getsockname()[1]
        served = None if path == IN_MEMORY else Path(path) / QUERY_ADDRESS
        try:
            if served is not None:  # commands that are given the folder find the address there
                served.write_text(f"{host}:{bound}\n")
            yield bound
        finally:
            if served is not None:
                served.unlink(missing_ok=True)
            server.should_exit = True
            with closing(_connect(path)) as connection:
                connection.query("KILL QUERY WHERE query NOT LIKE 'KILL QUERY%' ASYNC")


def read_app(path: str, password: str, limits: QueryLimits = QueryLimits()) -> Starlette:
    """Without a password, it answers only programs on this machine, and not web pages in a browser."""

    async def statement(request: Request) -> Response:
        try:
            _authorise(request, password)
            values = await _values(request, limits)
            if not values["query"].strip() and request.method == "GET":
                return PlainTextResponse("Ok.\n")
            found = await run_in_threadpool(_run, path, values, limits)
        except QueryRefused as error:
            return PlainTextResponse(f"{error}\n", 500, {"X-ClickHouse-Exception-Code": str(error.code)})
        return Response(found, media_type="application/octet-stream")

    async def ping(_: Request) -> Response:
        return PlainTextResponse("Ok.\n")

    return Starlette(routes=[Route("/", statement, methods=["GET", "POST"]), Route("/ping", ping)])


def _authorise(request: Request, password: str) -> None:
    headers = request.headers
    if not password:
        # A web page can make a browser send requests to loopback, also under a host name of its own.
        if not for_this_machine(request) or "origin" in headers or headers.get("sec-fetch-site", "none") != "none":
            raise QueryRefused(AUTHENTICATION_FAILED, "without a password only programs on this machine may query")
        return
    given = [headers.get("x-clickhouse-key", "").encode()]
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(binascii.Error):
            given.append(base64.b64decode(credentials).partition(b":")[2])
    if not any(hmac.compare_digest(each, password.encode()) for each in given):
        raise QueryRefused(AUTHENTICATION_FAILED, "Authentication failed: send clickhouse_password, as any user")


async def _values(request: Request, limits: QueryLimits) -> dict[str, str]:
    """The request's parameters; `query` is the whole statement."""
    too_large = QueryRefused(READONLY, f"the request has more than {limits.request_bytes:,} bytes")
    request = limited(request, limits.request_bytes, too_large)
    values = dict(request.query_params)
    body = ""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):  # for long parameters
        async with request.form(max_part_size=limits.request_bytes) as form:
            values |= {name: value for name, value in form.multi_items() if isinstance(value, str)}
    else:
        body = (await request.body()).decode("utf-8", "replace")
    return values | {"query": "\n".join(part for part in (values.get("query", ""), body) if part)}


def _run(path: str, values: dict[str, str], limits: QueryLimits) -> bytes:
    """Blocks. Raises `QueryRefused`."""
    statement, file_format = values["query"], values.get("default_format", DEFAULT_FORMAT)
    if found := FORMAT.search(statement):
        statement, file_format = statement[: found.start()], found[1]
    parameters = {name.removeprefix("param_"): value for name, value in values.items() if name.startswith("param_")}
    connection = _connect(path)
    try:
        if database := values.get("database", ""):
            connection.query("USE " + _quoted(database))
        # In one statement: after `readonly` the engine takes no more settings. 1 refuses most table functions, too.
        connection.query(
            f"SET max_result_bytes = {limits.result_bytes}, max_execution_time = {limits.seconds}, readonly = 1"
        )

        def format_query(query: str) -> str:
            escaped = query.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
            return str(connection.query(FORMAT_QUERY, "TabSeparatedRaw", {"query": escaped}))

        statement = reading_statement(statement, format_query)
        return connection.query(statement, file_format, parameters).bytes() or b""
    except StoreError as error:
        raise QueryRefused(READONLY, str(error)) from error
    except RuntimeError as error:  # what chDB raises
        code = re.search(r"Code: (\d+)", str(error))
        message = str(error)[code.start() :] if code else str(error)
        raise QueryRefused(int(code[1]) if code else STD_EXCEPTION, message) from error
    finally:
        connection.close()


def _connect(path: str) -> Any:
    import chdb  # an extra: who has opened the store has it

    connect: Any = chdb.connect  # its types depend on which of chdb's two packages was unpacked last
    return connect(path)


def _quoted(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"
