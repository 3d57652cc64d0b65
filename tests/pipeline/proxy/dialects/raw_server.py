"""A server that answers each request with the same bytes, and a proxy in front of it."""

import asyncio
import json
import re
from contextlib import asynccontextmanager

from proxy_rig import rig_of

JSON, STREAM = "application/json", "text/event-stream; charset=utf-8"


class RawServer:
    """Answers each request with the same bytes. ``pieces``: how the body is cut."""

    def __init__(self):
        self.head, self.pieces, self.bodies, self.url = "", [], [], ""

    def answers(self, body, content_type, *, encoding="", cut=None, status=200, lines=""):
        encoded = f"Content-Encoding: {encoding}\r\n" if encoding else ""
        kind = f"Content-Type: {content_type}\r\n{encoded}{lines}Transfer-Encoding: chunked"
        self.head = f"HTTP/1.1 {status} OK\r\n{kind}\r\n\r\n"
        self.pieces = [body] if cut is None else [body[at : at + cut] for at in range(0, len(body), cut)]

    @property
    def asked(self):
        return [json.loads(body) for body in self.bodies]

    async def serve(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
                self.bodies.append(await reader.readexactly(length))
                writer.write(self.head.encode())
                for piece in self.pieces:
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def served(kind, **settings):
    """Such a server, and a proxy in front of it that takes it for one of that kind."""
    raw = RawServer()
    async with await asyncio.start_server(raw.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        raw.url = f"http://{host}:{port}"
        upstream = {"urls": [raw.url], "kind": kind, **settings.pop("upstream", {})}
        async with rig_of(upstreams={"model": upstream}, routes={"*": "model"}, **settings) as rig:
            yield raw, rig
