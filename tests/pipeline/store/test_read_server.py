"""The sink's endpoint for queries, as its clients see it: the process, clickhouse-connect, and HTTP by hand."""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import clickhouse_connect
import factories
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError

import millstream as ms
from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.addresses import free_port
from millstream.pipeline.store.read_server import QueryLimits, read_app, serving_queries
from millstream.schemas.errors import ConfigError

ROOT = Path(__file__).parents[3]
PASSWORD = "s3cret:with a colon"


@pytest.fixture(params=["", PASSWORD], ids=["open", "password"])
def settings(folder, request):
    return ms.load_settings(clickhouse_dsn=f"chdb://{folder}", clickhouse_password=request.param)


with_password = pytest.mark.parametrize("settings", [PASSWORD], indirect=True)
without_password = pytest.mark.parametrize("settings", [""], indirect=True)


@pytest.fixture
def port(settings, writer):
    with serving_queries(settings, "127.0.0.1", 0) as port:
        yield port


@pytest.fixture
def client(settings, port):
    made = connect(settings, port)
    yield made
    made.close()


def connect(settings, port, **options):
    password = settings.clickhouse_password.get_secret_value()
    return clickhouse_connect.get_client(
        host="127.0.0.1", port=port, **{"password": password, "database": settings.clickhouse_database} | options
    )


def http(port, query=None, body=None, headers=None, **parameters):
    """Status, headers and body; POST if there is a body."""
    parameters |= {"query": query} if query is not None else {}
    request = Request(f"http://127.0.0.1:{port}/?{urlencode(parameters)}", body, headers or {})
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except HTTPError as error:
        return error.code, error.headers, error.read()


# --- clickhouse-connect


def test_parameters_are_bound(client):
    hostile = "x' OR 1 \\ \t\n{b:String}"
    query = "SELECT {a:String}, {b:Array(Int64)}, {c:Nullable(Int8)}, {d:DateTime}"
    parameters = {"a": hostile, "b": [1, -2], "c": None, "d": "2026-01-02 03:04:05"}
    ((a, b, c, d),) = client.query(query, parameters=parameters).result_rows
    assert (a, b, c, str(d)) == (hostile, [1, -2], None, "2026-01-02 03:04:05")
    many = list(range(50_000))  # too long for an address
    assert client.query("SELECT length({ids:Array(UInt64)})", parameters={"ids": many}).result_rows == [(50_000,)]


@without_password
@pytest.mark.parametrize("compress", [False, "lz4", "gzip", "zstd"])
def test_a_client_may_ask_for_compression(settings, port, compress):
    client = connect(settings, port, compress=compress)
    with client.query_column_block_stream("SELECT number, toString(number) FROM numbers(200000)") as stream:
        assert sum(sum(numbers) for numbers, _ in stream) == sum(range(200_000))
    client.close()


@without_password
@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("SELECT * FROM nowhere", 60, "UNKNOWN_TABLE"),
        ("SELEC 1", 62, "Syntax error"),
        ("SELECT 1; SELECT 2", 62, "Multi-statements"),
        ("SELECT throwIf(number = 70000) FROM numbers(100000)", 395, "FUNCTION_THROW_IF"),
        ("INSERT INTO tasks_raw (rollout_id) VALUES ('x')", 164, "not INSERT"),
        ("INSERT INTO FUNCTION file('/tmp/x', 'CSV', 'a Int8') SELECT 1", 164, "not INSERT"),
        ("DROP TABLE tasks_raw", 164, "not DROP"),
        ("KILL QUERY WHERE 1", 164, "not KILL"),
        ("USE default", 164, "not USE"),
        ("SET readonly = 0", 164, "not SET"),
        ("SELECT 1 SETTINGS readonly = 0", 164, "READONLY"),
        ("SELECT 1 INTO OUTFILE '/tmp/x'", 164, "INTO OUTFILE"),
        ("SELECT 1 INTO /* here */ OUTFILE '/tmp/x' -- FORMAT CSV", 164, "INTO OUTFILE"),
        ("SELECT * FROM file('/etc/hostname', 'LineAsString')", 164, "READONLY"),
        ("SELECT * FROM url('http://127.0.0.1:1/', 'CSV', 'a Int8')", 164, "READONLY"),
    ],
)
def test_errors_reach_the_client_with_their_code(client, statement, code, message):
    with pytest.raises(DatabaseError, match=message) as raised:
        client.command(statement)
    assert raised.value.code == code
    assert client.query("SELECT count() FROM tasks_raw").result_rows == [(0,)]


@without_password
def test_what_a_client_asks_for_does_not_make_it_writable(settings, client, port):
    with pytest.raises(ClickHouseError):
        client.insert("tasks_raw", [["x"]], column_names=["rollout_id"])
    for readonly in ("0", "00", ""):
        statement = b"INSERT INTO tasks_raw (rollout_id) VALUES ('x')"
        assert http(port, body=statement, readonly=readonly, database=settings.clickhouse_database)[0] == 500
    assert client.query("SELECT count() FROM tasks_raw").result_rows == [(0,)]


# --- by hand


@without_password
@pytest.mark.parametrize("zero", ["0", "00", "+0", "0x0", "0.0", "false"])
def test_no_spelling_of_readonly_makes_it_writable(settings, port, zero):
    """Section F8: in a parameter of the request, or in the statement."""
    database = settings.clickhouse_database
    insert = f"INSERT INTO {database}.schema_migrations SELECT * FROM {database}.schema_migrations"
    for statement in (insert, f"{insert} SETTINGS readonly = {zero}", f"WITH 1 AS a {insert}"):
        assert http(port, statement, readonly=zero)[0] == 500
        assert http(port, body=statement.encode(), readonly=zero, param_readonly=zero)[0] == 500
    assert http(port, f"SELECT 1 SETTINGS readonly = {zero}")[0] == 500


@without_password
def test_marks_of_heredocs_do_not_hold_up_the_process(port):
    """Section F8: the engine's parser takes quadratic time for them."""
    many = " ".join(f"$a{n}$" for n in range(32_000))
    for statement in (f"SELECT {many}", f"SELECT '{many}'", f"EXPLAIN SELECT 1 -- {many}"):
        http_status, _, answer = http(port, body=statement.encode())
        assert (http_status, b"heredocs" in answer) == (500, True)
    assert http(port, "SELECT $a$it's$a$")[2] == b"it\\'s\n"


@without_password
def test_get_and_post(port):
    status, _, body = http(port, "SELECT number FROM numbers(2)")
    assert (status, body) == (200, b"0\n1\n")
    assert http(port, body=b"SELECT 'a;b' FORMAT CSV")[2] == b'"a;b"\n'
    assert http(port, "SELECT 1", body=b"+ 1")[2] == b"2\n"
    assert json.loads(http(port, "SELECT 1 AS top", default_format="JSON")[2])["data"] == [{"top": 1}]
    assert http(port, "SELECT {x:String}", param_x="a")[2] == b"a\n"
    assert http(port)[2] == b"Ok.\n"
    status, headers, body = http(port, "SELECT * FROM nowhere")
    assert (status, headers["X-ClickHouse-Exception-Code"]) == (500, "60")
    assert body.startswith(b"Code: 60. DB::Exception: ")


@with_password
def test_a_password_is_required(settings, port):
    with pytest.raises(ClickHouseError, match="Authentication failed"):
        connect(settings, port, password="wrong")
    for headers in ({}, {"X-ClickHouse-Key": "wrong"}, {"Authorization": "Basic a"}, {"Authorization": "Basic ???"}):
        status, answered, _ = http(port, "SELECT 1", headers=headers)
        assert (status, answered["X-ClickHouse-Exception-Code"]) == (500, "516")
    assert connect(settings, port, username="anybody").query("SELECT 1").result_rows == [(1,)]
    assert http(port, "SELECT 1", headers={"X-ClickHouse-Key": PASSWORD})[0] == 200
    with urlopen(f"http://127.0.0.1:{port}/ping") as answer:  # without it
        assert answer.read() == b"Ok.\n"


@without_password
def test_no_web_page_reads_without_a_password(port):
    for page in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
        assert http(port, "SELECT 1", headers=page)[1]["X-ClickHouse-Exception-Code"] == "516"


@without_password
def test_only_an_embedded_store_is_served_and_not_to_others_without_a_password(settings):
    with pytest.raises(ConfigError, match="set clickhouse_password"), serving_queries(settings, "0.0.0.0", 0):
        pass
    other = settings.model_copy(update={"clickhouse_dsn": "clickhouse://somewhere"})
    with pytest.raises(ConfigError, match="serves an embedded store"), serving_queries(other, "127.0.0.1", 0):
        pass


@without_password
def test_requests_and_results_have_limits(folder, writer):
    from starlette.testclient import TestClient

    app = read_app(str(folder), "", QueryLimits(request_bytes=10_000, result_bytes=100_000))
    client = TestClient(app, "http://127.0.0.1")
    assert client.post("/", content=b"SELECT 1").content == b"1\n"
    assert "more than 10,000 bytes" in client.post("/", content=b"SELECT 1" + b" " * 10_000).text
    assert "TOO_MANY_ROWS_OR_BYTES" in client.post("/", content=b"SELECT * FROM numbers(1000000)").text


# --- the process


SERVE = """
import sys
from millstream.consumers.sink.clickhouse_connection import connect
from millstream.pipeline.store.read_server import serving_queries
from millstream.schemas.config.settings import load_settings

settings = load_settings(clickhouse_dsn=f"chdb://{sys.argv[1]}")
client = connect(settings)
with serving_queries(settings, "127.0.0.1", 0) as port:
    print(port, flush=True)
    sys.stdin.readline()
client.close()
"""


def test_a_long_query_does_not_keep_the_process_from_ending(tmp_path):
    command = [sys.executable, "-c", SERVE, tmp_path]
    with (
        ThreadPoolExecutor() as pool,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process,
    ):
        port = int(process.stdout.readline())
        query = b"SELECT count() FROM numbers(100000000000) WHERE NOT ignore(sipHash64(number))"
        asked = pool.submit(http, port, body=query)
        running = "SELECT query FROM system.processes WHERE query NOT LIKE '%processes%'"
        while b"ignore" not in http(port, running)[2]:
            assert not asked.done(), asked.result()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(60) == 0
        assert asked.exception() is not None or asked.result()[0] == 500


@pytest.mark.kafka
async def test_commands_read_the_folder_that_a_sink_holds(kafka_settings, tmp_path):
    port, settings = free_port(), kafka_settings()
    log = KafkaLog(settings)
    await log.create_topics()
    task, producer = factories.task(), log.producer()
    producer.send(settings.topics.events, factories.span(task, "a", name="from the log"), key=task.rollout_id)
    producer.close(20.0)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "300",
        "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "MILLSTREAM_TOPIC_PREFIX": settings.topic_prefix,
        "MILLSTREAM_KAFKA_PARTITIONS": str(settings.kafka_partitions),
        "MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{tmp_path}",
    }
    command = [sys.executable, "-m", "millstream.pipeline"]
    sink = await asyncio.create_subprocess_exec(*command, "sink", "--query-port", str(port), cwd=ROOT, env=env)

    def ask(**more):
        asked = [*command, "sql", "--json", "SELECT SpanName AS name FROM spans"]
        return subprocess.run(asked, cwd=ROOT, env=env | more, capture_output=True, text=True, check=False)

    try:
        reader = {"MILLSTREAM_CLICKHOUSE_DSN": f"clickhouse://127.0.0.1:{port}"}
        async with asyncio.timeout(60):
            while (found := await asyncio.to_thread(lambda: ask(**reader))).stdout.strip() in ("", "[]"):
                assert sink.returncode is None
        assert json.loads(found.stdout) == [{"name": "from the log"}]
        # Its own address is in the folder: without another setting, a command asks there.
        assert json.loads((await asyncio.to_thread(ask)).stdout) == [{"name": "from the log"}]
    finally:
        sink.terminate()
    assert await sink.wait() == 0
