"""Between a proxy and a model server: hangs up within a stream when it is told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Relay:
    """``cuts``: after how many events of a stream to hang up, for each of the next streams."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self.cuts: list[int] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection(self._host, self._port)
        asking = asyncio.create_task(self._asked(reader, downstream))
        with suppress(ConnectionError, asyncio.CancelledError):
            left = None
            while data := await upstream.read(1 << 16):
                if left is None and self.cuts and b"text/event-stream" in data:
                    left = self.cuts.pop(0)
                if left is not None:
                    *events, _ = data.split(b"\n\n")
                    if len(events) > left:
                        writer.write(b"".join(event + b"\n\n" for event in events[:left]))
                        break
                    left -= len(events)
                writer.write(data)
        asking.cancel()
        downstream.close()
        writer.close()

    @staticmethod
    async def _asked(reader: asyncio.StreamReader, downstream: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                downstream.write(data)
        downstream.close()


@asynccontextmanager
async def relay_to(url: str) -> AsyncIterator[Relay]:
    relay = Relay(url)
    async with await asyncio.start_server(relay.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        relay.url = f"http://{host}:{port}"
        yield relay
