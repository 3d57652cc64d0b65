"""`millstream store serve` as its clients see it: a process, clickhouse-connect, and HTTP by hand."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, StreamFailureError

ROOT = Path(__file__).parents[3]
PASSWORD = "s3cret:with a colon"
COMMAND = [sys.executable, "-m", "millstream.pipeline", "store", "serve"]


@contextmanager
def serving(folder, *options, password="", port=0):
    """Yields the port, and the process."""
    process = subprocess.Popen(
        [*COMMAND, str(folder), "--port", str(port), *options],
        cwd=ROOT,
        env=os.environ | {"MILLSTREAM_CLICKHOUSE_PASSWORD": password, "COLUMNS": "300"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()  # the address, when others may connect
        yield int(re.search(r":(\d+)$", line.strip())[1]), process
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), "--max-request-mb", "40", password=PASSWORD) as (port, _):
        yield port


def connect(port, **options):
    return clickhouse_connect.get_client(host="127.0.0.1", port=port, **{"password": PASSWORD} | options)


@pytest.fixture
def client(server):
    made = connect(server)
    yield made
    made.close()


@pytest.fixture
def table(client, request):
    name = re.sub(r"\W", "_", request.node.name)
    client.command(
        f"CREATE TABLE {name} (id UInt64, name String, tags Array(String), at DateTime64(9, 'UTC'), "
        "CONSTRAINT known CHECK name != 'bad') "
        "ENGINE = MergeTree ORDER BY id SETTINGS non_replicated_deduplication_window = 100"
    )
    return name


def http(port, query=None, body=None, headers=None, **parameters):
    """Status, headers and body; POST if there is a body."""
    parameters |= {"query": query} if query is not None else {}
    request = Request(
        f"http://127.0.0.1:{port}/?{urlencode(parameters)}", body, {"X-ClickHouse-Key": PASSWORD} | (headers or {})
    )
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except HTTPError as error:
        return error.code, error.headers, error.read()


# --- clickhouse-connect


@pytest.mark.parametrize("compress", [False, "lz4", "gzip"])
def test_rows_come_back_as_they_were_inserted(server, client, table, compress):
    other = connect(server, compress=compress)
    rows = [
        [n, name, ["a", "b'\\"], "2026-01-01 00:00:00"]
        for n, name in enumerate(("x", "", "a;b\n;", "\0 FORMAT CSV\n", "ü"))
    ]
    columns = [[row[n] for row in rows] for n in range(3)]
    done = other.insert(table, columns, column_names=["id", "name", "tags"], column_oriented=True)
    assert done.written_rows == len(rows)
    found = other.query(f"SELECT id, name, tags FROM {table} ORDER BY id")
    assert [list(row) for row in found.result_rows] == [row[:3] for row in rows]
    assert found.column_names == ("id", "name", "tags")
    other.close()


def test_parameters_are_bound(client):
    hostile = "x' OR 1 \\ \t\n{b:String}"
    query = "SELECT {a:String}, {b:Array(Int64)}, {c:Nullable(Int8)}, {d:DateTime}"
    parameters = {"a": hostile, "b": [1, -2], "c": None, "d": "2026-01-02 03:04:05"}
    ((a, b, c, d),) = client.query(query, parameters=parameters).result_rows
    assert (a, b, c, str(d)) == (hostile, [1, -2], None, "2026-01-02 03:04:05")
    done = client.command("INSERT INTO FUNCTION null({t:String}) FORMAT CSV", parameters={"t": "a Int8"}, data="1\n2\n")
    assert done.written_rows == 2
    many = list(range(50_000))  # too long for an address
    assert client.query("SELECT length({ids:Array(UInt64)})", parameters={"ids": many}).result_rows == [(50_000,)]


def test_settings_are_the_requests_own(client):
    query = "SELECT getSetting('max_threads')"
    assert client.query(query, settings={"max_threads": 3}).result_rows == [(3,)]
    assert client.query(query).result_rows != [(3,)]
    with pytest.raises(DatabaseError, match="TOO_MANY_ROWS"):
        client.query("SELECT * FROM numbers(100)", settings={"max_rows_to_read": 10, "max_block_size": 5})


@pytest.mark.parametrize(
    ("statement", "code", "said"),
    [
        ("SELECT * FROM nowhere", 60, "UNKNOWN_TABLE"),
        ("SELEC 1", 62, "SYNTAX_ERROR"),
        ("SELECT throwIf(number = 70000) FROM numbers(100000)", 395, "FUNCTION_THROW_IF"),
        ("SET max_threads = 1", 48, "no sessions"),
        ("CREATE TEMPORARY TABLE t (a Int8)", 48, "no sessions"),
        ("SELECT 1 INTO /* here */ OUTFILE '/tmp/x'", 48, "for clients"),
        ("INSERT INTO t FROM INFILE '/etc/passwd' FORMAT CSV", 48, "for clients"),
    ],
)
def test_errors_reach_the_client_with_their_number(client, statement, code, said):
    with pytest.raises(DatabaseError, match=said) as raised:
        client.command(statement)
    assert raised.value.code == code


def test_a_row_that_is_refused_refuses_its_block(client, table):
    with pytest.raises(DatabaseError, match="VIOLATED_CONSTRAINT"):
        client.insert(table, [[1, "good"], [2, "bad"]], column_names=["id", "name"])
    assert client.query(f"SELECT count() FROM {table}").result_rows == [(0,)]


def test_a_block_sent_again_is_stored_once(client, table):
    for token in ("one", "one", "two"):
        client.insert(table, [[1, "x"]], column_names=["id", "name"], settings={"insert_deduplication_token": token})
    assert client.query(f"SELECT count() FROM {table}").result_rows == [(2,)]


def test_a_million_rows_are_streamed(client):
    query = "SELECT number, toString(number) AS text FROM numbers(1000000)"
    with client.query_column_block_stream(query) as stream:
        sizes = [(len(numbers), sum(numbers), texts[-1]) for numbers, texts in stream]
    assert len(sizes) > 1
    assert sum(size for size, *_ in sizes) == 1_000_000
    assert sum(total for _, total, _ in sizes) == sum(range(1_000_000))
    assert sizes[-1][2] == "999999"


def test_an_error_within_a_stream_is_an_error(client):
    query = "SELECT throwIf(number = 700000, 'on purpose'), number FROM numbers(1000000)"
    with pytest.raises(StreamFailureError, match="on purpose"), client.query_rows_stream(query) as stream:
        for _ in stream:
            pass
    assert client.query("SELECT 1").result_rows == [(1,)]


@pytest.mark.parametrize("readonly", [1, 2])
def test_who_asks_to_read_only_cannot_write(server, table, readonly):
    reader = connect(server, settings={"readonly": readonly})
    assert reader.query(f"SELECT count() FROM {table}").result_rows == [(0,)]
    for statement in (f"DROP TABLE {table}", f"INSERT INTO {table} (id) VALUES (1)", "SELECT 1 SETTINGS readonly = 0"):
        with pytest.raises(DatabaseError, match="READONLY"):
            reader.command(statement)
    with pytest.raises(DatabaseError, match="READONLY"):
        reader.insert(table, [[1]], column_names=["id"])
    reader.close()


# --- by hand


def test_get_reads_and_post_writes(server, client, table):
    assert http(server, f"INSERT INTO {table} (id) VALUES (1)")[0] == 500
    assert http(server, f"INSERT INTO {table} (id, name) FORMAT CSV", b"1,a;b\n2,c\n")[0] == 200
    assert http(server, body=f"INSERT INTO {table} (id, name) VALUES (3, 'x;y')".encode())[0] == 200
    packed = gzip.compress(b'{"id": 4, "name": "z"}\n')
    into = f"INSERT INTO {table} SETTINGS async_insert = 0 FORMAT JSONEachRow"
    assert http(server, into, packed, {"Content-Encoding": "gzip"})[0] == 200
    status, headers, body = http(server, f"SELECT id, name FROM {table} ORDER BY id")
    assert (status, body) == (200, b"1\ta;b\n2\tc\n3\tx;y\n4\tz\n")
    assert headers["X-ClickHouse-Format"] == "TabSeparated"
    _, headers, body = http(server, f"SELECT max(id) AS top FROM {table} -- FORMAT CSV", default_format="JSON")
    assert json.loads(body)["data"] == [{"top": 4}]
    assert headers["Content-Type"] == "application/json"
    assert http(server, "SELECT {x:String}", param_x="a")[2] == b"a\n"
    assert http(server)[2] == b"Ok.\n"
    with urlopen(f"http://127.0.0.1:{server}/ping") as answer:  # without a password
        assert answer.read() == b"Ok.\n"
    status, headers, body = http(server, "SELECT * FROM nowhere")
    assert (status, headers["X-ClickHouse-Exception-Code"]) == (404, "60")
    assert body.startswith(b"Code: 60. DB::Exception: ")


def test_a_password_is_asked_for(server):
    with pytest.raises(ClickHouseError, match="Authentication failed"):
        connect(server, password="wrong")
    for headers in ({}, {"X-ClickHouse-Key": "wrong"}, {"Authorization": "Basic ???"}):
        status, answered, _ = http(server, "SELECT 1", headers={"X-ClickHouse-Key": ""} | headers)
        assert (status, answered["X-ClickHouse-Exception-Code"]) == (403, "516")
    assert connect(server, username="anybody").query("SELECT 1").result_rows == [(1,)]
    assert http(server, "SELECT 1", headers={"X-ClickHouse-Key": "", "Authorization": f"Bearer {PASSWORD}"})[0] == 200
    assert http(server, "SELECT 1", headers={"X-ClickHouse-Key": ""}, password=PASSWORD)[0] == 200


def test_requests_have_a_limit(server, client, table):
    into = f"INSERT INTO {table} (name) FORMAT TSV"
    large = b"x" * (41 << 20)
    for body, headers in ((large, {}), (gzip.compress(large, 1), {"Content-Encoding": "gzip"})):
        status, answered, said = http(server, into, body, headers)
        assert (status, answered["X-ClickHouse-Exception-Code"]) == (413, "296")
        assert b"--max-request-mb" in said
    assert http(server, into, large[: 39 << 20])[0] == 200


def test_is_not_open_to_others_without_a_password(tmp_path):
    command = [*COMMAND, str(tmp_path), "--host", "0.0.0.0", "--port", "0"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "set clickhouse_password" in " ".join(refused.stderr.split())


# --- the process


def test_two_processes_share_it_and_no_third_has_the_folder(tmp_path):
    """Nobody asks for a password on loopback, but no web page gets in."""
    with serving(tmp_path) as (port, process):
        asked = {"MILLSTREAM_CLICKHOUSE_DSN": f"clickhouse://127.0.0.1:{port}", "COLUMNS": "300"}
        script = (
            "import sys, millstream as ms; "
            "store = ms.ClickHouseStore(ms.load_settings()); store.migrate(); store.insert('tasks_raw', "
            "['rollout_id', 'date'], [[sys.argv[1] + str(n) for n in range(1000)], [0] * 1000], sys.argv[1])"
        )
        writers = [
            subprocess.Popen([sys.executable, "-c", script, name], cwd=ROOT, env=os.environ | asked) for name in "ab"
        ]
        assert [writer.wait(60) for writer in writers] == [0, 0]
        other = connect(port, password="")
        assert other.query("SELECT count(), uniq(rollout_id) FROM millstream.tasks_raw").result_rows == [(2000, 2000)]
        second = subprocess.run(
            [*COMMAND, str(tmp_path), "--port", "0"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert f"held by another process (pid {process.pid})" in " ".join(second.stderr.split())
        for page in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
            assert http(port, "SELECT 1", headers=page)[0] == 403
        other.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_outlives_the_server(tmp_path, number):
    with serving(tmp_path) as (port, process):
        client = connect(port, password="")
        client.command("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a")
        client.insert("t", [[1]], column_names=["a"])
        process.send_signal(number)
        process.wait(20)
    with pytest.raises(ClickHouseError):
        client.query("SELECT 1")
    with serving(tmp_path, port=port):
        client.insert("t", [[2]], column_names=["a"])
        assert client.query("SELECT sum(a) FROM t").result_rows == [(3,)]
    client.close()


def test_a_long_query_does_not_keep_it_from_ending(tmp_path):
    with serving(tmp_path) as (port, process), ThreadPoolExecutor() as pool:
        query = "SELECT count() FROM numbers(100000000000) WHERE NOT ignore(sipHash64(number)) SETTINGS max_threads = 1"
        asked = pool.submit(http, port, body=query.encode())
        while b"ignore" not in http(port, "SELECT query FROM system.processes WHERE query NOT LIKE '%processes%'")[2]:
            assert not asked.done()
        process.terminate()
        assert process.wait(20) == 0
        assert asked.exception() is not None or asked.result()[0] == 500
