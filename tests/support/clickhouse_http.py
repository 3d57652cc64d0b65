"""A ClickHouse server for tests: its HTTP interface over the embedded engine, with inserts, in a thread or a process.

    python tests/support/clickhouse_http.py FOLDER PORT [HOST]

Clients have to connect with ``?compress=0``.
"""

import asyncio
import re
import sys
import threading
from tempfile import NamedTemporaryFile
from urllib.parse import parse_qs, urlencode
from urllib.request import urlopen

import chdb
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from millstream.pipeline.services.serve_asgi import listen

INSERT = re.compile(rb"(\s*INSERT\s.*?)(\sFORMAT\s+\w+)\s*?\n", re.IGNORECASE | re.DOTALL)  # rows follow
NOT_SETTINGS = {"query", "query_id", "session_id", "database", "client_protocol_version", "wait_end_of_query"}


class Engine:
    """Owns a folder until it is closed."""

    def __init__(self, folder):
        self._path = str(folder)
        self._owner = chdb.connect(self._path)

    def close(self):
        self._owner.close()

    def execute(self, statement, values):
        """What `POST /` does, on a connection of its own."""
        settings = {n: v for n, v in values.items() if n not in NOT_SETTINGS and not n.startswith("param_")}
        parameters = {n.removeprefix("param_"): v for n, v in values.items() if n.startswith("param_")}
        connection = chdb.connect(self._path)
        try:
            if database := values.get("database"):
                connection.query(f"USE `{database}`")
            if settings:
                connection.query("SET " + ", ".join(f"{name} = '{value}'" for name, value in settings.items()))
            if not (rows := INSERT.match(statement)):
                return connection.query(statement, "TabSeparated", parameters).bytes() or b""
            with NamedTemporaryFile() as file:  # chdb's `send_insert` reports rows as stored that a constraint refuses
                file.write(memoryview(statement)[rows.end() :])
                file.flush()
                connection.query(rows[1] + f" FROM INFILE '{file.name}'".encode() + rows[2], "TabSeparated")
            return b""
        finally:
            connection.close()

    def app(self):
        async def statement(request):
            values = dict(request.query_params)
            body = await request.body()
            whole = b"\n".join(part for part in (values.get("query", "").encode(), body) if part)
            try:
                return Response(await run_in_threadpool(self.execute, whole, values))
            except (chdb.ChdbError, RuntimeError) as error:
                message = str(error)[str(error).index("Code: ") :]
                return _refusal(message)

        async def ping(_):
            return PlainTextResponse("Ok.\n")

        return Starlette(routes=[Route("/", statement, methods=["GET", "POST"]), Route("/ping", ping)])


class ClickHouseHttp:
    """Serves an engine on one port from `start` to `stop`, repeatedly, and fails as a test asks for."""

    def __init__(self, engine):
        self._engine = engine
        self._server = self._thread = None
        self.port = 0
        self.tokens = []  # of the inserts that arrived
        self.lose_replies = 0  # this many inserts are stored, and their clients get no answer
        self.refuse = 0  # this many inserts are refused …
        self.refusal = "Code: 252. DB::Exception: Too many parts. (TOO_MANY_PARTS)"  # … with this
        self.gate = threading.Event()  # inserts wait for it before they are answered
        self.gate.set()

    def start(self):
        listener = listen("127.0.0.1", self.port)
        self.port = listener.getsockname()[1]
        app = _Unreliable(self._engine.app(), self)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def stop(self):
        """Refuses connections from now on; requests in progress end first."""
        self._server.should_exit = True
        self._thread.join()

    def execute(self, query, **parameters):
        with urlopen(f"http://127.0.0.1:{self.port}/?{urlencode(parameters)}", query.encode()) as answer:
            return answer.read()


class _Unreliable:
    def __init__(self, app, front):
        self._app = app
        self._front = front

    async def __call__(self, scope, receive, send):
        front = self._front
        tokens = parse_qs(scope.get("query_string", b"").decode()).get("insert_deduplication_token")
        if not tokens:
            return await self._app(scope, receive, send)
        front.tokens += tokens
        await asyncio.to_thread(front.gate.wait)
        if front.refuse:
            front.refuse -= 1
            return await _refusal(front.refusal)(scope, receive, send)
        if not front.lose_replies:
            return await self._app(scope, receive, send)
        front.lose_replies -= 1

        async def lose(message):
            pass

        await self._app(scope, receive, lose)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        raise ConnectionAbortedError("as the test asks for: the server hangs up before the end of its answer")


def _refusal(message):
    code = re.match(r"Code: (\d+)", message)[1]
    return PlainTextResponse(message, 500, {"X-ClickHouse-Exception-Code": code})


if __name__ == "__main__":
    folder, port, *host = sys.argv[1:]
    uvicorn.run(
        Engine(folder).app(), host=host[0] if host else "127.0.0.1", port=int(port), log_config=None, access_log=False
    )
