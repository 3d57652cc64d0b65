"""The errors that Millstream raises."""

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError


class MillstreamError(Exception):
    """Base of every error that Millstream raises on purpose. ``exit_code``: of a command that it ends."""

    exit_code: ClassVar[int] = 1


class ConfigError(MillstreamError):
    """A setting, a file or an argument is wrong. The message names it and says what to do."""

    exit_code = 2  # as for an option that the command line itself refuses


class CodecError(MillstreamError):
    """A record can't be encoded or decoded. The message names its type and, if known, the field: ``Span.name: …``."""


class TruncatedRecord(CodecError):
    """The bytes end before the record is complete."""


class UnknownSchema(CodecError):
    """Not single-object encoding, or the fingerprint of no packaged schema."""


class WrongType(CodecError):
    """A field has a value that its schema does not allow, or bytes follow the record."""


class LogError(MillstreamError):
    """The log refused a call. ``retriable``: the same call may be retried."""

    retriable = False


class LogUnavailable(LogError):
    """No broker answers, or a deadline passed. The outcome of the call is unknown; retry the same call."""

    retriable = True


class Denied(LogError):
    """The brokers deny a right. The message names the right, and the user that needs it."""


class BufferFull(LogError):
    """The producer's buffer stayed full for as long as a sender may wait."""


class TooLarge(LogError):
    """The record exceeds the size limit of the topics. It was not sent."""


class TransactionAborted(LogError):
    """The transaction can't be committed (lost partition, stale generation). Abort it, then send the data again."""


class Fenced(LogError):
    """A newer process has replaced this one. Stop, and write nothing more."""

    exit_code = 3


class BackgroundFailed(MillstreamError):
    """A background task or thread of a role has ended unexpectedly: the process should be started again."""

    exit_code = 4


class StoreError(MillstreamError):
    """The store can't be opened, migrated or queried."""


def problems_of(error: "ValidationError") -> str:
    """All that a pydantic model refuses, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else e["msg"]
        for e in error.errors(include_url=False, include_input=False)
    )
