"""The content-addressed store of long contents (`schemas.spans.blobs`): a folder, or any file system of fsspec.

``URL/ab/abcd…`` holds the content whose SHA-256 is ``abcd…``. A content is written once, as a whole or not at
all, and never changed or deleted. Runners and proxies write it before they send the span; agent processes have no
access.
"""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from millstream.producers.files import files_at
from millstream.schemas.errors import MillstreamError
from millstream.schemas.redaction import without_passwords
from millstream.schemas.spans import blobs
from millstream.schemas.wire.records import Span


class BlobError(MillstreamError):
    """A content can't be stored or found. Names its digest and the store."""


@dataclass(frozen=True, slots=True)
class BlobPolicy:
    """Limits of one process."""

    known: int = 10_000  # stored contents that it remembers
    threads: int = 4  # contents stored at a time
    store_s: float = 60.0  # until a content counts as not stored


class Blobs:
    """May be used from any thread. Raises `ConfigError` if ``url`` can't be used."""

    def __init__(self, url: str = blobs.DEFAULT_URL, policy: BlobPolicy = BlobPolicy()) -> None:
        self.policy = policy
        url = url.removeprefix("file://")
        self.url = without_passwords(url)  # for errors, which are recorded
        self._files = files_at(url)
        self._threads = ThreadPoolExecutor(policy.threads, thread_name_prefix="millstream-blobs")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[None]] = OrderedDict()  # by digest; those that failed are forgotten
        self.pending_bytes = 0

    def put(self, digest: str, content: bytes) -> "Future[None]":
        """Stores a content unless it exists. The future raises `BlobError` on failure."""
        with self._lock:
            known = self._known.get(digest)
            if known is not None:
                self._known.move_to_end(digest)
                return known
            stored = self._known[digest] = self._threads.submit(self._put, digest, content)
            self.pending_bytes += len(content)
            if len(self._known) > self.policy.known:
                self._known.popitem(last=False)
        stored.add_done_callback(lambda _: self._done(digest, len(content), stored))
        return stored

    async def keep(self, span: Span) -> Span:
        """Stores the long contents of a span; returns the span with references to them. Raises `BlobError`."""
        span, contents = blobs.kept_apart(span)
        for stored in [self.put(digest, content) for digest, content in contents.items()]:
            try:
                await asyncio.wait_for(asyncio.wrap_future(stored), self.policy.store_s)
            except TimeoutError as error:
                raise BlobError(f"a content was not stored in {self.url} within {self.policy.store_s:g} s") from error
        return span

    def get(self, digest: str) -> bytes:
        """Raises `BlobError` if the content is missing or does not match its digest."""
        try:
            content = self._files.read(_path(digest))
        except Exception as error:
            raise self._error(digest, "was not found", error) from error
        if blobs.digest_of(content) != digest:
            raise BlobError(f"content sha256:{digest} of {self.url} has been changed")
        return content

    def whole(self, text: str) -> str:
        """An attribute or a triplet's text, with contents instead of references. Raises `BlobError`."""
        return blobs.whole(text, self.get)

    def close(self) -> None:
        """Cancels contents whose storage has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _put(self, digest: str, content: bytes) -> None:
        if blobs.digest_of(content) != digest:
            raise BlobError(f"a content does not match its name sha256:{digest}")
        try:
            self._files.write(_path(digest), content)
        except Exception as error:  # a file system may raise anything
            raise self._error(digest, f"({len(content)} bytes) was not stored", error) from error

    def _done(self, digest: str, size: int, stored: "Future[None]") -> None:
        with self._lock:
            self.pending_bytes -= size
            if (stored.cancelled() or stored.exception() is not None) and self._known.get(digest) is stored:
                del self._known[digest]

    def _error(self, digest: str, what: str, error: Exception) -> BlobError:
        message = f"content sha256:{digest} {what} in {self.url}: {type(error).__name__}: {error}"
        return BlobError(without_passwords(message))


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest}"
