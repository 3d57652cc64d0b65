"""The content-addressed store of long contents (`schemas.blobs`): a folder, or any file system that fsspec knows.

``URL/ab/abcd…`` holds the content whose SHA-256 is ``abcd…``. A content is written whole or not at all, once, and never
changed or deleted. Runners and proxies write, before they send the span; agents' processes have no access.
"""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from millstream.producers.files import files_at
from millstream.schemas.errors import MillstreamError
from millstream.schemas.spans import blobs
from millstream.schemas.wire.records import Span

KNOWN = 10_000  # contents that a process remembers to have stored
THREADS = 4  # contents that it stores at a time
STORE_S = 60.0  # how long a content may take


class BlobError(MillstreamError):
    """A content can't be stored or found; names its digest and the store."""


class Blobs:
    """May be used from any thread. Raises `ConfigError` if ``url`` can't be used."""

    def __init__(self, url: str = blobs.DEFAULT_URL) -> None:
        self.url = url = url.removeprefix("file://")
        self._files = files_at(url, "blob_url")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="millstream-blobs")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[None]] = OrderedDict()  # by digest; those that failed are forgotten
        self.pending_bytes = 0

    def put(self, digest: str, content: bytes) -> "Future[None]":
        """Stores a content unless it is there. The future has `BlobError` if that fails."""
        with self._lock:
            known = self._known.get(digest)
            if known is not None:
                self._known.move_to_end(digest)
                return known
            stored = self._known[digest] = self._threads.submit(self._put, digest, content)
            self.pending_bytes += len(content)
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
        stored.add_done_callback(lambda _: self._done(digest, len(content), stored))
        return stored

    async def keep(self, span: Span) -> Span:
        """The span as it may be sent: its long contents are stored, and it refers to them. Raises `BlobError`."""
        span, contents = blobs.kept_apart(span)
        for stored in [self.put(digest, content) for digest, content in contents.items()]:
            try:
                await asyncio.wait_for(asyncio.wrap_future(stored), STORE_S)
            except TimeoutError as error:
                raise BlobError(f"a content was not stored in {self.url} within {STORE_S:g} s") from error
        return span

    def get(self, digest: str) -> bytes:
        """Raises `BlobError` if it is not there, or is not what its name says."""
        try:
            content = self._files.read(_path(digest))
        except Exception as error:
            raise self._error(digest, "is not to be found", error) from error
        if blobs.digest_of(content) != digest:
            raise BlobError(f"content sha256:{digest} of {self.url} has been changed")
        return content

    def whole(self, text: str) -> str:
        """An attribute, or a triplet's text, with the contents in place of their references. Raises `BlobError`."""
        return blobs.whole(text, self.get)

    def close(self) -> None:
        """Gives up what has not begun to be stored."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _put(self, digest: str, content: bytes) -> None:
        if blobs.digest_of(content) != digest:
            raise BlobError(f"a content is not what its name sha256:{digest} says")
        try:
            self._files.write(_path(digest), content)
        except Exception as error:  # whatever a file system raises
            raise self._error(digest, f"({len(content)} bytes) was not stored", error) from error

    def _done(self, digest: str, size: int, stored: "Future[None]") -> None:
        with self._lock:
            self.pending_bytes -= size
            if (stored.cancelled() or stored.exception() is not None) and self._known.get(digest) is stored:
                del self._known[digest]

    def _error(self, digest: str, what: str, error: Exception) -> BlobError:
        return BlobError(f"content sha256:{digest} {what} in {self.url}: {type(error).__name__}: {error}")


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest}"
