"""Errors that users and roles of Millstream meet."""


class MillstreamError(Exception):
    """Base of every error that Millstream raises on purpose."""


class ConfigError(MillstreamError):
    """A setting, a file or an argument is wrong; the message names it and says what to do."""


class CodecError(MillstreamError):
    """A record can't be encoded or decoded; names the record and, where it is known, the field."""

    def __init__(self, message: str, *, record: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.record = record
        self.field = field


class TruncatedRecord(CodecError):
    """The body ends before the record does."""


class UnknownSchema(CodecError):
    """Not single-object encoding, or a fingerprint that none of the packaged schemas has."""


class WrongType(CodecError):
    """A field holds what its schema does not allow, or bytes are left over behind the record."""


class LogError(MillstreamError):
    """The log refused something. Retriable: the same call may be made again."""

    retriable = False


class LogUnavailable(LogError):
    """No broker answers, or a deadline passed; the outcome of the call is unknown. Repeat the same call."""

    retriable = True


class BufferFull(LogError):
    """The producer's buffer stayed full for as long as a sender may be kept waiting."""


class TooLarge(LogError):
    """The record is larger than the topics take. It was not sent."""


class TransactionAborted(LogError):
    """The transaction can't be committed (lost partition, stale generation). Abort it; the data may be sent again."""


class Fenced(LogError):
    """A newer process has taken this one's place. Stop; nothing that this one still holds may be written."""


class StoreError(MillstreamError):
    """The store can't be opened, migrated or queried."""
