"""An embedded store behind ClickHouse's HTTP interface, for development: several processes share it.

    GET, POST /    a statement in `query`, the body, or both (joined by a line break); other parameters are settings,
                   but for `param_NAME`, `database`, `default_format`, `wait_end_of_query` and names of transport
    GET /ping      "Ok.", without a password

It differs from a server: no sessions, users, progress headers or native protocol. Whoever may ask can do what the
process may, `file()` and `url()` included.
"""

import base64
import binascii
import gzip
import hmac
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from secrets import token_hex
from typing import IO, Final, cast

import lz4.frame
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from millstream.pipeline.services.serve_asgi import for_this_machine, limited
from millstream.pipeline.store.engine import DEFAULT_FORMAT, SYNTAX_ERROR, Answer, Engine, Refused, Request

MAX_BODY: Final = 256 << 20  # bytes of a request, and of what its compressed body holds
GET_IS_READ_ONLY: Final = "2"  # ClickHouse's `readonly`: no writes, but settings may be given

# Parameters that are no settings.
TRANSPORT: Final = {
    *("query", "query_id", "database", "default_format", "user", "password", "role", "quota_key", "stacktrace"),
    *("session_id", "session_check", "session_timeout", "close_session", "client_protocol_version"),
    *("wait_end_of_query", "buffer_size", "compress", "decompress"),
}

# ClickHouse's numbers of errors, and the statuses that it answers with where that is not 500.
UNKNOWN_COMPRESSION_METHOD: Final = 89
NOT_IMPLEMENTED: Final = 48
QUERY_IS_TOO_LARGE: Final = 296
AUTHENTICATION_FAILED: Final = 516
STATUS: Final = {
    **dict.fromkeys([6, 26, 27, 38, 41, 53, SYNTAX_ERROR, 70, 72, 117, 321], 400),
    **dict.fromkeys([46, 47, 50, 56, 60, 73, 81, 115], 404),  # unknown function, name, type, table, setting …
    159: 408,
    NOT_IMPLEMENTED: 501,
    AUTHENTICATION_FAILED: 403,
    QUERY_IS_TOO_LARGE: 413,
    UNKNOWN_COMPRESSION_METHOD: 400,
}
TYPES: Final = {"JSON": "application/json", "CSV": "text/csv", "TabSeparated": "text/tab-separated-values"}


def store_app(engine: Engine, password: str, max_body: int = MAX_BODY) -> Starlette:
    """The engine stays the caller's to close. Without a password it answers requests from this machine alone, but
    those that a web page makes a browser send."""

    async def statement(request: HttpRequest) -> Response:
        try:
            _admit(request, password)
            asked = await _asked(limited(request, max_body, _too_large(max_body)), max_body)
            if not asked.statement.strip() and request.method == "GET":
                return PlainTextResponse("Ok.\n")
            answer = await run_in_threadpool(engine.run, asked)
        except Refused as error:
            return _refusal(error)
        return _response(request, answer)

    async def ping(_: HttpRequest) -> Response:
        return PlainTextResponse("Ok.\n")

    return Starlette(routes=[Route("/", statement, methods=["GET", "POST"]), Route("/ping", ping)])


def _admit(request: HttpRequest, password: str) -> None:
    headers, given = request.headers, []
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(credentials)
    elif scheme.lower() == "basic":
        try:
            given.append(base64.b64decode(credentials, validate=True).decode().partition(":")[2])
        except (binascii.Error, UnicodeDecodeError):
            raise Refused(AUTHENTICATION_FAILED, "the Authorization header can't be read") from None
    given += [headers.get("x-clickhouse-key", ""), request.query_params.get("password", "")]
    if password:
        if not any(hmac.compare_digest(each.encode(), password.encode()) for each in given):
            raise Refused(
                AUTHENTICATION_FAILED,
                "Authentication failed: send the clickhouse_password that the server was started with, as any user",
            )
        return
    # A page on the web may make a browser send requests to loopback, also under a name of its own.
    if not for_this_machine(request) or "origin" in headers or headers.get("sec-fetch-site", "none") != "none":
        raise Refused(AUTHENTICATION_FAILED, "without a password this server answers programs on its machine alone")


async def _asked(request: HttpRequest, max_body: int) -> Request:
    """Raises `Refused`."""
    values = dict(request.query_params)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        body = b""
        async with request.form(max_part_size=max_body) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    raise Refused(NOT_IMPLEMENTED, f"external data ({name}) is not supported")
                values[name] = value
    else:
        encoding = request.headers.get("content-encoding", "")
        body = await run_in_threadpool(_decoded, await request.body(), encoding, max_body)
    if values.get("compress", "0") != "0" or values.get("decompress", "0") != "0":
        raise Refused(NOT_IMPLEMENTED, "compress and decompress are not supported: use HTTP's Content-Encoding")
    settings = {
        name: value for name, value in values.items() if name not in TRANSPORT and not name.startswith("param_")
    }
    if request.method == "GET" and settings.get("readonly", "0") == "0":
        settings["readonly"] = GET_IS_READ_ONLY
    return Request(
        statement=b"\n".join(part for part in (values.get("query", "").encode(), body) if part),
        settings=settings,
        parameters={name.removeprefix("param_"): value for name, value in values.items() if name.startswith("param_")},
        database=values.get("database", request.headers.get("x-clickhouse-database", "")),
        default_format=values.get("default_format", request.headers.get("x-clickhouse-format", DEFAULT_FORMAT)),
        stream=values.get("wait_end_of_query", "0") == "0",
    )


def _too_large(limit: int) -> Refused:
    return Refused(
        QUERY_IS_TOO_LARGE,
        f"the request has more than {limit:,} bytes: send less at once, or start the server with --max-request-mb",
    )


def _decoded(body: bytes, encoding: str, limit: int) -> bytes:
    if not encoding or encoding == "identity":
        return body
    if encoding not in ("lz4", "gzip"):
        raise Refused(UNKNOWN_COMPRESSION_METHOD, f"Content-Encoding {encoding!r} is not supported: use lz4 or gzip")
    packed = io.BytesIO(body)
    try:
        with cast(IO[bytes], lz4.frame.open(packed) if encoding == "lz4" else gzip.open(packed)) as file:
            decoded = file.read(limit + 1)
    except (OSError, EOFError, RuntimeError, zlib.error) as error:
        raise Refused(UNKNOWN_COMPRESSION_METHOD, f"the body is not {encoding}: {error}") from None
    if len(decoded) > limit:
        raise _too_large(limit)
    return decoded


def _response(request: HttpRequest, answer: Answer) -> Response:
    headers = {"X-ClickHouse-Query-Id": request.query_params.get("query_id", token_hex(16))}
    if answer.summary:
        headers["X-ClickHouse-Summary"] = json.dumps(answer.summary)
    if answer.format is not None:
        headers["X-ClickHouse-Format"] = answer.format
    chunks: Iterable[bytes] = [answer.body]
    if answer.rest is not None:
        headers["X-ClickHouse-Exception-Tag"] = tag = token_hex(8)
        chunks = _until_refused(answer.body, answer.rest, tag)
    if request.query_params.get("enable_http_compression", "0") != "0":
        accepted = {each.strip() for each in request.headers.get("accept-encoding", "").split(",")}
        encoding = next((each for each in ("lz4", "gzip") if each in accepted), None)
        if encoding is not None:
            headers["Content-Encoding"] = encoding
            chunks = _lz4(chunks) if encoding == "lz4" else _gzip(chunks)
    kind = next((kind for name, kind in TYPES.items() if (answer.format or "").startswith(name)), None)
    kind = kind or "application/octet-stream"
    if answer.rest is None and "Content-Encoding" not in headers:
        return Response(answer.body, headers=headers, media_type=kind)
    return StreamingResponse(chunks, headers=headers, media_type=kind)


def _until_refused(body: bytes, rest: Iterator[bytes], tag: str) -> Iterator[bytes]:
    """An error after the status has been sent stands at the end, marked as ClickHouse marks it."""
    yield body
    try:
        yield from rest
    except Refused as error:
        text = str(error).encode()
        yield b"\r\n__exception__\r\n%b\r\n%b\n%d %b\r\n__exception__\r\n" % (
            tag.encode(),
            text,
            len(text) + 1,
            tag.encode(),
        )


def _gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(1, wbits=31)
    for chunk in chunks:
        yield packer.compress(chunk)
    yield packer.flush()


def _lz4(chunks: Iterable[bytes]) -> Iterator[bytes]:
    packer = lz4.frame.LZ4FrameCompressor()
    yield packer.begin()
    for chunk in chunks:
        yield packer.compress(chunk)
    yield packer.flush()


def _refusal(error: Refused) -> Response:
    headers = {"X-ClickHouse-Exception-Code": str(error.code)}
    return PlainTextResponse(f"{error}\n", STATUS.get(error.code, 500), headers)
