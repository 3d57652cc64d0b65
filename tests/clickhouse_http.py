"""The smallest HTTP front over the embedded engine that clickhouse-connect talks to, and that fails as it is told."""

import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import chdb
import lz4.frame

# What is the client's transport's, not the engine's.
RESERVED = re.compile(r"query.*|database|param_.*|client_protocol_version|wait_end_of_query|session_.*|.*_http_.*")
INSERT = re.compile(rb"(INSERT INTO .*?) FORMAT (Native|Avro)\n", re.DOTALL)
CODE = re.compile(r"Code: (\d+)")


class ClickHouseHttp:
    """Serves the engine in ``folder`` on one port, from `start` to `stop`, as often as wanted."""

    def __init__(self, folder):
        self._folder = str(folder)
        self._server = None
        self.port = 0
        self.tokens = []  # of the inserts that arrived
        self.lose_replies = 0  # so many inserts are stored, and their clients never hear of it
        self.refuse = 0  # so many inserts are refused …
        self.refusal = "Code: 252. DB::Exception: Too many parts. (TOO_MANY_PARTS)"  # … with this
        self.gate = threading.Event()  # inserts wait for it before they are answered
        self.gate.set()

    def start(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (_Handler,), {"front": self}))
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        """Refuses connections from now on; what is under way ends first."""
        self._server.shutdown()
        self._server.server_close()

    def execute(self, query, settings):
        connection = chdb.connect(self._folder)  # settings belong to a connection
        try:
            if settings.get("database"):
                connection.query(f"USE {settings['database']}")
            for name, value in settings.items():
                if not RESERVED.fullmatch(name):
                    connection.query(f"SET {name} = '{value}'")
            params = {name[6:]: value for name, value in settings.items() if name.startswith("param_")}
            if insert := INSERT.match(query):
                with tempfile.NamedTemporaryFile() as rows:
                    rows.write(query[insert.end() :])
                    rows.flush()
                    statement, form = insert[1].decode(), insert[2].decode()
                    connection.query(f"{statement} FROM INFILE '{rows.name}' FORMAT {form}")
                return b""
            return connection.query(query.decode(), "TabSeparated", params=params).bytes()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):  # of HTTP 1.0: a connection ends with its answer, so none outlives `stop`
    def do_POST(self):
        front, settings = self.front, dict(parse_qsl(urlsplit(self.path).query))
        query = self._body()
        token = settings.get("insert_deduplication_token")
        if token:
            front.tokens.append(token)
            front.gate.wait()
        try:
            if token and front.refuse:
                front.refuse -= 1
                raise chdb.ChdbError(front.refusal)
            answer = front.execute(query, settings)
        except chdb.ChdbError as error:
            return self._answer(500, str(error).encode(), CODE.search(str(error))[1])
        if token and front.lose_replies:
            front.lose_replies -= 1
            return None  # hangs up
        return self._answer(200, answer)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return lz4.frame.decompress(body) if self.headers.get("Content-Encoding") == "lz4" else body

    def _answer(self, status, body, code=None):
        self.send_response(status)
        if code is not None:
            self.send_header("X-ClickHouse-Exception-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """One line per request would hide the test's own output."""
