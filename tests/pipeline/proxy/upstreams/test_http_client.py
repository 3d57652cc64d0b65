"""The proxy's HTTP client, against servers that send exactly the bytes of a test."""

import asyncio
import ssl
import subprocess
from contextlib import asynccontextmanager

import pytest

from millstream.pipeline.proxy.upstreams.http_client import ConnectionPolicy, HttpError, Server

UNREAD = ConnectionPolicy().unread
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@asynccontextmanager
async def serving(*answers, hold=False):
    """A server of raw bytes. Each connection gets the answers in turn, one for each request, and is closed then, or
    kept with ``hold``; yields the client and the requests of each connection."""
    connections = []

    async def serve(reader, writer):
        requests = []
        connections.append(requests)
        for answer in answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            requests.append(head + await reader.readexactly(length))
            writer.write(answer)
        if hold:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base")
    try:
        yield client, connections
    finally:
        client.close()
        server.close()


async def ask(client, path="/x", body=b"{}"):
    async with client.request("POST", path, {"A": "b"}, body) as answer:
        return answer.status, await answer.read()


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nhi",  # ends with the connection
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK,
    ],
)
async def test_answers_in_every_form(answer):
    async with serving(answer) as (client, connections):
        assert await ask(client) == (200, b"hi")
        assert connections[0][0].startswith(b"POST /base/x HTTP/1.1\r\nHost: 127.0.0.1:")
        assert connections[0][0].endswith(b"\r\nA: b\r\nContent-Length: 2\r\n\r\n{}")


async def test_headers_are_found_by_their_lower_case_names():
    answered = b"HTTP/1.1 404 No\r\nContent-Type: Text/Plain; x=1\r\nX-A: B\r\nContent-Length: 0\r\n\r\n"
    async with serving(answered) as (client, _), client.request("GET", "/x", {}) as answer:
        assert (answer.status, answer.content_type, answer.headers["x-a"]) == (404, "text/plain", "B")


async def test_connections_are_reused():
    async with serving(OK, OK, OK, hold=True) as (client, connections):
        for _ in range(3):
            assert await ask(client) == (200, b"hi")
        assert [len(requests) for requests in connections] == [3]


async def test_a_request_is_repeated_when_its_idle_connection_was_being_closed():
    """Each connection serves one request and is closed just when the next one is written to it."""
    async with serving(OK) as (client, connections):
        for _ in range(20):
            assert await ask(client) == (200, b"hi")
        assert len(connections) == 20


async def test_a_request_is_repeated_when_its_connection_ends_before_an_answer():
    """The server closes it having read the next request, and before it answers anything."""
    async with serving(OK, b"") as (client, connections):
        await ask(client)
        assert await ask(client) == (200, b"hi")
        assert len(connections[0]) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "hung up"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "hung up"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi", "hung up"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", "hung up"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi", "does not speak HTTP"),
    ],
)
async def test_an_incomplete_answer_is_an_error(answer, message):
    async with serving(answer) as (client, _):
        with pytest.raises(HttpError, match=message):
            await ask(client)


async def test_an_unrequested_answer_is_dropped():
    """Bytes that a server sends unasked must not become the answer to the next request."""
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    async with serving(OK + smuggled, hold=True) as (client, connections):
        await ask(client)
        await ask(client)
        assert len(connections) == 2


async def test_an_answer_that_is_left_early_closes_its_connection():
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"
    async with serving(endless, hold=True) as (client, connections):
        for _ in range(2):
            async with client.request("POST", "/x", {}) as answer:
                assert await anext(answer.pieces()) == b"hi"
        assert len(connections) == 2


async def test_data_that_came_is_read_after_the_server_has_gone():
    body = b"x" * (UNREAD + 1000)
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with serving(whole) as (client, _), client.request("POST", "/x", {}) as answer:
        await asyncio.sleep(0.2)  # the client has no event for it
        assert await answer.read() == body


async def test_a_server_waits_for_a_slow_reader():
    written = 0
    gone = asyncio.Event()

    async def flood(reader, writer):
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while written < 64 << 20:
                writer.write(b"x" * (64 << 10))
                await writer.drain()
                written += 64 << 10
        except ConnectionError:
            gone.set()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    client = Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with client.request("GET", "/x", {}) as answer:
        before = -1
        while before != written:  # until it gets no further
            before = written
            await asyncio.sleep(0.2)
        assert written < 32 << 20  # what sockets hold
        assert len(await anext(answer.pieces())) < UNREAD + (1 << 20)
    await asyncio.wait_for(gone.wait(), 10)
    client.close()
    server.close()


async def test_connections_are_limited():
    gate, two = asyncio.Event(), asyncio.Event()
    under_way = most = 0

    async def serve(reader, writer):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == 2:
            two.set()
        await reader.readuntil(b"\r\n\r\n")
        await gate.wait()
        under_way -= 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", max_connections=2)
    calls = [asyncio.create_task(ask(client)) for _ in range(10)]
    await two.wait()
    calls.pop().cancel()  # one that waits
    gate.set()
    assert set(await asyncio.gather(*calls)) == {(200, b"")}
    assert most == 2
    client.close()
    server.close()


async def test_a_port_without_a_server_is_an_error():
    with pytest.raises(HttpError, match="Connect"):
        await ask(Server("http://127.0.0.1:9"))


async def test_a_line_break_in_a_header_is_refused():
    with pytest.raises(ValueError, match="line break"):
        Server("http://127.0.0.1:9").request("POST", "/", {"A": "b\r\nX-Evil: 1"})


@pytest.fixture
def certificate(tmp_path):
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", *files]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    return context


async def test_a_server_without_a_valid_certificate_is_refused(certificate):
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=certificate)
    with pytest.raises(HttpError, match="CERTIFICATE_VERIFY_FAILED"):
        await ask(Server(f"https://localhost:{server.sockets[0].getsockname()[1]}"))
    server.close()
