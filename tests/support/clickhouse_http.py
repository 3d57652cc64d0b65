"""The store's own HTTP server in a thread, behind a middleware that makes it fail as a test tells it."""

import asyncio
import re
import threading
from urllib.parse import parse_qs, urlencode
from urllib.request import urlopen

import uvicorn
from starlette.responses import PlainTextResponse

from millstream.pipeline.services.serve_asgi import listen
from millstream.pipeline.store.read_server import store_app


class ClickHouseHttp:
    """Serves an engine on one port, from `start` to `stop`, as often as wanted."""

    def __init__(self, engine):
        self._engine = engine
        self._server = self._thread = None
        self.port = 0
        self.tokens = []  # of the inserts that arrived
        self.lose_replies = 0  # so many inserts are stored, and their clients never hear of it
        self.refuse = 0  # so many inserts are refused …
        self.refusal = "Code: 252. DB::Exception: Too many parts. (TOO_MANY_PARTS)"  # … with this
        self.gate = threading.Event()  # inserts wait for it before they are answered
        self.gate.set()

    def start(self):
        listener = listen("127.0.0.1", self.port)
        self.port = listener.getsockname()[1]
        app = _Unreliable(store_app(self._engine, ""), self)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def stop(self):
        """Refuses connections from now on; what is under way ends first."""
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
            code = re.search(r"Code: (\d+)", front.refusal)[1]
            return await PlainTextResponse(front.refusal, 500, {"X-ClickHouse-Exception-Code": code})(
                scope, receive, send
            )
        if not front.lose_replies:
            return await self._app(scope, receive, send)
        front.lose_replies -= 1

        async def lose(message):
            pass

        await self._app(scope, receive, lose)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        raise ConnectionAbortedError("as the test wants it: the server hangs up before the end of its answer")
